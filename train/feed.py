"""Host batches into global device arrays, one ahead of the step."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mixtral_jax.parallel import batch_sharding


def batch_share(mesh: jax.sharding.Mesh | None, rows: int) -> tuple[int, int]:
    """(i, n): this process reads the i-th contiguous n-th of the rows of every micro-batch.

    With tensor or context axes across processes several processes read the same rows.

    Raises:
        ValueError: its devices hold no such share.
    """
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    sharding = batch_sharding(mesh, leading=0)
    assert sharding is not None
    length = mesh.shape["context"]
    indices = sharding.addressable_devices_indices_map((rows, length)).values()
    slices = {index[0].indices(rows)[:2] for index in indices if index is not None}
    first, end = min(s for s, _ in slices), max(e for _, e in slices)
    if sum(e - s for s, e in slices) != end - first or first % (end - first):
        raise ValueError(
            f"the mesh gives process {jax.process_index()} rows that are not one contiguous share of the batch: with "
            "mesh.dcn_fsdp above 1 make mesh.data 1, or say mesh.dcn_data instead; else choose sizes that divide the "
            "devices of a process, or are multiples of them"
        )
    return first // (end - first), rows // (end - first)


def make_put(mesh: jax.sharding.Mesh | None, share: tuple[int, int]) -> Callable[[Any], Any]:
    """A function from a host batch, whose leaves are (A, b / n, ...), to device arrays (A, b, ...) over the mesh."""
    sharding = batch_sharding(mesh, leading=1)
    if sharding is None:
        return lambda batch: jax.tree.map(jax.numpy.asarray, batch)
    per_row = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:2]))

    def put_leaf(local: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
        shape = (local.shape[0], local.shape[1] * share[1], *local.shape[2:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    def put(batch: Any) -> Any:
        """Positions are shared over context; the numbers of a pair, which no sequence axis has, are not."""
        length = batch.tokens.shape
        return jax.tree.map(lambda x: put_leaf(x, sharding if x.shape == length else per_row), batch)

    return put


class Feed:
    """Batches on the devices. Asked for the next batch while a step runs, it hides the way there."""

    def __init__(self, batches: Iterator[Any], put: Callable[[Any], Any]):
        self._batches, self._put = batches, put
        self.waited = 0.0  # seconds spent waiting for the loader, in all
        self._refused: OSError | None = None

    def ahead(self) -> Any | None:
        """The next batch, while a step runs; None where it cannot be read: who asks for it behind the step is told."""
        try:
            return next(self)
        except OSError as error:
            self._refused = error
            return None

    def __next__(self) -> Any:
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise error
        start = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - start
        return self._put(batch)
