"""A checkpoint of any kind as a model, and a model as a Hugging Face directory."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.convert.hf import parse_size
from mixtral_jax.convert.orbax import OrbaxSource
from mixtral_jax.convert.pipeline import open_source, write_hf
from mixtral_jax.convert.stream import Source, blocked_transpose
from mixtral_jax.convert.table import Leaf, Slot, leaves, nest, slots
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.parallel.sharding import param_shardings

Index = tuple[slice, ...]
_READERS = 4


def load(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: Any = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 - frozen
) -> Mixtral:
    """The model at `path`: an Orbax model directory, a step of a training run, or a Hugging Face directory.

    Args:
        mesh: where the parameters are placed, by the rules of mixtral_jax.sharding; each process reads only the parts
            of its own devices. None: the default device.
        dtype: of the parameters in memory; None keeps each one's dtype on disk.
        compute: how the maths is carried out.

    Raises:
        ValueError: the checkpoint is not whole, not supported, or does not match its configuration.
        FileNotFoundError: there is nothing at `path`.
    """
    source = open_source(path)
    abstract = abstract_model(source.config, compute)
    params = place_params(source, param_shardings(abstract, mesh), dtype)
    graphdef, _ = nnx.split(abstract)
    return nnx.merge(graphdef, params)


def load_config(path: str | os.PathLike[str]) -> MixtralConfig:
    """The shape of the model at `path`; the checkpoint is checked, no weight is read."""
    return open_source(path).config


def load_params(path: str | os.PathLike[str], dtype: Any = None) -> dict[str, Any]:
    """The parameters of any checkpoint as a nested dict of numpy arrays, the native tree.

    `dtype` (a numpy dtype) casts every leaf; None keeps the dtype on disk. Holds the whole model in memory.
    """
    source = open_source(path)
    return nest({leaf.path: read_leaf(source, leaf, dtype=dtype) for leaf in leaves(source.config)})


def place_params(source: Source, shardings: dict[str, Any] | None, dtype: Any = None) -> dict[str, Any]:
    """The parameters of a source on devices: `shardings` is a nested dict like the result, None the default device."""
    placed: dict[str, jax.Array] = {}
    for leaf in leaves(source.config):
        if shardings is None:
            placed[leaf.path] = jnp.asarray(read_leaf(source, leaf, dtype=dtype))
            continue
        sharding: Any = shardings
        for key in leaf.path.split("."):
            sharding = sharding[key]
        placed[leaf.path] = place_leaf(source, leaf, sharding, dtype)
    return nest(placed)


def place_leaf(source: Source, leaf: Leaf, sharding: Any, dtype: Any = None) -> jax.Array:
    """One parameter on devices; each process reads only the parts of its own."""
    read = functools.partial(read_leaf, source, leaf, dtype=dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def read_leaf(source: Source, leaf: Leaf, index: Index | None = None, dtype: Any = None) -> np.ndarray:
    """The part of a native leaf that `index` (one slice an axis) selects; None: all of it."""
    ranges = [range(*s.indices(n)) for s, n in zip(index or (slice(None),) * len(leaf.shape), leaf.shape, strict=True)]
    own = [slot for slot in source.slots if slot.leaf.path == leaf.path]
    stored = source.dtype(own[0])
    if isinstance(source, OrbaxSource):
        part = source.read_box(leaf.path, tuple(slice(r.start, r.stop) for r in ranges))
        return part.astype(dtype or stored, copy=False)
    out = np.empty([len(r) for r in ranges], dtype or stored)
    start, stop = (edge * leaf.row_step for edge in (ranges[leaf.rows_axis].start, ranges[leaf.rows_axis].stop))

    def fill(slot: Slot) -> None:
        box = slot.box(start, stop)
        if any(isinstance(i, int) and i not in r for i, r in zip(box, ranges, strict=True)):
            return
        block = slot.to_native(source.read(slot, start, stop))
        # The rows were read as asked; the other axes that the block still has are cut here.
        inner = tuple(
            slice(None) if axis == leaf.rows_axis else slice(r.start, r.stop)
            for axis, (i, r) in enumerate(zip(box, ranges, strict=True))
            if not isinstance(i, int)
        )
        outer = tuple(i - r.start if isinstance(i, int) else slice(None) for i, r in zip(box, ranges, strict=True))
        out[outer] = block[inner]

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, own))
    return out


def save_hf(
    model: Mixtral,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    force: bool = False,
) -> None:
    """Write a model as a Hugging Face directory, in the dtype of its parameters unless `dtype` says otherwise.

    Raises:
        FileExistsError: the directory exists and `force` is not set.
        ValueError: too little disk space, or an unknown dtype.
    """
    source = ModelSource(model)
    write_hf(source, directory, dtype=dtype, shard_bytes=parse_size(max_shard_size), force=force, progress=False)


class ModelSource:
    """A model in memory as slots."""

    directory = None

    def __init__(self, model: Mixtral) -> None:
        self.config = model.config
        self.hf_config: dict[str, Any] = {}
        self.slots = slots(model.config)
        params = nnx.to_pure_dict(nnx.state(model))
        self._leaves: dict[str, jax.Array] = {}
        for leaf in leaves(model.config):
            value: Any = params
            for key in leaf.path.split("."):
                value = value[key]
            self._leaves[leaf.path] = value

    def dtype(self, slot: Slot) -> np.dtype:
        return np.dtype(self._leaves[slot.leaf.path].dtype)

    def band(self, slot: Slot) -> int | None:
        return slot.rows

    def cost(self, slot: Slot) -> int:
        return 2 * slot.rows * slot.cols * self.dtype(slot).itemsize

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        box = np.asarray(self._leaves[slot.leaf.path][slot.box(start, stop)])
        return blocked_transpose(box.reshape(slot.cols, -1)) if slot.leaf.transposed else box
