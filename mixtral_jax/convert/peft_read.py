"""LoRA adapters in PEFT's format as slots.

PEFT stores A as (r, in) and B as (out, r) beside the hub's names, one pair for each expert. transformers 5 keeps the
experts fused in memory, and an adapter that was trained or saved there has one pair for all experts of a layer: A is
(E, r, in) flattened, B is (out, r, E) flattened. Its gate_up_proj is w1 over w3; they share an A of rank r, or have
their own halves of rank 2 r and a block-diagonal B (what PEFT makes of adapters that came one for each expert).
"""

import functools
import math
import os
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.adapter import Factors, target_of
from mixtral_jax.convert.files import Directory, is_remote
from mixtral_jax.convert.hf import slot_error
from mixtral_jax.convert.peft_settings import CONFIG, WEIGHTS, Settings, read_settings
from mixtral_jax.convert.safetensors_io import Tensor, read_header
from mixtral_jax.convert.table import Slot, slots
from mixtral_jax.lora import TARGETS, LoraConfig

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


class Part(NamedTuple):
    """Where a slot's A and B are: tensors `stem` + A and B, which belong to `module` of PEFT."""

    stem: str
    module: str
    fused: bool = False


class PeftAdapter:
    """A PEFT directory for a base of shape `config`. All checks but that of fused halves are made here.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: an unsupported variant, tensors missing or unexpected, shapes of another base or rank, or matrices
            of different rank or scale.
    """

    def __init__(self, path: str | os.PathLike[str], config: MixtralConfig) -> None:
        self.directory, self.config = Directory(path), config
        self._settings = read_settings(self.directory)
        self.base = self._settings.base
        self._reader = self.directory.reader(WEIGHTS)
        self._tensors = read_header(self.directory, WEIGHTS, self._reader)
        adaptable = [slot for slot in slots(config) if target_of(slot) is not None]
        self._parts = {slot.name: part for slot in adaptable if (part := self._find(slot)) is not None}
        present = {target_of(slot) for slot in adaptable if slot.name in self._parts}
        self.slots = [slot for slot in adaptable if target_of(slot) in present]
        self._check_names()
        for slot in self.slots:
            self._check(slot)
        self._tensor = functools.lru_cache(maxsize=2)(self._read)
        self.factors = functools.lru_cache(maxsize=16)(self._factors)
        named = [t for t in TARGETS if t in present]
        alive = [t for t in named if not self._filled_in(t)] or named
        self.slots = [slot for slot in self.slots if target_of(slot) in alive]
        s = self._settings
        self.lora = LoraConfig(rank=s.rank, alpha=s.alpha, rslora=s.rslora, dropout=s.dropout, targets=tuple(alive))

    def dtypes(self, slot: Slot) -> tuple[np.dtype, np.dtype]:
        stem = self._parts[slot.name].stem
        return self._tensors[stem + A].dtype, self._tensors[stem + B].dtype

    def _find(self, slot: Slot) -> Part | None:
        module = slot.name.removesuffix(".weight")
        if {PREFIX + module + A, PREFIX + module + B} & self._tensors.keys():
            return Part(PREFIX + module, module)
        if self.config.is_dense or not slot.leaf.path.startswith("layers.moe."):
            return None
        experts = f"model.layers.{slot.layer}.mlp.experts"
        fused = f"{experts}.{'down_proj' if slot.leaf.path == 'layers.moe.w2' else 'gate_up_proj'}"
        inputs, outputs = self._fused_shape(slot)
        # Which of the two is the inner one depends on the order in which they were wrapped; no shape fits both.
        for stem in (f"{PREFIX}{experts}.base_layer", f"{PREFIX}{experts}"):
            a, b = self._tensors.get(stem + A), self._tensors.get(stem + B)
            if a is not None and b is not None and (a.shape[-1], b.shape[0]) == (inputs, outputs):
                return Part(stem, fused, fused=True)
        return None

    def _fused_shape(self, slot: Slot) -> tuple[int, int]:
        """Inputs and outputs of the fused parameter that holds a slot."""
        return slot.cols, slot.rows * len(slot.leaf.names)

    def _check_names(self) -> None:
        expected = set()
        for slot in self.slots:
            stem = self._parts[slot.name].stem if slot.name in self._parts else PREFIX + slot.name[: -len(".weight")]
            expected |= {stem + A, stem + B}
        missing, unexpected = sorted(expected - self._tensors.keys()), sorted(self._tensors.keys() - expected)
        if missing or unexpected or not self.slots:
            told = slot_error(str(self.directory), missing, unexpected)
            raise ValueError(told.replace("its config.json", "the base's attention and experts"))

    def _check(self, slot: Slot) -> None:
        part, own = self._parts[slot.name], self._settings
        rank, scale = own.rank_of(part.module), own.scale_of(part.module)
        allowed = (own.rank, 2 * own.rank) if part.fused and slot.leaf.path == "layers.moe.w13" else (own.rank,)
        if rank not in allowed or not math.isclose(scale, own.scale_of("")):
            raise ValueError(
                f"{self.directory}/{CONFIG}: {part.module} has rank {rank} and scale {scale:g}, others {own.rank} and "
                f"{own.scale_of(''):g}: one rank and one scale for all are converted"
            )
        experts = self.config.num_local_experts if part.fused else 1
        inputs, outputs = self._fused_shape(slot) if part.fused else (slot.cols, slot.rows)
        wanted = {part.stem + A: (experts * rank, inputs), part.stem + B: (outputs, rank * experts)}
        for name, shape in wanted.items():
            if self._tensors[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {list(self._tensors[name].shape)}, but rank {rank} in {CONFIG} and the base "
                    f"ask for {list(shape)}: the adapter is of another rank or for another base"
                )
            assert self._tensors[name].dtype

    def _read(self, name: str) -> np.ndarray:
        tensor: Tensor = self._tensors[name]
        return np.frombuffer(self._reader.pread(tensor.offset, tensor.nbytes), tensor.dtype).reshape(tensor.shape)

    def _factors(self, slot: Slot) -> Factors:
        part = self._parts[slot.name]
        a, b = self._tensor(part.stem + A), self._tensor(part.stem + B)
        if not part.fused:
            return Factors(a.T, b.T)
        experts, rank = self.config.num_local_experts, self._settings.rank
        a_rI = a.reshape(experts, -1, a.shape[1])[slot.expert]
        b_Or = b.reshape(b.shape[0], -1, experts)[slot.half * slot.rows : (slot.half + 1) * slot.rows, :, slot.expert]
        if a_rI.shape[0] == 2 * rank:
            half, other = (slice(h * rank, (h + 1) * rank) for h in (slot.half, 1 - slot.half))
            if b_Or[:, other].any():
                raise ValueError(
                    f"{part.stem}{B}: w1 and w3 share all of rank {2 * rank} where {CONFIG} says {rank} for the others"
                )
            a_rI, b_Or = a_rI[half], b_Or[:, half]
        return Factors(a_rI.T, b_Or.T)

    def _filled_in(self, target: str) -> bool:
        """Whether an expert's matrix has A and B of 0, which never learn: what export writes beside the others."""
        own = [slot for slot in self.slots if target_of(slot) == target]
        return target.startswith("moe.") and not any(m.any() for slot in own for m in self.factors(slot))


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a PEFT directory, whole or not."""
    return is_remote(path) or CONFIG in Directory(path).names()


def read_base(path: str | os.PathLike[str]) -> str | None:
    """Where a PEFT adapter says that its base is."""
    settings: Settings = read_settings(Directory(path))
    return settings.base
