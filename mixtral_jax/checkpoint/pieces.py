"""In which pieces arrays lie on disk: 16 MB or more, and what a reader of one layer wants in few of them.

Orbax (seen with 0.12.8) cuts an axis in ones or by bytes along the largest one, never in runs: the private function
that chooses is replaced for leaves that ask for it with `Runs`. The others, and whoever else uses Orbax, see no change.
"""

import math
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint._src.arrays import subchunking

PIECE = 16 << 20  # bytes of a piece, at least, where the array has as many
HELD = 512 << 20  # bytes, at most, that lie together on all devices where one layer or expert alone is no piece


class Runs(tuple[int, ...]):
    """Axes to be cut by `piece_shape`, for shard_axes of Orbax's storage options."""


def piece_shape(
    part: Sequence[int], itemsize: int, axes: Sequence[int], whole: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Shape of the pieces of an array, or of a device's part of the `whole`, cut along `axes`, the first of them first.

    An axis is cut in ones where that leaves PIECE bytes, so that the next one is cut too; else in equal runs that have
    them, unless that is more than HELD on all devices or, for want of divisors, 4 PIECE.
    """
    piece, together = list(part), list(whole or part)
    for axis in axes:
        own, all_own = (math.prod(n) // n[axis] * itemsize for n in (piece, together))  # bytes of one index
        runs = [run for run in range(1, part[axis] + 1) if part[axis] % run == 0]
        wanted = next((run for run in runs if run * own >= PIECE), part[axis])
        if wanted * own > 4 * PIECE:  # few divisors: rather a little less
            wanted = max(run for run in runs if run == 1 or run * own <= 4 * PIECE)
        piece[axis] = together[axis] = max(run for run in runs if run == 1 or (run <= wanted and run * all_own <= HELD))
        if piece[axis] > 1:
            break
    return tuple(piece)


_by_bytes = subchunking.choose_chunk_shape


def _choose(whole: Any, part: Any, dtype: Any, target: int | None, *, shard_axes: Sequence[int] = ()) -> Any:
    if isinstance(shard_axes, Runs):
        return piece_shape([max(1, n) for n in part], dtype.itemsize, shard_axes, whole)
    return _by_bytes(whole, part, dtype, target, shard_axes=tuple(shard_axes))


subchunking.choose_chunk_shape = _choose
