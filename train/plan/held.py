"""What one device really holds of the weights, counted matrix by matrix."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from mixtral_jax.config import MixtralConfig
from mixtral_jax.lora import LoraConfig
from mixtral_jax.model import abstract_model
from mixtral_jax.parallel.sharding import param_spec
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.weights import is_trained


def held_by_device(config: RunConfig, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(trained parameters, bytes of the frozen base under adapters as it is held) on one device of a mesh.

    Raises:
        ValueError: an axis does not divide a parameter; named with a remedy.
    """
    wanted = is_trained(config)
    matrices = _matrices(config.model, config.adapters)
    trained = sum(_own_size(m, sizes) for m in matrices if wanted(m.path))
    return trained, sum(_own_size(m, sizes) * m.itemsize for m in matrices if not wanted(m.path))


def copied_by_device(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Bytes of a reference's own copy of the weights, held as the run holds them, on one device of a mesh."""
    base = config.adapters and config.adapters.base_only
    return sum(_own_size(matrix, sizes) * matrix.itemsize for matrix in _matrices(config.model, base))


class _Matrix(NamedTuple):
    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int


@functools.cache
def _matrices(model: MixtralConfig, lora: LoraConfig | None) -> tuple[_Matrix, ...]:
    _, state = nnx.split(abstract_model(model, lora=lora))
    return tuple(
        _Matrix(".".join(map(str, keys)), tuple(leaf.get_metadata()["axes"]), leaf.shape, leaf.dtype.itemsize)
        for keys, leaf in nnx.to_flat_state(state)
    )


def _own_size(matrix: _Matrix, sizes: Mapping[str, int]) -> int:
    """Elements of a device's own shard."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    spec = param_spec(matrix.axes, matrix.shape, sizes, matrix.path)
    return math.prod(NamedSharding(mesh, spec).shard_shape(matrix.shape))
