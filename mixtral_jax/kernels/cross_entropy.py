"""Output projection and softmax cross-entropy in one, chunk by chunk: the full (M, V) logits are never held.

Each works on one device's tokens and, with a `tensor` axis, on its shard of the vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.sharding import alike, axis_index, axis_max, axis_size, psum, variance, varying

CHUNK_BYTES = 64 * 2**20  # of fp32 logits held at a time


class CrossEntropy(NamedTuple):
    """Weighted sums over this device's tokens. Gradients flow through the loss alone; the others are metrics."""

    loss_sum: Float[Array, ""]  # sum of w * nll, nats
    correct_sum: Float[Array, ""]  # sum of w where no logit is above the target's
    entropy_sum: Float[Array, ""]  # sum of w * entropy of the prediction, nats; 0 unless asked for


def linear_cross_entropy(
    x_MD: Float[Array, "M D"],
    w_DV: Float[Array, "D V"],
    targets_M: Int[Array, " M"],
    weights_M: Float[Array, " M"],
    *,
    chunk: int = 0,
    vocab: int | None = None,
    entropy: bool = False,
) -> CrossEntropy:
    """sum_m w_m * (logsumexp(x_m W) - (x_m W)[target_m]) and the weight of the tokens predicted right.

    Since the loss is a sum whose divisor is known beforehand, its gradients with respect to x and W are made in the
    forward pass, while a chunk's logits are at hand; the backward pass only scales them. `chunk` tokens at a time (any
    number, it need not divide M); 0 chooses by memory. No gradient flows to the weights. Columns behind the first
    `vocab` of all shards together are padding. `entropy`: that of each prediction is summed too.
    """
    x_MD, w_DV, targets_M, weights_M = alike(x_MD, w_DV, targets_M, jax.lax.stop_gradient(weights_M))
    size = _chunk_size(chunk, x_MD.shape[0], w_DV.shape[1])
    return _cross_entropy((size, vocab, entropy), x_MD, w_DV, targets_M, weights_M)


def linear_logps(
    x_MD: Float[Array, "M D"],
    w_DV: Float[Array, "D V"],
    targets_M: Int[Array, " M"],
    *,
    chunk: int = 0,
    vocab: int | None = None,
) -> Float[Array, " M"]:
    """log softmax(x_m W)[target_m] for each token, fp32; its backward pass computes each chunk's logits again."""
    x_MD, w_DV, targets_M = alike(x_MD, w_DV, targets_M)
    size = _chunk_size(chunk, x_MD.shape[0], w_DV.shape[1])
    x_ncD, targets_nc = _chunks(x_MD, size), _chunks(targets_M, size)

    @jax.checkpoint
    def one(x_cD, w_DV, targets_c):
        logits_cV = _logits(x_cD, w_DV, vocab)
        _, lse_c, target_c, _ = _softmax_parts(logits_cV, targets_c)
        return target_c - lse_c

    return jax.lax.map(lambda xt: one(xt[0], w_DV, xt[1]), (x_ncD, targets_nc)).reshape(-1)[: x_MD.shape[0]]


def _chunk_size(chunk: int, tokens: int, vocab: int) -> int:
    if chunk:
        return min(chunk, tokens)
    return min(tokens, max(128, CHUNK_BYTES // (4 * vocab) // 128 * 128))


def _chunks(a: jax.Array, size: int) -> jax.Array:
    """(M, ...) -> (number of chunks, size, ...), the last padded with zeros."""
    missing = -a.shape[0] % size
    a = jnp.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1))
    return a.reshape(-1, size, *a.shape[1:])


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


def _reduced(sums: CrossEntropy) -> CrossEntropy:
    """Equal on all shards of the vocabulary, and typed so."""
    return CrossEntropy(*(axis_max(s, ("tensor",)) for s in sums))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, x_MD, w_DV, targets_M, weights_M) -> CrossEntropy:
    chunk, vocab, entropy = static

    def one(total, xtw):
        x_cD, targets_c, weights_c = xtw
        logits_cV = _logits(x_cD, w_DV, vocab)
        _, lse_c, target_c, best_c = _softmax_parts(logits_cV, targets_c)
        sums = _sums(lse_c, target_c, best_c, weights_c, _entropy(logits_cV, lse_c, entropy))
        return jax.tree.map(jnp.add, total, sums), None

    start = CrossEntropy(*(_zero(x_MD),) * 3)
    total, _ = jax.lax.scan(one, start, tuple(_chunks(a, chunk) for a in (x_MD, targets_M, weights_M)))
    return _reduced(total)


def _zero(like: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    return varying(jnp.zeros(shape, jnp.float32), sorted(variance(like)))


def _cross_entropy_fwd(static, x_MD, w_DV, targets_M, weights_M):
    chunk, vocab, entropy = static

    def one(carry, xtw):
        total, dw_DV = carry
        x_cD, targets_c, weights_c = xtw
        logits_cV = _logits(x_cD, w_DV, vocab)
        column_c, lse_c, target_c, best_c = _softmax_parts(logits_cV, targets_c)
        onehot_cV = column_c[:, None] == jnp.arange(logits_cV.shape[1])[None, :]
        dlogits_cV = weights_c[:, None] * (jnp.exp(logits_cV - lse_c[:, None]) - onehot_cV)
        dlogits_cV = dlogits_cV.astype(x_cD.dtype)
        dx_cD = jnp.einsum("cV,DV->cD", dlogits_cV, w_DV)
        # transposed before its product: XLA's CPU matmul is a third slower on a transposed left side
        x_Dc = jax.lax.optimization_barrier(x_cD.T)
        dw_DV = dw_DV + jnp.dot(x_Dc, dlogits_cV, preferred_element_type=jnp.float32)
        sums = _sums(lse_c, target_c, best_c, weights_c, _entropy(logits_cV, lse_c, entropy))
        return (jax.tree.map(jnp.add, total, sums), dw_DV), dx_cD

    start = (CrossEntropy(*(_zero(x_MD),) * 3), _zero(x_MD, w_DV.shape))
    (total, dw_DV), dx_ncD = jax.lax.scan(one, start, tuple(_chunks(a, chunk) for a in (x_MD, targets_M, weights_M)))
    dx_MD = dx_ncD.reshape(-1, x_MD.shape[1])[: x_MD.shape[0]]
    return _reduced(total), (dx_MD, dw_DV.astype(w_DV.dtype))


def _cross_entropy_bwd(static, saved, g):
    dx_MD, dw_DV = saved
    scale = g.loss_sum
    return (scale * dx_MD).astype(dx_MD.dtype), (scale * dw_DV).astype(dw_DV.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
