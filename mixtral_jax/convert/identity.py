"""Which weights are these? One digest of their values: of files in every format, of arrays on every mesh.

A value is mixed with its place in its leaf, and the mixtures of a leaf are added up. As the order of a sum does not
matter, every block of a file and every shard of an array adds its own, and nothing is ever held as a whole.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from mixtral_jax.convert.stream import Source, bands
from mixtral_jax.convert.table import Slot

WHOLE = 1 << 29  # parameters up to which every value of files counts; training moves all of a larger model's matrices
_RUN = 1 << 16  # values that stay in a core's cache while they are mixed
# odd numbers: what a step along each axis adds to a value's place, and what mixes
_STEPS = tuple(
    map(np.uint32, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09))
)
_FIRST, _SECOND, _THIRD = map(np.uint32, (0x7FEB352D, 0x846CA68B, 0xAC4C1B51))
_KIND = "w"  # begins a digest of this kind; an earlier version's cannot be compared


def weights_identity(source: Source) -> str:
    """Of the values rounded to bfloat16, so that a copy of the same weights in another precision is the same."""
    leaves: dict[str, list[Slot]] = {}
    for slot in sorted(source.slots, key=lambda slot: slot.name):
        leaves.setdefault(slot.leaf.path, []).append(slot)
    sums = []
    for path, own in leaves.items():
        # of a large one the first, the middle and the last of all layers and experts
        some = {0, len(own) // 2, len(own) - 1} if source.config.num_params() > WHOLE else range(len(own))
        total = sum((_slot_sums(source, own[i]) for i in sorted(some)), np.zeros(2, np.uint32))
        sums.append((path, own[0].leaf.shape, total))
    return _named(sums)


def arrays_identity(tree: Any) -> str:
    """Of every bit of arrays as fp32, computed where they lie; of values that bfloat16 holds what their files have."""
    leaves = flatten_dict(tree, sep=".")
    sums = jax.device_get(_array_sums(leaves))
    return _named((path, leaf.shape, sums[path]) for path, leaf in leaves.items())


def can_be_compared(noted: Mapping[str, Any]) -> bool:
    """Whether a run noted a digest of its base, of the kind that is made now."""
    return (noted.get("digest") or "").startswith(_KIND)


def check_identity(noted: Mapping[str, Any] | None, source: Source, where: str) -> None:
    """Raises: ValueError where the weights at `where` are not those that a run noted as its base."""
    if noted and can_be_compared(noted) and noted["digest"] != (found := weights_identity(source)):
        step = "" if noted.get("step") is None else f" at step {noted['step']}"
        raise ValueError(
            f"{where} holds weights with digest {found}, but the run stands on those of {noted['path']}{step} with "
            f"digest {noted['digest']}: name a copy of these, or train anew under another run_name"
        )


def _named(sums: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    lines = sorted([path, list(shape), *(int(s) for s in total)] for path, shape, total in sums)
    return _KIND + hashlib.blake2b(json.dumps(lines).encode(), digest_size=12).hexdigest()[1:]


def _mixed(bits: Any, place: Any) -> tuple[Any, Any]:
    """Two numbers for each value, uint32, in numpy or in jax."""
    mixed = bits ^ place
    mixed = (mixed ^ (mixed >> np.uint32(16))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint32(15))) * _SECOND
    mixed = mixed ^ (mixed >> np.uint32(16))
    other = mixed * _THIRD
    return mixed, other ^ (other >> np.uint32(15))


def _slot_sums(source: Source, slot: Slot) -> np.ndarray:
    rows, columns = _places(slot)
    step, total = bands(slot, source.dtype(slot).itemsize, source.band(slot)), np.zeros(2, np.uint32)
    for start in range(0, slot.rows, step):
        stop = min(start + step, slot.rows)
        block = np.asarray(source.read(slot, start, stop)).astype(ml_dtypes.bfloat16, copy=False)
        bits = block.view(np.uint16).reshape(stop - start, slot.cols)
        for first in range(0, stop - start, run := max(1, _RUN // slot.cols)):
            some = bits[first : first + run].astype(np.uint32) << np.uint32(16)  # as fp32
            lanes = _mixed(some, rows[start + first :][: len(some), None] + columns)
            total += np.array([np.sum(lane, dtype=np.uint32) for lane in lanes])
    return total


def _places(slot: Slot) -> tuple[np.ndarray, np.ndarray]:
    """What each hub row and each hub column adds to the place of a value in the leaf."""
    leaf, box = slot.leaf, slot.box(0, slot.rows)
    first = np.uint32(sum(i * int(_STEPS[axis]) for axis, i in enumerate(box) if isinstance(i, int)) % (1 << 32))
    last = leaf.rows_axis + (2 if leaf.row_step > 1 else 1)

    def added(axes: list[int]) -> np.ndarray:
        own = [np.arange(leaf.shape[axis], dtype=np.uint32) * _STEPS[axis] for axis in axes]
        return reduce(lambda a, b: np.add.outer(a, b).reshape(-1), own, np.zeros(1, np.uint32))

    within = [axis for axis, i in enumerate(box) if isinstance(i, slice)]
    rows = [axis for axis in within if leaf.rows_axis <= axis < last]
    return first + added(rows), added([axis for axis in within if axis not in rows])


@jax.jit
def _array_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def sums(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        steps = (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * _STEPS[axis] for axis in range(x.ndim))
        lanes = _mixed(bits, sum(steps, jnp.zeros_like(bits)))
        zeros = (np.uint32(0), np.uint32(0))
        return jnp.stack(jax.lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim))))

    return {path: sums(x) for path, x in leaves.items()}
