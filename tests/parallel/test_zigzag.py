"""Sequence parallelism: the zig-zag order is a permutation that shares the work evenly, and changes no number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import ComputeConfig
from mixtral_jax.kernels.attention_tiled import Tokens, chunked_attention, part_bounds, tile
from mixtral_jax.model import abstract_model, next_token_sums, target_logps
from mixtral_jax.parallel.context import Part, gather_row, places, spread, unspread, zigzag
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import batch_sharding, param_shardings
from tests.mesh_cases import CONFIG, FAST_TO_COMPILE, make_batches, make_params
from tests.oracles.attention import attention, mask_matrix


def test_the_order_written_out():
    assert zigzag(8, 1).tolist() == list(range(8))
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_device_has_the_same_number_of_visible_keys(count):
    order = zigzag(48 * count, count)
    assert sorted(order) == list(range(48 * count))
    assert len(set((order.reshape(count, -1) + 1).sum(axis=1))) == 1  # token t sees t + 1 keys
    for i in range(count):
        part = Part(count, jnp.array(i))
        np.testing.assert_array_equal(places(part, 48), order.reshape(count, -1)[i])


@pytest.mark.parametrize("window", [None, 100])
def test_every_device_visits_the_same_number_of_tiles(window):
    T, count = 1024, 4
    tiling = tile(T // count, T, 32, 32, window=window, ordered=False)
    visits = []
    for i in range(count):
        first, stop = part_bounds(tiling, places(Part(count, jnp.array(i)), T // count), window)
        visits.append(int(jnp.sum(stop - first)))
    causal = sum(t // 32 + 1 for t in range(0, T, 32))
    if window is None:
        assert visits == [causal / count] * count
    else:  # the device that holds the beginning of the row has queries whose window reaches past it
        assert len(set(visits[1:])) == 1 and visits[0] < visits[1] and sum(visits) < 0.3 * causal


def test_a_row_that_cannot_be_cut_says_what_would_do():
    with pytest.raises(ValueError, match=r"rows of 20 tokens .* 2 x 8 equal pieces .* a multiple of 16"):
        zigzag(20, 8)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_tokens_move_to_their_part_and_back(count):
    """What enters in order lies in zig-zag order inside, can be made whole in order, and leaves in order."""
    mesh = make_mesh(MeshConfig(context=count))
    x_BT = np.arange(8 * 32, dtype=np.int32).reshape(8, 32)
    row = P(("data",), "context")

    @partial(jax.shard_map, mesh=mesh, in_specs=row, out_specs=(row, row, P("data", None, "context")))
    def moved(x_BT):
        inside = spread(x_BT)
        return inside, unspread(inside), gather_row(inside)[..., None]

    inside, back, whole = moved(x_BT)
    np.testing.assert_array_equal(inside, x_BT[:, zigzag(32, count)])
    np.testing.assert_array_equal(back, x_BT)
    np.testing.assert_array_equal(whole, np.repeat(x_BT[..., None], count, axis=-1))


def attention_case(T, N, K, H, cuts, seed=0):
    """q, k, v, g of one row, its positions and segments: documents of these lengths, the rest padding."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((1, T, n, H)).astype(np.float32) for n in (N, K, K, N)]
    segments, positions = np.zeros((2, 1, T), np.int32)
    start = 0
    for number, length in enumerate(cuts, 1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    return arrays, positions, segments


def run_in_parts(count, kernel, arrays, positions, segments):
    """Output and gradients of kernel(q, k, v, q tokens, key tokens, part) with the row shared by `count` devices."""
    mesh = make_mesh(MeshConfig(data=1, context=count), jax.devices()[:count])
    heads, row = P(None, "context"), P(None, "context")

    @partial(jax.shard_map, mesh=mesh, in_specs=(heads,) * 4 + (row,) * 2, out_specs=(heads,) * 4)
    def local(q, k, v, g, positions, segments):
        q, k, v, g, positions, segments = map(spread, (q, k, v, g, positions, segments))
        part = Part(count, jax.lax.axis_index("context"))
        queries, keys = Tokens(positions, segments), Tokens(gather_row(positions), gather_row(segments))
        out, pull_back = jax.vjp(
            lambda q, k, v: kernel(q, gather_row(k), gather_row(v), queries, keys, part), q, k, v
        )  # fmt: skip
        return tuple(map(unspread, (out, *pull_back(g))))

    return jax.jit(local, compiler_options=FAST_TO_COMPILE)(*arrays, positions, segments)


@pytest.mark.parametrize(("window", "cuts"), [(None, (64,)), (9, (64,)), (None, (20, 33)), (7, (11, 1, 40))])
def test_tiled_attention_in_parts_equals_the_definition(window, cuts):
    arrays, positions, segments = attention_case(64, 4, 2, 8, cuts)

    def kernel(q, k, v, queries, keys, part):
        tiling = tile(q.shape[1], k.shape[1], 4, 8, window=window, ordered=False)
        bounds = part_bounds(tiling, places(part, q.shape[1]), window)
        return chunked_attention(q, k, v, queries, keys, window=window, tiling=tiling, bounds=bounds)

    mask = mask_matrix(positions[0], positions[0], segments[0], segments[0], window)[None]
    got = run_in_parts(4, kernel, arrays, positions, segments)
    for a, b in zip(got, attention(*arrays[:3], mask, arrays[3]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "cuts"), [(None, (512,)), (200, (300, 150))])
def test_the_tpu_kernel_in_parts_equals_the_definition(window, cuts):
    """Interpreted on the CPU: each device takes its rows of the kernel's table of blocks."""
    from mixtral_jax.kernels.attention_splash import splash_attention

    arrays, positions, segments = attention_case(512, 1, 1, 128, cuts)

    def kernel(q, k, v, queries, keys, part):
        return splash_attention(
            q, k, v, queries.segments, keys.segments, window=window, part=part, interpret=True
        )  # fmt: skip

    mask = mask_matrix(positions[0], positions[0], segments[0], segments[0], window)[None]
    got = run_in_parts(2, kernel, arrays, positions, segments)
    for a, b in zip(got, attention(*arrays[:3], mask, arrays[3]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_logits_and_log_probabilities_come_back_in_the_order_of_the_row():
    config = CONFIG.model_copy(update={"sliding_window": 5})
    compute = ComputeConfig(attention="chunked")
    abstract = abstract_model(config, compute)
    graphdef, _ = nnx.split(abstract)
    params = make_params()
    tokens, targets, weights, positions, segments = make_batches()["packed"]

    def run(params, *rows):
        logits = nnx.merge(graphdef, params)(rows[0], *rows[3:])
        logps, pull_back = jax.vjp(lambda params: target_logps(nnx.merge(graphdef, params), *rows)[0], params)
        uneven = (rows[0], rows[1], weights * (positions % 5 > 1), *rows[3:])
        loss = jax.value_and_grad(lambda p: next_token_sums(nnx.merge(graphdef, p), *uneven, skip_masked=True)[0][0])
        g_bT = jnp.sin(jnp.arange(logps.size, dtype=jnp.float32)).reshape(logps.shape)
        return logits, loss(params), logps, pull_back(g_bT)[0]

    rows = (tokens, targets, weights > 0, positions, segments)
    want = jax.jit(run, compiler_options=FAST_TO_COMPILE)(params, *rows)
    mesh = make_mesh(MeshConfig(context=4, tensor=2))
    places = (param_shardings(abstract, mesh), *(batch_sharding(mesh, leading=0),) * 5)
    with jax.set_mesh(mesh):
        got = jax.jit(run, in_shardings=places, compiler_options=FAST_TO_COMPILE)(params, *rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5, rtol=2e-5)
