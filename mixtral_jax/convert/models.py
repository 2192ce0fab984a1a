"""A checkpoint of any kind as a model, and a model as a Hugging Face directory."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.convert.files import Directory, PathLike
from mixtral_jax.convert.hf import read_config, read_shape
from mixtral_jax.convert.mistral import is_mistral
from mixtral_jax.convert.orbax import is_training_checkpoint, newest_step, run_shape
from mixtral_jax.convert.parts import edges, place
from mixtral_jax.convert.pipeline import SHARD, open_source, write_hf
from mixtral_jax.convert.stream import NativeSource, Source
from mixtral_jax.convert.table import Leaf, Slot, leaves, slots
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.parallel import param_shardings


def load(
    path: PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 - frozen
) -> Mixtral:
    """The model at `path`: an Orbax model directory, a step of a training run, or a Hugging Face directory.

    Args:
        mesh: where the parameters are placed, by the rules of mixtral_jax.parallel; each process reads only the parts
            of its own devices, and each part once. None: the default device.
        dtype: of the parameters in memory; None keeps each one's dtype on disk.
        compute: how the maths is carried out.

    Raises:
        ValueError: the checkpoint is not whole, not supported, or does not match its configuration.
        FileNotFoundError: there is nothing at `path`.
    """
    source = open_source(path)
    abstract = abstract_model(source.config, compute)
    shardings = flatten_dict(param_shardings(abstract, mesh) or {}, sep=".")
    placed = {leaf.path: place_leaf(source, leaf, shardings.get(leaf.path), dtype) for leaf in leaves(source.config)}
    return nnx.merge(nnx.graphdef(abstract), unflatten_dict(placed, sep="."))


def load_config(path: PathLike) -> MixtralConfig:
    """The shape of the model at `path`, by what it says of itself: no weight is looked at, so it may be anywhere.

    Raises:
        ValueError, FileNotFoundError: it says nothing of a model; there is nothing.
    """
    directory = Directory(path)
    root = path if directory.remote else newest_step(directory.local)
    if is_training_checkpoint(root):
        return run_shape(root)
    if "config.json" in directory.names() and not is_mistral(directory):
        return read_shape(read_config(directory), directory)
    return open_source(path).config


def place_leaf(source: Source, leaf: Leaf, sharding: Any, dtype: Any = None) -> jax.Array:
    """One parameter on devices (None: the default one); each process reads only the parts of its own, each once."""
    stored = next(slot for slot in source.slots if slot.leaf.path == leaf.path)
    kind = np.dtype(dtype or source.dtype(stored))
    places = {None: (slice(None),) * len(leaf.shape)}
    if sharding is not None:
        places = sharding.addressable_devices_indices_map(leaf.shape)
    boxes = {device: edges(index, leaf.shape) for device, index in places.items()}
    out = jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)
    return place(source, leaf, boxes, [out], lambda values, at: [(values.astype(kind, copy=False), at)])[0]


def save_hf(
    model: Mixtral,
    directory: PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = SHARD,
    force: bool = False,
    tokenizer: Any = None,
    template: Any = None,
) -> None:
    """Write a model as a Hugging Face directory, in the dtype of its parameters unless `dtype` says otherwise.

    Args:
        tokenizer: written beside it for transformers: one from `load_tokenizer`, or its path.
        template: its chat template, by name or description.

    Raises:
        FileExistsError: the directory exists and `force` is not set.
        ValueError: too little disk space, an unknown dtype, parameters without a place in that format (adapters), or a
            tokenizer with more pieces than the model has rows.
    """
    small: Mapping[str, bytes] = {}
    if tokenizer is not None:
        import mixtral_jax  # its front door: tokenizers belong to another room

        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = mixtral_jax.load_tokenizer(os.fspath(tokenizer))
        if tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"{tokenizer.vocab_size} pieces, the model knows {model.config.vocab_size}"
            raise ValueError(f"the tokenizer has {sizes}: resize the vocabulary first")
        small = mixtral_jax.tokenizer_files(tokenizer, template)
    write_hf(
        ModelSource(model), directory, dtype=dtype, max_shard_size=max_shard_size, small=small, force=force,
        progress=False,
    )  # fmt: skip


class ModelSource(NativeSource):
    """A model in memory as slots.

    Raises:
        ValueError: it holds what the hub has no place for: adapters, a quantised base.
    """

    def __init__(self, model: Mixtral) -> None:
        self.config = model.config
        self.slots = slots(model.config)
        self._params = flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep=".")
        if homeless := sorted(self._params.keys() - {slot.leaf.path for slot in self.slots}):
            shown = ", ".join(homeless[:8]) + (", ..." if len(homeless) > 8 else "")
            raise ValueError(
                f"a Hugging Face directory has no place for {len(homeless)} parameters of the model: {shown}"
            )

    def dtype(self, slot: Slot) -> np.dtype:
        return np.dtype(self._params[slot.leaf.path].dtype)

    def band(self, slot: Slot) -> int | None:
        return slot.rows

    def read_box(self, path: str, box: tuple[int | slice, ...]) -> np.ndarray:
        return np.asarray(self._params[path][box])
