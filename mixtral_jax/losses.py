"""Output projection and softmax cross-entropy in one, chunk by chunk: the full (M, V) logits are never held.

Each works on one device's tokens and, with a `tensor` axis, on its shard of the vocabulary. Where many tokens are no
targets (prompts, padding), the targets are brought to the front and the chunks without any are skipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels import bits, both_ways, from_bits, narrowed, transposed
from mixtral_jax.parallel import (
    TOKEN_AXES,
    axis_index,
    axis_max,
    axis_size,
    psum,
    same_variance,
    variance,
    varying,
    zeros,
)

CHUNK_BYTES = 64 * 2**20  # of fp32 logits held at a time


class CrossEntropy(NamedTuple):
    """Weighted sums over this device's tokens. Gradients flow through the loss alone; the others are metrics."""

    loss_sum: Float[Array, ""]  # sum of w * nll, nats
    correct_sum: Float[Array, ""]  # sum of w where no logit is above the target's
    entropy_sum: Float[Array, ""]  # sum of w * entropy of the prediction, nats; 0 unless asked for


class Scores(NamedTuple):
    """Of each wanted token; 0 and False of the others. Gradients flow through the log-probabilities alone."""

    logp_M: Float[Array, " M"]
    best_M: Bool[Array, " M"]  # no logit is above the target's: a greedy choice


def linear_cross_entropy(
    x_MD: Float[Array, "M D"],
    w_DV: Float[Array, "D V"],
    targets_M: Int[Array, " M"],
    weights_M: Float[Array, " M"],
    *,
    chunk: int = 0,
    vocab: int | None = None,
    entropy: bool = False,
    skip_masked: bool = False,
) -> CrossEntropy:
    """sum_m w_m * (logsumexp(x_m W) - (x_m W)[target_m]) and the weight of the tokens predicted right.

    Since the loss is a sum whose divisor is known beforehand, its gradients with respect to x and W are made in the
    forward pass, while a chunk's logits are at hand; the backward pass only scales them. `chunk` tokens at a time (any
    number, it need not divide M); 0 chooses by memory. No gradient flows to the weights. Columns behind the first
    `vocab` of all shards together are padding. `entropy`: that of each prediction is summed too. `skip_masked`: logits
    of tokens without a weight are not computed, but for those that share a chunk with others.
    """
    x_MD, w_DV, targets_M, weights_M = same_variance(x_MD, w_DV, targets_M, jax.lax.stop_gradient(weights_M))
    size, used = _chunk_size(chunk, x_MD.shape[0], w_DV.shape[1], parts=2 if skip_masked else 1), None
    if skip_masked:
        order_M, used = _wanted_first(weights_M != 0, size)
        x_MD, targets_M, weights_M = (_permuted(a, order_M) for a in (x_MD, targets_M, weights_M))
    return _cross_entropy((size, vocab, entropy), x_MD, w_DV, targets_M, weights_M, used)


def linear_logps(
    x_MD: Float[Array, "M D"],
    w_DV: Float[Array, "D V"],
    targets_M: Int[Array, " M"],
    wanted_M: Bool[Array, " M"],
    *,
    chunk: int = 0,
    vocab: int | None = None,
) -> Scores:
    """log softmax(x_m W)[target_m] for each wanted token, fp32, and whether a greedy choice would be the target.

    The backward pass computes each chunk's logits again, and adds up W's gradient in fp32.
    """
    size = _chunk_size(chunk, x_MD.shape[0], w_DV.shape[1], parts=2)
    order_M, used = _wanted_first(wanted_M, size)
    wanted_M, targets_M = _permuted(wanted_M, order_M), _permuted(targets_M, order_M)
    x_MD, w_DV, targets_M = same_variance(_permuted(x_MD, order_M), w_DV, targets_M)

    def in_place(a_M: jax.Array) -> jax.Array:
        a_M, none_M = jnp.where(wanted_M, a_M, jnp.zeros_like(a_M)), jnp.zeros_like(a_M)
        return none_M.at[order_M].set(a_M, unique_indices=True, mode="promise_in_bounds")

    return jax.tree.map(in_place, _logps((size, vocab), x_MD, w_DV, targets_M, used))


def _wanted_first(wanted_M: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The order that brings wanted tokens to the front, and in how many chunks any device has one."""
    chunks = (jnp.sum(wanted_M, dtype=jnp.int32) + chunk - 1) // chunk
    return jnp.argsort(~wanted_M, stable=True), axis_max(chunks, TOKEN_AXES)  # alike on all: they reduce together


def _permuted(a: jax.Array, order_M: jax.Array) -> jax.Array:
    return jnp.asarray(a).at[order_M].get(unique_indices=True, mode="promise_in_bounds")


def _chunk_size(chunk: int, tokens: int, vocab: int, parts: int = 1) -> int:
    """Tokens of a chunk. `parts`: smaller ones, where the last with a wanted token may be nearly empty."""
    if chunk:
        return min(chunk, tokens)
    return min(tokens, max(128, CHUNK_BYTES // (4 * vocab * parts) // 128 * 128))


def _chunks(a: jax.Array, size: int) -> jax.Array:
    """(M, ...) -> (number of chunks, size, ...), the last padded with zeros."""
    missing = -a.shape[0] % size
    a = jnp.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1))
    return a.reshape(-1, size, *a.shape[1:])


def _joined(dx_ncD: jax.Array, x_MD: jax.Array) -> jax.Array:
    return from_bits(dx_ncD, x_MD.dtype).reshape(-1, x_MD.shape[1])[: x_MD.shape[0]]


def _dlogits(logits_cV: jax.Array, lse_c: jax.Array, column_c: jax.Array, weights_c: jax.Array) -> jax.Array:
    """Of the weighted sum of -log p(target): w (p - onehot)."""
    onehot_cV = column_c[:, None] == jnp.arange(logits_cV.shape[1])[None, :]
    return weights_c[:, None] * (jnp.exp(logits_cV - lse_c[:, None]) - onehot_cV)


def _gradients(x_cD: jax.Array, w_VD: Callable[[], jax.Array], dlogits_cV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits of that of x and, in fp32, that of W, which comes transposed."""
    dlogits_cV, x_Dc = narrowed(dlogits_cV, x_cD.dtype), transposed(x_cD)
    dx_cD = jnp.dot(dlogits_cV, w_VD(), preferred_element_type=jnp.float32).astype(x_cD.dtype)
    return bits(dx_cD), jnp.dot(x_Dc, dlogits_cV, preferred_element_type=jnp.float32)


def _logits(x_cD: jax.Array, w_DV: jax.Array, vocab: int | None) -> jax.Array:
    logits_cV = jnp.dot(x_cD, w_DV, preferred_element_type=jnp.float32)
    columns = w_DV.shape[1]
    if vocab is None or axis_size("tensor") * columns == vocab:
        return logits_cV
    known_V = axis_index("tensor") * columns + jnp.arange(columns) < vocab
    return jnp.where(known_V[None, :], logits_cV, -jnp.inf)


def _softmax_parts(logits_cV: jax.Array, targets_c: jax.Array) -> tuple[jax.Array, ...]:
    """Local column of each target, logsumexp, the target's logit, and whether no logit is above it."""
    column_c = targets_c - axis_index("tensor") * logits_cV.shape[1]
    here_c = (column_c >= 0) & (column_c < logits_cV.shape[1])
    top_c = axis_max(jnp.max(jax.lax.stop_gradient(logits_cV), axis=-1), ("tensor",))
    lse_c = top_c + jnp.log(psum(jnp.sum(jnp.exp(logits_cV - top_c[:, None]), axis=-1), ("tensor",)))
    picked_c = jnp.take_along_axis(logits_cV, jnp.where(here_c, column_c, 0)[:, None], axis=1)[:, 0]
    target_c = psum(jnp.where(here_c, picked_c, 0), ("tensor",))
    return column_c, lse_c, target_c, target_c >= top_c


def _sums(lse_c, target_c, best_c, weights_c, entropy_c) -> CrossEntropy:
    loss_sum, entropy_sum = jnp.sum(weights_c * (lse_c - target_c)), jnp.sum(weights_c * entropy_c)
    return CrossEntropy(loss_sum, jnp.sum(jnp.where(best_c, weights_c, 0)), entropy_sum)


def _entropy(logits_cV: jax.Array, lse_c: jax.Array, wanted: bool) -> jax.Array:
    """-sum p log p = logsumexp - sum p logit; padding columns have p = 0."""
    if not wanted:
        return jnp.zeros_like(lse_c)
    p_cV = jnp.exp(logits_cV - lse_c[:, None])
    mean_c = psum(jnp.sum(jnp.where(p_cV > 0, p_cV * logits_cV, 0), axis=-1), ("tensor",))
    return lse_c - mean_c


def _over_chunks(one: Callable[..., Any], skip: Any, start: Any, used: jax.Array | None, chunks: Any) -> Any:
    """(carry, stacked outputs) of one(carry, chunk); from chunk `used` on the carry stays and the output is skip."""

    def step(carry, inputs):
        index, chunk = inputs
        if used is None:
            return one(carry, chunk)
        return jax.lax.cond(index < used, one, lambda carry, chunk: (carry, skip), carry, chunk)

    count = jax.tree.leaves(chunks)[0].shape[0]
    return jax.lax.scan(step, start, (jnp.arange(count), chunks))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, x_MD, w_DV, targets_M, weights_M, used) -> CrossEntropy:
    return _sums_and_gradients(static, False, x_MD, w_DV, targets_M, weights_M, used)[0]


def _sums_and_gradients(static, wanted, x_MD, w_DV, targets_M, weights_M, used) -> tuple[CrossEntropy, Any]:
    """The sums, and where it is wanted the gradients of the loss with respect to x and W."""
    chunk, vocab, entropy = static
    w_DV, w_VD = both_ways(w_DV)

    def one(carry, xtw):
        total, dw_DV = carry
        x_cD, targets_c, weights_c = xtw
        logits_cV = _logits(x_cD, w_DV, vocab)
        column_c, lse_c, target_c, best_c = _softmax_parts(logits_cV, targets_c)
        dx_cD = None
        if wanted:
            dx_cD, more_DV = _gradients(x_cD, w_VD, _dlogits(logits_cV, lse_c, column_c, weights_c))
            dw_DV += more_DV
        sums = _sums(lse_c, target_c, best_c, weights_c, _entropy(logits_cV, lse_c, entropy))
        return (jax.tree.map(jnp.add, total, sums), dw_DV), dx_cD

    start = CrossEntropy(*(zeros((), jnp.float32, x_MD),) * 3), zeros(w_DV.shape, jnp.float32, x_MD) if wanted else None
    chunks = tuple(_chunks(a, chunk) for a in (x_MD, targets_M, weights_M))
    no_dx_cD = bits(zeros(chunks[0].shape[1:], x_MD.dtype, x_MD)) if wanted else None
    (total, dw_DV), dx_ncD = _over_chunks(one, no_dx_cD, start, used, chunks)
    total = axis_max(total, ("tensor",))  # equal on all shards of the vocabulary: say so
    return total, (_joined(dx_ncD, x_MD), dw_DV.astype(w_DV.dtype)) if wanted else None


def _cross_entropy_bwd(static, saved, g):
    dx_MD, dw_DV = saved
    scale = g.loss_sum
    return (scale * dx_MD).astype(dx_MD.dtype), (scale * dw_DV).astype(dw_DV.dtype), None, None, None


_cross_entropy.defvjp(lambda static, *args: _sums_and_gradients(static, True, *args), _cross_entropy_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(static, x_MD, w_DV, targets_M, used) -> Scores:
    chunk, vocab = static

    def one(_, xt):
        x_cD, targets_c = xt
        _, lse_c, target_c, best_c = _softmax_parts(_logits(x_cD, w_DV, vocab), targets_c)
        return None, Scores(target_c - lse_c, best_c)

    axes = sorted(variance(x_MD) - {"tensor"})
    none = Scores(*(varying(jnp.zeros(chunk, dtype), axes) for dtype in (jnp.float32, bool)))
    _, found = _over_chunks(one, none, None, used, tuple(_chunks(a, chunk) for a in (x_MD, targets_M)))
    return jax.tree.map(lambda a_nc: a_nc.reshape(-1)[: x_MD.shape[0]], found)


def _logps_bwd(static, saved, g):
    (chunk, vocab), (x_MD, w_DV, targets_M, used) = static, saved
    w_DV, w_VD = both_ways(w_DV)

    def one(dw_DV, xtg):
        x_cD, targets_c, g_c = xtg
        logits_cV = _logits(x_cD, w_DV, vocab)
        column_c, lse_c, _, _ = _softmax_parts(logits_cV, targets_c)
        dx_cD, more_DV = _gradients(x_cD, w_VD, _dlogits(logits_cV, lse_c, column_c, -g_c))
        return dw_DV + more_DV, dx_cD

    chunks = tuple(_chunks(a, chunk) for a in (x_MD, targets_M, g.logp_M))
    no_dx_cD = bits(zeros(chunks[0].shape[1:], x_MD.dtype, x_MD))
    dw_DV, dx_ncD = _over_chunks(one, no_dx_cD, zeros(w_DV.shape, jnp.float32, x_MD), used, chunks)
    return _joined(dx_ncD, x_MD), dw_DV.astype(w_DV.dtype), None, None


_logps.defvjp(lambda static, *args: (_logps(static, *args), args), _logps_bwd)
