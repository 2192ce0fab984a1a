"""Host batches into global device arrays, one ahead of the step."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mixtral_jax.sharding import batch_sharding


def batch_share(mesh: jax.sharding.Mesh | None, rows: int) -> tuple[int, int]:
    """(i, n): this process reads the i-th contiguous n-th of the rows of every micro-batch.

    With tensor or context axes across processes several processes read the same rows.
    """
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    sharding = batch_sharding(mesh, leading=0)
    assert sharding is not None
    length = mesh.shape["context"]
    indices = sharding.addressable_devices_indices_map((rows, length)).values()
    slices = {index[0].indices(rows)[:2] for index in indices if index is not None}
    first, end = min(s for s, _ in slices), max(e for _, e in slices)
    if sum(e - s for s, e in slices) != end - first:
        raise ValueError(
            f"the mesh gives process {jax.process_index()} rows that are not contiguous: put data, fsdp and expert "
            "outside tensor and context"
        )
    return first // (end - first), rows // (end - first)


def make_put(mesh: jax.sharding.Mesh | None, share: tuple[int, int]) -> Callable[[Any], Any]:
    """A function from a host batch, whose leaves are (A, b / n, T), to device arrays (A, b, T) over the mesh."""
    sharding = batch_sharding(mesh, leading=1)
    if sharding is None:
        return lambda batch: jax.tree.map(jax.numpy.asarray, batch)
    index, count = share

    def put_leaf(local: np.ndarray) -> jax.Array:
        offset = index * local.shape[1]
        shape = (local.shape[0], local.shape[1] * count, *local.shape[2:])

        def piece(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None
            start, stop, _ = where[1].indices(shape[1])
            return local[where[0], start - offset : stop - offset, *where[2:]]

        return jax.make_array_from_callback(shape, sharding, piece)

    return lambda batch: jax.tree.map(put_leaf, batch)


class Feed:
    """Batches on the devices. Asked for the next batch while a step runs, it hides the way there."""

    def __init__(self, batches: Iterator[Any], put: Callable[[Any], Any]):
        self._batches, self._put = batches, put
        self.waited = 0.0  # seconds spent waiting for the loader, in all

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - start
        return self._put(batch)
