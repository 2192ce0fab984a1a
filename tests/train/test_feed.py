"""Host rows into global arrays, and which rows a process reads."""

import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import batch_sharding
from mixtral_jax.train.feed import Feed, batch_share, make_put
from tests.tiny import random_batch


def test_rows_reach_the_mesh_unchanged_and_sharded():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 1, 1, 2), MESH_AXES)
    assert batch_share(mesh, 8) == (0, 1)  # one process reads every row
    batch = random_batch((2, 8, 16))
    placed = make_put(mesh, (0, 1))(batch)
    assert placed.tokens.sharding.shard_shape((2, 8, 16)) == (2, 2, 8)  # data x fsdp share rows, context the length
    for host, device in zip(batch, placed, strict=True):
        np.testing.assert_array_equal(host, np.asarray(device))


def share_of(devices, mesh, rows, monkeypatch):
    """batch_share in a process that has these devices, and the rows that they hold."""
    with monkeypatch.context() as patch:
        whole = NamedSharding.devices_indices_map
        own = lambda self, shape: {d: i for d, i in whole(self, shape).items() if d in devices}  # noqa: E731 - shorter
        patch.setattr(NamedSharding, "addressable_devices_indices_map", own)
        patch.setattr(jax, "process_count", lambda: 2)
        held = own(batch_sharding(mesh, leading=0), (rows, 16)).values()
        return batch_share(mesh, rows), {row for where in held for row in range(rows)[where[0]]}


@pytest.mark.parametrize("each", [1, 2, 4])
def test_a_process_reads_the_rows_of_its_devices_on_every_mesh(each, monkeypatch):
    for sizes in itertools.product([1, 2, 4, 8], repeat=5):
        if math.prod(sizes) != 8:
            continue
        mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))))
        for first in range(0, 8, each):
            (index, count), rows = share_of(jax.devices()[first : first + each], mesh, 16, monkeypatch)
            assert sorted(rows) == list(range(16))[16 // count * index :][: 16 // count], sizes


@pytest.mark.parametrize("devices", [[0, 3], [1, 2]])  # apart, and together but not from a multiple of their number on
def test_rows_that_are_no_share_are_refused(devices, monkeypatch):
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with pytest.raises(ValueError, match="rows that are not one contiguous"):
        share_of([jax.devices()[2 * i] for i in devices], mesh, 16, monkeypatch)


def test_feed_counts_the_time_spent_waiting_for_data():
    feed = Feed(iter([np.ones(2), np.zeros(2)]), lambda batch: batch + 1)
    np.testing.assert_array_equal(next(feed), [2, 2])
    before = feed.waited
    assert before > 0
    np.testing.assert_array_equal(next(feed), [1, 1])
    assert feed.waited > before
