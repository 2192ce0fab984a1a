"""The frozen base under adapters, read straight into the form in which it is held: bfloat16, or int8 and nf4 in blocks.

A quantised matrix is read, quantised on the device and put in its place one layer and one expert at a time, so the
base is never in memory as a whole in a wider form, neither on the host nor on the devices.
"""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from mixtral_jax.convert.load import place_leaf, read_leaf
from mixtral_jax.convert.pipeline import open_source
from mixtral_jax.convert.stream import Source
from mixtral_jax.convert.table import Leaf, leaves, nest
from mixtral_jax.model import Mixtral
from mixtral_jax.quantize import QuantizedWeight, quantize
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.state import check_same_leaves

Tree = Any  # nested dict with a leaf for each parameter


def quantized_weights(model: Mixtral) -> dict[str, QuantizedWeight]:
    """The quantised matrices of a model by their dotted path."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedWeight)
    }


def read_quantized(path: str, model: Mixtral, wanted: Mapping[str, Any]) -> Tree:
    """The base at `path`, of any format, in the form of the abstract model `model`.

    `wanted`: a placed ShapeDtypeStruct for each leaf of the base, by its dotted path.

    Raises:
        UserError: there is no whole model at `path`, or one of another shape.
    """
    try:
        source = open_source(path)
        check_same_leaves(source, {leaf.path: leaf.shape for leaf in leaves(model.config)}, path)
    except ValueError as error:
        raise UserError(f"init_from: {error}") from error
    held, placed = quantized_weights(model), {}
    for leaf in leaves(source.config):
        if leaf.path not in held:
            own = wanted[leaf.path]
            placed[leaf.path] = place_leaf(source, leaf, own.sharding, np.dtype(own.dtype))
            continue
        names = (f"{leaf.path}.codes", f"{leaf.path}.scales")
        values = _place_blocks(source, leaf, held[leaf.path], *(wanted[name] for name in names))
        placed |= dict(zip(names, values, strict=True))
    return nest(placed)


def _place_blocks(
    source: Source, leaf: Leaf, held: QuantizedWeight, codes: Any, scales: Any
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of one stacked matrix, each device's part made from that part of the weights alone."""
    axis = len(leaf.shape) + held.from_end
    size = leaf.shape[axis] // scales.shape[axis]
    run = jax.jit(partial(quantize, axis=axis, block=size, bits=held.bits))
    made: dict[Any, list[np.ndarray]] = {}
    parts: list[list[jax.Array]] = [[], []]
    for device, index in codes.sharding.addressable_devices_indices_map(codes.shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, codes.shape, strict=True))
        if key not in made:
            ranges = [*key[: axis + 1], *key[axis + 2 :]]  # of the weights: whole blocks
            ranges[axis] = (ranges[axis][0] * size, ranges[axis][1] * size)
            made[key] = _quantized_part(source, leaf, ranges, run)
        for own, value in zip(parts, made[key], strict=True):
            own.append(jax.device_put(value, device))
    first, second = (
        jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, own)
        for whole, own in zip((codes, scales), parts, strict=True)
    )
    return first, second


def _quantized_part(source: Source, leaf: Leaf, ranges: list[tuple[int, int]], run: Any) -> list[np.ndarray]:
    """Codes and scales of a box of the weights, one layer and one expert at a time."""
    stacked = 2 if leaf.path.startswith("layers.moe") else 1
    inner = tuple(slice(*edge) for edge in ranges[stacked:])
    lengths = [stop - start for start, stop in ranges[:stacked]]
    parts: list[np.ndarray] | None = None
    for place in itertools.product(*(range(n) for n in lengths)):
        at = tuple(slice(start + i, start + i + 1) for i, (start, _) in zip(place, ranges, strict=False))
        values = [np.asarray(value) for value in run(read_leaf(source, leaf, (*at, *inner), np.float32))]
        if parts is None:
            parts = [np.empty((*lengths, *value.shape[stacked:]), value.dtype) for value in values]
        for part, value in zip(parts, values, strict=True):
            part[place] = value.reshape(part.shape[stacked:])
    assert parts is not None
    return parts
