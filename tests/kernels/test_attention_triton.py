"""Our kernel for NVIDIA GPUs by Pallas's interpreter: values and gradients, and that empty tiles are not visited."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import attention_triton as kernel
from mixtral_jax.kernels.attention_triton import triton_attention
from mixtral_jax.parallel import Part, places
from tests.attention_cases import Case, compare, make, out_and_gradients
from tests.oracles.attention import attention, mask_matrix

CASES = {
    "packed, padded, grouped": Case(B=2, T=256, N=4, K=2, H=16, lengths=(100, 1, 90)),
    "windowed": Case(B=1, T=256, N=1, K=1, H=16, lengths=(170, 86), window=37),
    "only padding": Case(B=1, T=128, N=1, K=1, H=16, lengths=()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_equals_the_definition(name):
    case = CASES[name]
    inputs = make(case)
    run = partial(triton_attention, places_T=jnp.arange(case.T), window=case.window, interpret=True)
    segments = inputs.tokens["keys"].segments
    got = out_and_gradients(lambda q, k, v: run(q, k, v, segments, segments), inputs.arrays)
    compare(got, attention(*inputs.arrays[:3], inputs.mask, inputs.arrays[3]), 1e-5)


def test_padding_inside_a_document_ends_nothing():
    inputs = make(Case(B=1, T=128, N=1, K=1, H=16, lengths=(90, 30)))
    segments = inputs.tokens["keys"].segments.copy()
    segments[:, [0, 60, 61, 100]] = 0
    order = np.arange(128)
    mask = mask_matrix(order, order, segments[0], segments[0], None)[None]
    run = partial(triton_attention, places_T=jnp.arange(128), window=None, interpret=True)
    got = out_and_gradients(lambda q, k, v: run(q, k, v, segments, segments), inputs.arrays)
    compare(got, attention(*inputs.arrays[:3], mask, inputs.arrays[3]), 1e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_parts_of_a_row_equal_the_definition(window):
    """Each of two devices with its two pieces, all keys, and their gradients added."""
    inputs = make(Case(B=1, T=512, N=2, K=1, H=16, lengths=(200, 250), window=window))
    q, k, v, g = map(jnp.asarray, inputs.arrays)
    segments = jnp.asarray(inputs.tokens["keys"].segments)

    @jax.jit
    def on_device(own):
        at = places(Part(2, own), 256)

        def attend(q, k, v):
            return triton_attention(q[:, at], k, v, segments[:, at], segments, at, window=window, interpret=True)

        out, pull_back = jax.vjp(attend, q, k, v)
        return jnp.zeros_like(q).at[:, at].set(out), *pull_back(g[:, at])

    got = [np.asarray(sum(pair)) for pair in zip(*(on_device(jnp.int32(i)) for i in (0, 1)), strict=True)]
    compare(got, attention(*inputs.arrays[:3], inputs.mask, inputs.arrays[3]), 1e-5)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("own", [None, 0, 1], ids=str)
def test_every_tile_that_is_visited_holds_a_pair_and_no_other_does(window, own):
    """Forward and backward, whole rows and zig-zag parts; documents end where tiles do."""
    T, lengths = 512, (192, 256)
    inputs = make(Case(B=1, T=T, N=1, K=1, H=1, lengths=lengths, window=window))
    at = np.arange(T) if own is None else np.asarray(places(Part(2, jnp.int32(own)), T // 2))
    mask = inputs.mask[0][at]
    segments = jnp.asarray(inputs.tokens["keys"].segments)
    seen = kernel.Seen(*map(np.asarray, kernel.seen_keys(segments[:, at], segments, jnp.asarray(at), window)))
    for block_T, block_S in (kernel.FORWARD, kernel.BACKWARD_Q):
        filled = mask.reshape(len(at) // block_T, block_T, T // block_S, block_S).any((1, 3))
        for i, row in enumerate(filled):
            rows = slice(i * block_T, (i + 1) * block_T)
            start, stop = kernel.key_bounds(seen.first_BT[0, rows], seen.last_BT[0, rows], block_S)
            assert list(range(start, stop)) == np.flatnonzero(row).tolist()
    block_T, block_S = kernel.BACKWARD_KV
    filled = mask.reshape(len(at) // block_T, block_T, T // block_S, block_S).any((1, 3))
    bounds = kernel.query_bounds(*map(jnp.asarray, seen[:2]), S=T, block_T=block_T, block_S=block_S)
    visited = np.zeros_like(filled)
    for j, (start, stop) in enumerate(zip(*(x[0].tolist() for x in bounds), strict=True)):
        visited[start:stop, j] = True
    assert (visited == filled).all()
