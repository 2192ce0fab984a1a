"""Orbax checkpoints as slots, in and out: our model directories, and the checkpoints of training runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.checkpoint.slices import ArrayReader, ArraySpec, ArrayWriter
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.hf import read_config, read_shape, slot_error
from mixtral_jax.convert.stream import STRIP, Rows, Source, bands, blocked_transpose, turned
from mixtral_jax.convert.table import Leaf, Slot, leaves, slots
from mixtral_jax.lora import is_adapter

PARAMS = "params"  # the checkpoint inside a model directory; also the key of the parameters inside a training state
FORMAT = 1


class OrbaxSource:
    """A model directory (config.json, params/) or one step of a training run, as slots.

    `training` says which. All checks are made here, before anything is written.

    Raises:
        ValueError: the directory is not ours, incomplete, or does not match its configuration.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = Directory(path)
        root = self.directory.local
        self.training = is_training_checkpoint(root)
        if self.training:
            self._reader, self._prefix = ArrayReader(root), f"{PARAMS}."
            self.hf_config = _training_config(root, self._reader).to_hf()
            self.config = MixtralConfig.from_hf(self.hf_config)
        else:
            self.hf_config = read_config(self.directory)
            self.config = read_shape(self.hf_config, self.directory)
            self._reader, self._prefix = ArrayReader(root / PARAMS), ""
        found = self._reader.custom_metadata().get("format")
        if found != FORMAT:
            raise ValueError(
                f"{path} is an Orbax checkpoint but not one of ours: format {FORMAT} expected, {found} found"
            )
        self.slots = slots(self.config)
        self._specs = self._check()

    def dtype(self, slot: Slot) -> np.dtype:
        return self._specs[slot.leaf.path].dtype

    def band(self, slot: Slot) -> int | None:
        leaf, chunk = slot.leaf, self._specs[slot.leaf.path].chunk
        return min(slot.rows, chunk[leaf.rows_axis] * leaf.row_step)

    def cost(self, slot: Slot) -> int:
        spec = self._specs[slot.leaf.path]
        return 2 * int(np.prod(spec.chunk)) * spec.dtype.itemsize

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        box = self.read_box(slot.leaf.path, slot.box(start, stop))
        return blocked_transpose(box.reshape(slot.cols, -1)) if slot.leaf.transposed else box

    def read_box(self, leaf: str, box: tuple[int | slice, ...]) -> np.ndarray:
        """A part of a native leaf."""
        return self._reader.read(self._prefix + leaf, box)

    def _check(self) -> dict[str, ArraySpec]:
        expected = {leaf.path: leaf for leaf in leaves(self.config)}
        stored = {n.removeprefix(self._prefix) for n in self._reader.names if n.startswith(self._prefix)}
        missing, unexpected = [n for n in expected if n not in stored], sorted(stored - expected.keys())
        if any(is_adapter(name) for name in unexpected):
            raise ValueError(
                f"{self.directory} holds the adapters of a LoRA run, no whole model: fold them into their base first "
                f"with convert merge-lora BASE MERGED --adapter {self.directory}"
            )
        if missing or unexpected:
            raise ValueError(slot_error(str(self.directory), missing, unexpected))
        specs = {name: self._reader.spec(self._prefix + name) for name in expected}
        for name, spec in specs.items():
            if spec.shape != expected[name].shape:
                raise ValueError(
                    f"{name} in {self.directory} has shape {list(spec.shape)}, "
                    f"its configuration asks for {list(expected[name].shape)}"
                )
        return specs


class OrbaxSink:
    """The `params` checkpoint of a new model directory; pieces are chunks."""

    def __init__(self, path: Path, source: Source, dtype_of: Callable[[Slot], np.dtype]) -> None:
        specs: dict[str, ArraySpec] = {}
        self._source, self._dtype_of = source, dtype_of
        for slot in source.slots:
            rows = bands(slot, dtype_of(slot).itemsize, source.band(slot))
            spec = ArraySpec(slot.leaf.shape, dtype_of(slot), _chunk(slot.leaf, rows))
            known = specs.setdefault(slot.leaf.path, spec)
            if known.dtype != spec.dtype:
                raise ValueError(
                    f"{slot.name} is {spec.dtype}, but other layers of {slot.leaf.path} are {known.dtype}: "
                    "one array holds them all, say --dtype"
                )
        self._writer = ArrayWriter(path, specs)

    def put(self, slot: Slot, start: int, stop: int, rows: Rows) -> None:
        if slot.leaf.transposed:
            strip = STRIP if self._source.band(slot) is None else stop - start
            matrix = turned(rows, start, stop, slot.cols, self._dtype_of(slot), strip)
            values = matrix.reshape(slot.box_shape(start, stop))
        else:
            values = rows(start, stop)
        self._writer.write(slot.leaf.path, slot.box(start, stop), values)

    def close(self) -> None:
        self._writer.close()


def _chunk(leaf: Leaf, rows: int) -> tuple[int, ...]:
    """One layer, one expert, one half, and `rows` hub rows."""
    shape = [1 if i < leaf.stacked or leaf.axes[i] == "2" else n for i, n in enumerate(leaf.shape)]
    shape[leaf.rows_axis] = -(-rows // leaf.row_step)
    return tuple(shape)


def is_training_checkpoint(path: Path) -> bool:
    """One step of a training run: {state, dataset, meta}."""
    return (path / "state").is_dir() and (path / "meta").is_dir()


def is_orbax(path: Path) -> bool:
    """Whether `path` means to be an Orbax model directory or a training checkpoint, whole or not."""
    return (path / PARAMS).is_dir() or is_training_checkpoint(path) or (path / "_CHECKPOINT_METADATA").is_file()


def _training_config(root: Path, reader: ArrayReader) -> MixtralConfig:
    meta = training_meta(root)
    shape = meta.get("config", {}).get("model")
    if not isinstance(shape, dict):
        raise ValueError(f"{root}/meta holds no config.model: it is no checkpoint of a training run of this package")
    if not any(name.startswith(f"{PARAMS}.layers.attention.query") for name in reader.names):
        raise ValueError(f"{root} holds no whole model (adapters only?): merge them first with convert merge-lora")
    return MixtralConfig(**shape)


def training_meta(root: Path) -> dict[str, Any]:
    """What a training run noted beside the state: step and configuration."""
    try:
        return checkpoint.read_item(root, "meta")
    except Exception as error:  # whatever Orbax makes of a broken file
        raise ValueError(f"{root}/meta cannot be read ({type(error).__name__}): the checkpoint is incomplete") from None
