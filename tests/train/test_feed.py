"""Host rows into global arrays, and which rows a process reads."""

import jax
import numpy as np
from jax.sharding import Mesh

from mixtral_jax.parallel.mesh import MESH_AXES
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


def test_feed_counts_the_time_spent_waiting_for_data():
    feed = Feed(iter([np.ones(2), np.zeros(2)]), lambda batch: batch + 1)
    np.testing.assert_array_equal(next(feed), [2, 2])
    before = feed.waited
    assert before > 0
    np.testing.assert_array_equal(next(feed), [1, 1])
    assert feed.waited > before
