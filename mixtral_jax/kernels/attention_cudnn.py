"""Attention by cuDNN's fused kernels over a ragged layout: packed rows and no mask (Hopper and newer, jax >= 0.12).

Each segment is a sequence of its own to cuDNN: where it begins in memory, how long it is, causal, windowed. Nothing
else is computed, and padding is no sequence at all. cuDNN wants the number of sequences as part of the shape, and its
statistics have a row of T for each; a batch row has any number of segments. So they go in rounds of SEGMENTS a row, as
many rounds as the data needs, almost always one; between the passes one statistic a token is kept.

The only file that touches JAX's private interface to cuDNN. Its primitives and not its function, which asks the host
for a GPU (a program for one that is not there could not be compiled), and whose own offsets were wrong before 0.12:
those of keys were multiplied by the heads of queries.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels.attention_tiled import SAVED, segment_begins
from mixtral_jax.parallel import same_variance, unchecked

SEGMENTS = 16  # of a row in one call; more cost memory (fp32, SEGMENTS x T x heads a row) and empty thread blocks


class Sequences(NamedTuple):
    """What cuDNN is told of one round, B * SEGMENTS sequences: those that exist first, then empty ones."""

    lengths: Array  # (B, SEGMENTS), tokens
    q_offsets: Array  # (B, SEGMENTS + 1), elements of q before the first of each
    kv_offsets: Array  # the same of k and v


class _Places(NamedTuple):
    """Where the tokens of one round stand among its sequences, and the other way round."""

    inside_BT: Array
    sequence_BT: Array
    place_BT: Array  # within the sequence
    begin_Q: Array  # token of the flattened batch with which each of the sequences begins


def cudnn_attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, *, window: int | None) -> Array:
    """Causal attention within segments for whole ordered rows, in bfloat16 or float16; B * T * N * H below 2**31.

    A row with padding inside a segment comes out as NaN: cuDNN would take its pieces for segments of their own.
    """
    q, k, v, segments = same_variance(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    whole_BT = ~_begins(segments) | (segment_begins(segments) == jnp.arange(segments.shape[1])[None])
    out_BTNH = jnp.where(whole_BT.all(1)[:, None, None, None], _attend(window, q, k, v, segments), jnp.nan)
    return jnp.where((segments != 0)[:, :, None, None], out_BTNH, 0).astype(q.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int | None, q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _forward(window, q, k, v, segments)[0]


def _forward(window: int | None, q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Any]:
    def run(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Array]:
        def one(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            sequences, places = round_of(segments, number, q.shape[2:], k.shape[2:])
            out, statistics_QNT = call_forward(q, k, v, sequences, window)
            lse_BTN = statistics_QNT[places.sequence_BT, :, places.place_BT]
            return _where(places.inside_BT, (out, lse_BTN), state)

        none = jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)
        return lax.fori_loop(0, rounds(segments), one, none)

    out, lse = (checkpoint_name(x, SAVED) for x in unchecked(run, q, k, v, segments))
    return out, (q, k, v, segments, out, lse)


def _backward(window: int | None, saved: Any, g: Array) -> tuple[Any, ...]:
    def run(q: Array, k: Array, v: Array, segments: Array, out: Array, lse: Array, g: Array) -> tuple[Array, ...]:
        (B, T), flat = segments.shape, lse.reshape(-1, q.shape[2])

        def one(number: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            sequences, places = round_of(segments, number, q.shape[2:], k.shape[2:])
            # what stands behind a sequence's end is never read
            tokens_QT = jnp.minimum(places.begin_Q[:, None] + jnp.arange(T)[None], B * T - 1)
            statistics_QNT = flat[tokens_QT].swapaxes(1, 2)
            gradients = call_backward(q, k, v, sequences, window, statistics_QNT, out, g)
            return _where(places.inside_BT, gradients, state)

        return lax.fori_loop(0, rounds(segments), one, tuple(map(jnp.zeros_like, (q, k, v))))

    return *unchecked(run, *saved, g), None


_attend.defvjp(_forward, _backward)


def rounds(segments_BT: Array) -> Array:
    """Calls that a batch needs: of the row with the most segments."""
    return (_begins(segments_BT).sum(1).max() + SEGMENTS - 1) // SEGMENTS


def round_of(
    segments_BT: Array, number: Array, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]
) -> tuple[Sequences, _Places]:
    """The segments SEGMENTS * number ... of every row as cuDNN's sequences; the shapes are (heads, head size)."""
    (B, T), real_BT, begins_BT = segments_BT.shape, segments_BT != 0, _begins(segments_BT)
    index_BT = jnp.cumsum(begins_BT, axis=1) - 1 - number * SEGMENTS  # of each token's segment, in this round
    wanted_M = jnp.arange(SEGMENTS + 1) + number * SEGMENTS + 1
    find = partial(jnp.searchsorted, method="scan_unrolled")
    begin_BM = jax.vmap(find, (0, None))(jnp.cumsum(begins_BT, axis=1), wanted_M)  # T: there is no such segment
    before_BT = jnp.pad(jnp.cumsum(real_BT, axis=1), ((0, 0), (1, 0)))  # real tokens before each place
    lengths_BM = jnp.diff(jnp.take_along_axis(before_BT, begin_BM, axis=1), axis=1)
    begin_BM = begin_BM[:, :-1]
    there_BM = begin_BM < T
    # all that exist to the front, in order; the others are empty and begin behind the last token
    order_Q = jnp.argsort(~there_BM.reshape(-1), stable=True)
    token_BM = jnp.where(there_BM, begin_BM + T * jnp.arange(B)[:, None], B * T)
    begin_Q = token_BM.reshape(-1)[order_Q].astype(jnp.int32)
    offsets = jnp.pad(begin_Q, (0, B), constant_values=B * T).reshape(B, SEGMENTS + 1)
    lengths = lengths_BM.reshape(-1)[order_Q].astype(jnp.int32).reshape(B, SEGMENTS)
    sequences = Sequences(lengths, *(offsets * (heads * size) for heads, size in (q_shape, kv_shape)))
    inside_BT = real_BT & (index_BT >= 0) & (index_BT < SEGMENTS)
    earlier_B1 = (jnp.cumsum(there_BM.sum(1)) - there_BM.sum(1))[:, None]
    sequence_BT = jnp.where(inside_BT, earlier_B1 + index_BT, 0)
    token_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)
    place_BT = jnp.where(inside_BT, token_BT - begin_Q[sequence_BT], 0)
    return sequences, _Places(inside_BT, sequence_BT, place_BT, begin_Q)


def call_forward(q: Array, k: Array, v: Array, sequences: Sequences, window: int | None) -> tuple[Array, Array]:
    """Output and statistics (B * SEGMENTS, N, T), fp32; what belongs to no sequence holds anything."""
    from jax._src.cudnn.fused_attention_stablehlo import _dot_product_attention_fwd_p as primitive

    return tuple(primitive.bind(q, k, v, *_inputs(q, sequences), is_training=True, **_options(q, window)))


def call_backward(
    q: Array, k: Array, v: Array, sequences: Sequences, window: int | None, statistics: Array, out: Array, g: Array
) -> tuple[Array, ...]:
    """Gradients of q, k and v; what belongs to no sequence holds anything."""
    from jax._src.cudnn.fused_attention_stablehlo import _dot_product_attention_bwd_p as primitive

    inputs = _inputs(q, sequences)
    return tuple(primitive.bind(q, k, v, *inputs, statistics, out, g, **_options(q, window)))


def _inputs(q: Array, sequences: Sequences) -> tuple[Array, ...]:
    """bias, lengths and offsets of queries and keys, page tables; an empty array for none."""
    none, (lengths, q_offsets, kv_offsets) = jnp.zeros(0, q.dtype), sequences
    return none, lengths, lengths, q_offsets, kv_offsets, none, none


def _options(q: Array, window: int | None) -> dict[str, Any]:
    from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType

    newer = {"score_mod_name": None, "score_mod_jaxpr": None} if jax.__version_info__ >= (0, 11) else {}
    return {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": MaskType.PADDING_CAUSAL,
        "layout": AttentionLayout.BTNH.value,
        "sliding_window_length": window,
        **newer,
    }


def _begins(segments_BT: Array) -> Array:
    """Whether a token is the first of a run of tokens of one segment."""
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    return (segments_BT != 0) & (segments_BT != before_BT)


def _where(inside_BT: Array, new: Any, old: Any) -> Any:
    return tuple(
        jnp.where(inside_BT.reshape(*inside_BT.shape, *(1,) * (x.ndim - 2)), x, y)
        for x, y in zip(new, old, strict=True)
    )
