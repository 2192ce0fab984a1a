"""cuDNN's ragged layout: what it is asked for, that this is attention, and what the program for a GPU holds.

No GPU is there: cuDNN is played by tests/oracles/cudnn.py, and the rest is read in the program that is lowered.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import attention_cudnn
from mixtral_jax.kernels.attention_cudnn import SEGMENTS, cudnn_attention, round_of, rounds
from tests.attention_cases import Case, compare, make, out_and_gradients
from tests.oracles.attention import attention
from tests.oracles.cudnn import ragged_attention

CASES = {
    "packed, padded, grouped": Case(T=24, N=4, K=2, lengths=(9, 1, 7)),
    "windowed": Case(T=24, N=2, K=1, lengths=(9, 14), window=5),
    "only padding": Case(T=8, N=2, K=1, lengths=()),
    "three rounds": Case(T=48, N=2, K=1, lengths=(1, 2) + (1,) * (2 * SEGMENTS + 3)),
    "two rounds of one row, one of the other": Case(T=40, N=2, K=1, lengths=(2,) * (SEGMENTS + 2)),
}


@pytest.fixture
def played(monkeypatch):
    """cuDNN's two calls, made by the host; what is saved between the passes must be all that they need."""

    def forward(q, k, v, sequences, window):
        shapes = (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((q.shape[0] * SEGMENTS, q.shape[2], q.shape[1]), jnp.float32),
        )
        return jax.pure_callback(lambda *a: ragged_attention(*a, window)[:2], shapes, q, k, v, sequences)

    def backward(q, k, v, sequences, window, statistics, out, g):
        def host(q, k, v, sequences, statistics, out, g):
            want_out, want, gradients = ragged_attention(q, k, v, sequences, window, g)
            inside = ~np.isnan(want_out)
            np.testing.assert_allclose(out[inside], want_out[inside], atol=1e-5)
            np.testing.assert_allclose(statistics[~np.isnan(want)], want[~np.isnan(want)], atol=1e-5)
            return gradients

        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
        return jax.pure_callback(host, shapes, q, k, v, sequences, statistics, out, g)

    monkeypatch.setattr(attention_cudnn, "call_forward", forward)
    monkeypatch.setattr(attention_cudnn, "call_backward", backward)


@pytest.mark.parametrize("name", CASES)
def test_what_cudnn_is_asked_for_is_attention(played, name):
    case = CASES[name]
    inputs = make(case)
    if name.startswith("two"):
        inputs.tokens["keys"].segments[1] = inputs.mask[1] = 0
        inputs.tokens["keys"].segments[1, 3:7], inputs.mask[1, 3:7, 3:7] = 5, np.tri(4)
    got = out_and_gradients(
        lambda q, k, v: cudnn_attention(q, k, v, inputs.tokens["keys"].segments, window=case.window), inputs.arrays
    )
    compare(got, attention(*inputs.arrays[:3], inputs.mask, inputs.arrays[3]), 1e-5)


def test_padding_inside_a_document_is_nan_and_the_next_row_is_not(played):
    inputs = make(Case(T=24, N=2, K=1, lengths=(12,)))
    segments = inputs.tokens["keys"].segments.copy()
    segments[0, 5] = 0
    out = np.asarray(cudnn_attention(*inputs.arrays[:3], segments, window=None))
    assert np.isnan(out[0, :5]).all() and np.isfinite(out[1]).all()


def test_offsets_are_in_elements_of_each_array():
    """Documents of 512 tokens at 32 and 8 heads of 128: jax 0.10.2 said 2,097,152 for the keys of the second."""
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 1]], 512, axis=1))
    sequences, _ = round_of(segments, 0, (32, 128), (8, 128))
    assert sequences.lengths.reshape(-1)[:6].tolist() == [512, 512, 512, 2048, 0, 0]
    assert sequences.kv_offsets.reshape(-1)[:6].tolist() == [0, 524_288, 1_048_576, 2_097_152, 4_194_304, 4_194_304]
    assert (sequences.q_offsets == 4 * sequences.kv_offsets).all()
    assert {x.dtype.name for x in sequences} == {"int32"} and int(rounds(segments)) == 1


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_offsets_are_those_of_jax(heads):
    """Its own way from segments to cuDNN's arrays, which at unequal heads is right from 0.12 on."""
    from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets

    N, K, T = *heads, 40
    segments = make(Case(T=T, lengths=(13, 1, 19))).tokens["keys"].segments
    begins = [np.flatnonzero(np.diff(row, prepend=0) & (row != 0)) for row in segments]
    lengths, offsets = np.full((2, SEGMENTS), -1, np.int32), np.full((2, SEGMENTS + 1), -1, np.int32)
    for b, row in enumerate(begins):
        offsets[b, : len(row)], lengths[b, : len(row)] = row, [(segments[b] == segments[b, i]).sum() for i in row]
    q, k = (jnp.zeros((2, T, n, 8), jnp.bfloat16) for n in heads)
    want = _fix_seqlen_offsets(*map(jnp.asarray, (lengths, lengths, offsets, offsets)), q, k)
    got, _ = round_of(jnp.asarray(segments), 0, (N, 8), (K, 8))
    right = N == K or jax.__version_info__ >= (0, 12)
    for name, a, b in zip(got._fields, got, (want[0], *want[2:]), strict=True):
        assert (np.array_equal(a, b)) == (right or name != "kv_offsets"), name


@pytest.mark.parametrize("window", [None, 300])
def test_the_program_for_a_gpu_asks_for_packed_rows_and_holds_no_square(window):
    def loss(q, k, v, segments):
        return cudnn_attention(q, k, v, segments, window=window).astype(jnp.float32).sum()

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    B, T = 2, 8192
    given = array(B, T, 4, 128), *(array(B, T, 2, 128),) * 2, array(B, T, dtype=jnp.int32)
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*given)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"stablehlo.custom_call @(__cudnn\S+?)\(", text)
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert text.count(rf"sliding_window_length\22: {window or 0}") == text.count("PADDING_CAUSAL") == 2
    assert text.count(rf"max_seg_per_batch\22: {SEGMENTS}") == 2
    shapes = [[int(n) for n in dims.split("x")] for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)]
    assert max(map(np.prod, shapes)) == B * T * 4 * 128 > B * SEGMENTS * T * 4  # queries; the statistics of one round
    assert all(sum(n >= T for n in dims) < 2 for dims in shapes)
