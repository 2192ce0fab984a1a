"""LoRA adapters in PEFT's format, in and out: what adapter_config.json says, its tensors as slots.

LoRA adapters in PEFT's format as slots.

PEFT stores A as (r, in) and B as (out, r) beside the hub's names, one pair for each expert. transformers 5 keeps the
experts fused in memory, and an adapter that was trained or saved there has one pair for all experts of a layer: A is
(E, r, in) flattened, B is (out, r, E) flattened. Its gate_up_proj is w1 over w3; they share an A of rank r, or have
their own halves of rank 2 r and a block-diagonal B (what PEFT makes of adapters that came one for each expert).
"""

import functools
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.adapter import AdapterSource, Factors, NativeAdapter, target_of, write_adapter
from mixtral_jax.convert.atomic import check_destination, new_directory
from mixtral_jax.convert.files import Directory, is_remote
from mixtral_jax.convert.hf import Entry, read_config, read_shape, slot_error
from mixtral_jax.convert.pipeline import check_orbax_destination, open_source
from mixtral_jax.convert.progress import progress_bar
from mixtral_jax.convert.safetensors import Tensor, layout, read_header
from mixtral_jax.convert.table import Slot, slots
from mixtral_jax.lora import TARGETS, LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Each changes what is computed, or what is stored, when it is set.
_REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
)  # fmt: skip
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """The part of adapter_config.json that fixes the numbers."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    base: str | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of a module; a pattern matches the end of its name, as in PEFT."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What (x A) B of a module is multiplied with."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_settings(directory: Directory) -> Settings:
    """The settings of a PEFT directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: no LoRA, a variant of it that is not supported, or values that make no sense.
    """
    names = directory.names()
    if not names and not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist")
    for name in (CONFIG, WEIGHTS):
        if name not in names:
            raise ValueError(f"{directory} has no {name}: it is no PEFT adapter in safetensors")
    where = f"{directory}/{CONFIG}"
    try:
        config: dict[str, Any] = dict(json.loads(directory.read_bytes(CONFIG)))
    except (ValueError, TypeError):
        raise ValueError(f"{where} is no JSON object") from None
    _refuse(config, where)
    try:
        settings = Settings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            base=config.get("base_model_name_or_path"),
            rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )
    except KeyError as error:
        raise ValueError(f"{where} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: r, lora_alpha or their patterns are no numbers ({error})") from None
    if settings.rank < 1 or settings.alpha <= 0 or not 0 <= settings.dropout < 1:
        raise ValueError(
            f"{where}: r {settings.rank}, lora_alpha {settings.alpha:g} and lora_dropout {settings.dropout:g} "
            "must be positive, positive, and in 0 ... 1"
        )
    return settings


def _refuse(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}, only LORA is converted")
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(f"{where}: {key} is {config[key]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}: the model has no biases, only 'none' is converted")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_ALTERS_BASE):
        raise ValueError(f"{where}: init_lora_weights {start!r} changes the base too: convert it to plain LoRA in PEFT")


def _matching(patterns: dict[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


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


Path_ = str | os.PathLike[str]


def peft2lora(src: Path_, dst: Path_, *, base: Path_ | None = None, force: bool = False, progress: bool = True) -> None:
    """A PEFT directory to an adapter directory of ours; no value is changed.

    Args:
        src: with keys for each expert, or with the fused ones of transformers 5.
        base: the model that it belongs to, of any format (its shape is read); None: where adapter_config.json says.

    Raises:
        ValueError: the adapter is not whole, not supported, or of another base; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_orbax_destination(dst)
    check_destination(dst, src, force)
    where = read_base(src) if base is None else os.fspath(base)
    if where is None or not Directory(where).exists():
        raise ValueError(
            f"{src}/{CONFIG} names the base {where!r}, which is no directory here: say --base and its directory"
        )
    adapter = PeftAdapter(src, _shape(where))
    adapter.base = where
    write_adapter(adapter, dst, force=force, progress=progress)


def lora2peft(src: Path_, dst: Path_, *, force: bool = False, progress: bool = True) -> None:
    """An adapter of ours, or a step of a LoRA run, to a directory that peft.PeftModel.from_pretrained loads.

    Raises:
        ValueError: the adapter is not whole, or the run trained the router too; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force)
    adapter = NativeAdapter(src)
    if adapter.has_router:
        raise ValueError(f"{src} holds a trained router too, which is no adapter: use merge-lora, then orbax2hf")
    write_peft(adapter, dst, force=force, progress=progress)


def write_peft(adapter: AdapterSource, dst: Path_, *, force: bool, progress: bool) -> None:
    """Any adapter as a PEFT directory, one matrix at a time, local or remote."""
    exported, rank = _exported(adapter), adapter.lora.rank
    own = {slot.name for slot in adapter.slots}
    like = next(reversed(adapter.slots))  # of the dtype of what is filled in: an expert's, if there is one
    entries: list[Entry] = []
    for slot in exported:
        stem = PREFIX + slot.name.removesuffix(".weight")
        a_dtype, b_dtype = adapter.dtypes(slot if slot.name in own else like)
        entries += [(stem + A, a_dtype, (rank, slot.cols)), (stem + B, b_dtype, (slot.rows, rank))]
    header, tensors = layout(WEIGHTS, entries)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(dst, needed_bytes=total, force=force) as work:
        with progress_bar(f"writing {dst}", total, show=progress) as advance, work.create(WEIGHTS) as file:
            file.write(header)
            for index, slot in enumerate(exported):
                factors = adapter.factors(slot) if slot.name in own else (None, None)
                pairs = zip(entries[2 * index : 2 * index + 2], factors, strict=True)
                for (_, dtype, shape), matrix in pairs:
                    data = np.zeros(shape, dtype) if matrix is None else np.ascontiguousarray(matrix.T)
                    file.write(data.view(np.uint8).data)
                    advance(data.nbytes)
        work.write_bytes(CONFIG, (json.dumps(peft_config(adapter), indent=2) + "\n").encode())


def peft_config(adapter: AdapterSource) -> dict[str, Any]:
    """adapter_config.json. rsLoRA becomes plain LoRA of alpha * sqrt(r): the same scale, and PEFT then doubles rank and
    alpha of w1 and w3 as it fuses them, which keeps alpha / r but not alpha / sqrt(r)."""
    lora = adapter.lora
    alpha = lora.alpha * math.sqrt(lora.rank) if lora.rslora else lora.alpha
    experts = any(slot.leaf.path.startswith("layers.moe.") for slot in adapter.slots)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        # PEFT has no dropout on fused experts and refuses an adapter that asks for it.
        "lora_dropout": 0.0 if experts and not adapter.config.is_dense else lora.dropout,
        "target_modules": sorted({slot.name.split(".")[-2] for slot in _exported(adapter)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _exported(adapter: AdapterSource) -> list[Slot]:
    """The slots of the adapter, and those of experts that PEFT wants beside them, which are written as 0.

    PEFT takes w1 and w3 only together, and places them, without an error, where nothing reads them if w2 is not there.
    """
    targets = {target_of(slot) for slot in adapter.slots}
    if not adapter.config.is_dense and targets & {"moe.w1", "moe.w3"}:
        targets |= {"moe.w1", "moe.w3", "moe.w2"}
    return [slot for slot in slots(adapter.config) if target_of(slot) is not None and target_of(slot) in targets]


def _shape(base: Path_) -> MixtralConfig:
    """The shape of a model, for which config.json is enough."""
    directory = Directory(base)
    if "config.json" in directory.names():
        return read_shape(read_config(directory), directory)
    return open_source(base).config
