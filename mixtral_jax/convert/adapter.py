"""LoRA adapters on disk: adapter.json (which base, which LoraConfig) and params/ (the adapter leaves, format 1).

A step of a LoRA run, whose state holds adapters only (and the router, if it was trained), reads the same. An adapter's
slots are the hub matrices that it changes, so that the one table (convert/table.py) names its parts too.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import nnx
from pydantic import ValidationError

from mixtral_jax.checkpoint.slices import ArrayReader, ArraySpec, ArrayWriter
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.atomic import new_directory
from mixtral_jax.convert.hf import slot_error
from mixtral_jax.convert.orbax import FORMAT, PARAMS, is_training_checkpoint, training_meta
from mixtral_jax.convert.pipeline import newest_step
from mixtral_jax.convert.progress import progress_bar
from mixtral_jax.convert.table import Slot, nest, slots
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import abstract_model

ADAPTER = "adapter.json"
ROUTER = "layers.moe.router"
_CACHE = 64 << 20
_HALVES = {"layers.moe.w13": ("moe.w1", "moe.w3")}


class Factors(NamedTuple):
    """The two matrices of one slot: the hub matrix changes by scale * (A B)^T."""

    a_Ir: np.ndarray
    b_rO: np.ndarray


class AdapterSource(Protocol):
    """An adapter of any format."""

    config: MixtralConfig  # of the base
    lora: LoraConfig
    base: str | None  # where the base was, if anybody noted it
    slots: list[Slot]  # the adapted ones

    def dtypes(self, slot: Slot) -> tuple[np.dtype, np.dtype]:
        """Of A and of B."""

    def factors(self, slot: Slot) -> Factors: ...


class NativeAdapter:
    """An adapter directory of ours, or a step of a LoRA run (a run's directory stands for its newest step).

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: no adapter, incomplete, or not what its configuration says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = newest_step(Path(path))
        if is_training_checkpoint(self.path):
            self._prefix, stored = f"{PARAMS}.", self.path
            self.config, self.lora, self.base = _read_meta(self.path)
        else:
            self._prefix, stored = "", self.path / PARAMS
            self.config, self.lora, self.base = _read_note(self.path)
        self._reader = ArrayReader(stored, _CACHE)
        found = self._reader.custom_metadata().get("format")
        if found != FORMAT:
            raise ValueError(f"{path}: adapters of format {FORMAT} are read, this one has format {found}")
        self._specs, self.has_router = self._check()
        self.slots = adapted_slots(self.config, self.lora)
        self.factors = functools.lru_cache(maxsize=16)(self._factors)

    def dtypes(self, slot: Slot) -> tuple[np.dtype, np.dtype]:
        a, b = adapter_paths(slot)
        return self._specs[a].dtype, self._specs[b].dtype

    def router(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        """Hub rows of a router that was trained with the adapters."""
        return slot.to_hub(self._reader.read(self._prefix + ROUTER, slot.box(start, stop)))

    def params(self) -> dict[str, Any]:
        """All adapter leaves as a nested dict of numpy arrays: a part of the native tree."""
        return nest({name: self._reader.read(self._prefix + name, ()) for name in self._specs})

    def _factors(self, slot: Slot) -> Factors:
        index = stack_index(slot)
        a, b = (self._reader.read(self._prefix + name, index) for name in adapter_paths(slot))
        return Factors(a.reshape(-1, self.lora.rank), b.reshape(self.lora.rank, -1))

    def _check(self) -> tuple[dict[str, ArraySpec], bool]:
        """What is stored of each leaf, and whether a router is."""
        expected = adapter_shapes(self.config, self.lora)
        stored = {n.removeprefix(self._prefix) for n in self._reader.names if n.startswith(self._prefix)}
        has_router = bool(self._prefix) and ROUTER in stored
        missing, unexpected = [n for n in expected if n not in stored], sorted(stored - expected.keys())
        unexpected = [n for n in unexpected if not (has_router and n == ROUTER)]
        if missing or unexpected:
            raise ValueError(slot_error(str(self.path), missing, unexpected).replace("config.json", "LoRA settings"))
        specs = {name: self._reader.spec(self._prefix + name) for name in expected}
        for name, spec in specs.items():
            if spec.shape != expected[name]:
                raise ValueError(
                    f"{name} in {self.path} has shape {list(spec.shape)}, its LoRA settings (rank {self.lora.rank}) "
                    f"ask for {list(expected[name])}"
                )
        return specs, has_router


def target_of(slot: Slot) -> str | None:
    """Which of lora.TARGETS a hub tensor is; None: it takes no adapter."""
    path = slot.leaf.path
    if path in _HALVES:
        return _HALVES[path][slot.half]
    if path == "layers.moe.w2" or path.startswith("layers.attention."):
        return path.removeprefix("layers.")
    return None


def adapted_slots(config: MixtralConfig, lora: LoraConfig) -> list[Slot]:
    """The hub tensors that an adapter changes, in the order of the model."""
    return [slot for slot in slots(config) if (target := target_of(slot)) is not None and lora.adapts(target)]


def adapter_paths(slot: Slot) -> tuple[str, str]:
    """The native leaves that hold A and B of a slot."""
    path = f"layers.{target_of(slot)}_lora"
    return f"{path}.a", f"{path}.b"


def stack_index(slot: Slot) -> tuple[int, ...]:
    """Where a slot is in its stacked adapter leaves: layer, and expert of the feed-forward."""
    return (slot.layer, slot.expert) if slot.leaf.path.startswith("layers.moe.") else (slot.layer,)


def adapter_shapes(config: MixtralConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every adapter leaf by its dotted path."""
    flat = nnx.to_flat_state(nnx.state(abstract_model(config, lora=lora)))
    named = {".".join(map(str, path)): variable.shape for path, variable in flat}
    return {name: tuple(shape) for name, shape in named.items() if is_adapter(name)}


def check_same_model(config: MixtralConfig, adapter: AdapterSource, where: str) -> None:
    """Raises: ValueError naming what the base of the adapter and the model of shape `config` do not share."""
    different = config.differences(adapter.config)
    different.pop("tie_word_embeddings", None)  # an adapter sees no head
    if different:
        told = "; ".join(f"{key} is {b} for the adapter, {a} in {where}" for key, (a, b) in different.items())
        raise ValueError(f"the adapter belongs to another base: {told}")


def write_adapter(source: AdapterSource, dst: str | os.PathLike[str], *, force: bool, progress: bool) -> None:
    """Any adapter as a directory of ours, one matrix at a time."""
    specs: dict[str, ArraySpec] = {}
    shapes = adapter_shapes(source.config, source.lora)
    for slot in source.slots:
        for name, dtype in zip(adapter_paths(slot), source.dtypes(slot), strict=True):
            stacked = len(stack_index(slot))
            chunk = (*(1,) * stacked, *shapes[name][stacked:])
            known = specs.setdefault(name, ArraySpec(shapes[name], dtype, chunk))
            if known.dtype != dtype:
                raise ValueError(f"the adapter of {slot.name} is {dtype}, that of another layer {known.dtype}")
    total = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs.values())
    with new_directory(dst, needed_bytes=total, force=force) as work:
        writer = ArrayWriter(work.local / PARAMS, specs)
        with progress_bar(f"writing {dst}", total, show=progress) as advance:
            for slot in source.slots:
                for name, matrix in zip(adapter_paths(slot), source.factors(slot), strict=True):
                    index = stack_index(slot)
                    writer.write(name, index, matrix.reshape(shapes[name][len(index) :]))
                    advance(matrix.nbytes)
        writer.close()
        note = {
            "format": FORMAT,
            "base": source.base,
            "lora": source.lora.model_dump(mode="json"),
            "model": source.config.model_dump(mode="json"),
        }
        work.write_bytes(ADAPTER, (json.dumps(note, indent=2) + "\n").encode())


def _read_note(path: Path) -> tuple[MixtralConfig, LoraConfig, str | None]:
    """adapter.json."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not (path / ADAPTER).is_file():
        raise ValueError(f"{path} is no adapter: neither {ADAPTER} and {PARAMS}/ nor a step of a LoRA run")
    try:
        note = json.loads((path / ADAPTER).read_text())
        return MixtralConfig(**note["model"]), LoraConfig(**note["lora"]), note["base"]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{path / ADAPTER} does not say what the adapter is: {_one_line(error)}") from None


def _read_meta(path: Path) -> tuple[MixtralConfig, LoraConfig, str | None]:
    """What a step of a LoRA run notes."""
    config = training_meta(path).get("config", {})
    if not config.get("lora"):
        raise ValueError(f"{path} is a step of a run without LoRA: it holds no adapter")
    try:
        return MixtralConfig(**config["model"]), LoraConfig(**config["lora"]), config.get("init_from")
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{path}/meta does not say what the adapter is: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return f"{type(error).__name__}: {error}"
