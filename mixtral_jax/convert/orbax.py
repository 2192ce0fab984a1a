"""Orbax checkpoints as slots, in and out: our model directories, and the checkpoints of training runs."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from etils import epath
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mixtral_jax import checkpoint
from mixtral_jax.checkpoint import HELD, PIECE, ArrayReader, ArraySpec, ArrayWriter, piece_shape
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory, PathLike
from mixtral_jax.convert.hf import read_config, read_shape
from mixtral_jax.convert.stream import DtypeOf, NativeSource, ReadRows, Source, bands
from mixtral_jax.convert.table import Leaf, Slot, check_arrays, leaves, slots
from mixtral_jax.lora import is_adapter

PARAMS = "params"  # the checkpoint inside a model directory; also the key of the parameters inside a training state
KEPT = ("tokenizer", "about.json")  # in a run's directory, beside the files: which of them is read, the chat format
STRIP = 8  # rows transposed at a time: what is read is still in the cache when it is turned


class OrbaxArrays(NativeSource):
    """The leaves of an Orbax checkpoint of ours as slots. Subclasses say which leaves there must be.

    `training`: it is one step of a training run, whose parameters are a part of the state.
    """

    def __init__(self, path: PathLike) -> None:
        self.directory = Directory(path)
        root = self.directory.local
        self.training = is_training_checkpoint(root)
        self._prefix = f"{PARAMS}." if self.training else ""
        self._reader = ArrayReader(root if self.training else root / PARAMS)
        self.names = [n.removeprefix(self._prefix) for n in self._reader.names if n.startswith(self._prefix)]

    def match(self, wanted: Iterable[Leaf], described: str, ask: str) -> None:
        """These leaves are stored, and no others: see check_arrays."""
        expected = {leaf.path: leaf.shape for leaf in wanted}
        self._specs = {name: self._reader.spec(self._prefix + name) for name in expected if name in self.names}
        shapes = {name: self._specs[name].shape if name in self._specs else () for name in self.names}
        where = str(self.directory)
        check_arrays(expected, {name: (shape, where) for name, shape in shapes.items()}, where, described, ask)

    def hold(self, wanted: list[Slot], described: str, ask: str, at_once: int = 3) -> None:
        """These slots, if they match. `at_once`: leaves that are read in turn."""
        self.match((slot.leaf for slot in wanted), described, ask)
        self.slots = wanted
        shared = (self._shared(slot) for slot in wanted)
        self._reader.keep(min(HELD, at_once * max(size for size in (0, *shared) if size <= HELD)))

    def _shared(self, slot: Slot) -> int:
        """Bytes that lie together, of which several slots are cut; 0: they are of this slot alone."""
        grid = self.grid(slot)
        several = any(grid[axis] > 1 for axis in slot.leaf.single)
        return int(np.prod(grid)) * self.dtype(slot).itemsize if several else 0

    def dtype(self, slot: Slot) -> np.dtype:
        return self._specs[slot.leaf.path].dtype

    def band(self, slot: Slot) -> int | None:
        leaf, chunk = slot.leaf, self._specs[slot.leaf.path].chunk
        return min(slot.rows, chunk[leaf.rows_axis] * leaf.row_step)

    def cost(self, slot: Slot) -> int:
        spec = self._specs[slot.leaf.path]
        return super().cost(slot) + int(np.prod(spec.chunk)) * spec.dtype.itemsize

    def grid(self, slot: Slot) -> tuple[int, ...]:
        leaf, chunk = slot.leaf, self._specs[slot.leaf.path].chunk
        cut = {*leaf.single, leaf.rows_axis}
        return tuple(min(c, n) if axis in cut else n for axis, (c, n) in enumerate(zip(chunk, leaf.shape, strict=True)))

    def read_box(self, path: str, box: tuple[int | slice, ...]) -> np.ndarray:
        return self._reader.read(self._prefix + path, box)

    def template(self) -> Any:
        data = run_config(self.directory.local).get("data", {}) if self.training else {}
        if not data:
            return None
        return "auto" if data.get("examples") == "text" else data.get("template") or "auto"


class OrbaxSource(OrbaxArrays):
    """A model directory (config.json, params/) or one step of a training run, as slots. All checks are made here.

    Raises:
        ValueError: the directory is not ours, incomplete, or does not match its configuration.
    """

    def __init__(self, path: PathLike) -> None:
        super().__init__(path)
        if any(is_adapter(name) for name in self.names):
            raise ValueError(
                f"{path} holds the adapters of a LoRA run, no whole model: fold them into their base first "
                f"with convert merge-lora BASE MERGED --adapter {path}"
            )
        if self.training:
            shape = run_shape(path)
            if "layers.attention.query" not in self.names:
                raise ValueError(
                    f"{path} holds no whole model (adapters only?): merge them first with convert merge-lora"
                )
            own = shape.to_hf()  # but for tokens, of which the run knows by its tokenizer alone
            self.hf_config = {key: value for key, value in own.items() if not key.endswith("_token_id")}
        else:
            self.hf_config = read_config(self.directory)
        self.config = read_shape(self.hf_config, self.directory)
        told = "its config.json", "its configuration asks for {}"
        self.match(leaves(self.config), *told)  # before slots are made of it: it may ask for a billion
        self.hold(slots(self.config), *told)

    def side_files(self) -> Directory | None:
        """Beside the weights, or where the training run took the tokenizer from."""
        if not self.training:
            return self.directory
        named = self._named_tokenizer()
        if named is None:
            return None
        return Directory(named if os.path.isdir(named) else os.path.dirname(os.path.abspath(named)))

    def small_files(self) -> dict[str, bytes]:
        named = self._named_tokenizer() if self.training else str(self.directory)
        if named is None or os.path.isdir(named):
            return {} if named is None else super().small_files()
        content = Path(named).read_bytes()
        if not named.endswith(".json"):
            return {"tokenizer.model": content}
        beside = super().small_files()
        return {name: beside[name] for name in beside if ".model" not in name} | {"tokenizer.json": content}

    def _named_tokenizer(self) -> str | None:
        note = run_config(self.directory.local)
        named = note.get("data", {}).get("tokenizer")
        noted = Path(str(note.get("output_dir")), str(note.get("run_name")))
        for run in (self.directory.local.absolute().parents[1], noted):
            if (own := kept_tokenizer(run)) is not None:
                return str(own)
        if isinstance(named, str) and os.path.exists(named):
            return named
        if isinstance(named, str):
            print(f"the tokenizer {named} of the run {self.directory} is not there, nor in the copy", file=sys.stderr)
        return None


class OrbaxSink:
    """The `params` checkpoint of a new directory; its chunks hold several slots where one alone would be small."""

    def __init__(self, directory: Directory, source: Source, dtype_of: DtypeOf) -> None:
        specs: dict[str, ArraySpec] = {}
        self.slots, self._source, self._dtype_of = source.slots, source, dtype_of
        for slot in source.slots:
            rows = bands(slot, dtype_of(slot).itemsize, source.band(slot))
            spec = ArraySpec(slot.leaf.shape, dtype_of(slot), _chunk(slot, rows, dtype_of(slot).itemsize))
            known = specs.setdefault(slot.leaf.path, spec)
            if known.dtype != spec.dtype:
                raise ValueError(
                    f"{slot.name} is {spec.dtype}, but other layers of {slot.leaf.path} are {known.dtype}: "
                    "one array holds them all (hf2orbax casts them with --dtype)"
                )
        self._writer = ArrayWriter(directory.local / PARAMS, specs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._writer.close()

    def put(self, slot: Slot, start: int, stop: int, rows: ReadRows) -> None:
        if not slot.leaf.transposed:
            values = rows(start, stop)
        else:
            native = np.empty((slot.cols, stop - start), self._dtype_of(slot))
            strip = STRIP if self._source.band(slot) is None else stop - start
            for a in range(start, stop, strip):
                b = min(a + strip, stop)
                native[:, a - start : b - start] = rows(a, b).T
            values = slot.to_native(native.T)
        self._writer.write(slot.leaf.path, slot.box(start, stop), values)


def _chunk(slot: Slot, rows: int, itemsize: int) -> tuple[int, ...]:
    """A run of slots of the leaf, or of one slot as many times `rows` hub rows as make a piece."""
    leaf = slot.leaf
    chunk = list(piece_shape(leaf.shape, itemsize, leaf.single))
    if all(chunk[axis] == 1 for axis in leaf.single):
        times = -(-PIECE // (rows * slot.cols * itemsize))
        chunk[leaf.rows_axis] = min(-(-rows // leaf.row_step) * times, leaf.shape[leaf.rows_axis])
    return tuple(chunk)


def is_training_checkpoint(path: PathLike) -> bool:
    """Whether it is one step of a training run, {state, dataset, meta}, wherever it is."""
    try:
        root = epath.Path(path)
    except KeyError:  # a kind of URL that Orbax does not know
        return False
    return (root / "state").is_dir() and (root / "meta").is_dir()


def is_orbax(path: Path) -> bool:
    """Whether `path` means to be an Orbax model directory or a training checkpoint, whole or not."""
    return (path / PARAMS).is_dir() or is_training_checkpoint(path) or (path / "_CHECKPOINT_METADATA").is_file()


def newest_step(root: Path) -> Path:
    """The newest whole step of a run's directory; any other directory is itself."""
    directory = _checkpoints_of(root)
    steps = [p for p in directory.iterdir() if p.name.isdigit()] if directory.is_dir() else []
    whole = [p for p in steps if (p / checkpoint.COMMIT).is_file()]
    return max(whole, key=lambda p: int(p.name)) if whole else root


def _checkpoints_of(root: Path) -> Path:
    """Where a run keeps its checkpoints, by its config.yaml; any other directory is itself."""
    told: Any = None
    if not (root / "config.json").exists():  # a model directory may hold a config.yaml of others
        with contextlib.suppress(OSError, ValueError, YAMLError):
            told = YAML(typ="safe", pure=True).load((root / "config.yaml").read_text(encoding="utf-8"))
    section = told.get("checkpoint") if isinstance(told, dict) else None
    named = section.get("directory") if isinstance(section, dict) else None
    places = [Path(named)] if isinstance(named, str) else []
    return next((place for place in (*places, root / "checkpoints") if place.is_dir()), root)


def kept_tokenizer(run: Path) -> Path | None:
    """What to read of the copy of its tokenizer that a run's directory holds, if it does."""
    about = run.joinpath(*KEPT)
    try:
        return about.parent / json.loads(about.read_text())["read"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sibling(path: str, step: int | None) -> str:
    """Beside a step of a run the other one that is named, if it is there whole; else `path`."""
    parent, slash, name = path.rpartition("/")
    other = f"{parent}{slash}{step}"
    return other if name.isdigit() and (epath.Path(other) / checkpoint.COMMIT).exists() else path


def run_config(root: PathLike) -> dict[str, Any]:
    """The configuration that a training run noted beside the state of a step."""
    return run_notes(root).get("config", {})


def run_shape(root: PathLike) -> MixtralConfig:
    """The model that a training run noted there; raises ValueError where it did not."""
    shape = run_config(root).get("model")
    if not isinstance(shape, dict):
        raise ValueError(f"{root}/meta holds no config.model: it is no checkpoint of a training run of this package")
    return MixtralConfig(**shape)


def run_notes(root: PathLike) -> dict[str, Any]:
    """All that it noted there: its configuration, and which weights it stands on."""
    try:
        return dict(checkpoint.read_item(root, "meta"))
    except Exception as error:  # whatever Orbax makes of a broken file
        raise ValueError(f"{root}/meta cannot be read ({type(error).__name__}): the checkpoint is incomplete") from None
