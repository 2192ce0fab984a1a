"""Tokens sorted by expert and back: static shapes, gathers only, in both directions.

A routed row is one (token, choice) pair. Rows are ordered by expert; a choice with expert number >= `experts` (padding,
dropped, or on another device) sorts behind all others and is not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.parallel import same_variance


class Plan(NamedTuple):
    """Where each routed row goes."""

    order_R: Int[Array, " R"]  # row of the buffer -> (token * C + choice)
    slot_MC: Int[Array, "M C"]  # (token, choice) -> row of the buffer; only where here_MC
    here_MC: Bool[Array, "M C"]  # whether the choice has a row
    group_sizes_E: Int[Array, " E"]  # rows of each expert


def plan_rows(expert_MC: Int[Array, "M C"], experts: int, rows: int) -> Plan:
    """Sort the choices by expert, stable, into a buffer of `rows` rows (at least the choices that have a row)."""
    flat_R = jnp.minimum(expert_MC.reshape(-1), experts)
    position = jnp.arange(flat_R.shape[0], dtype=jnp.int32)
    _, order_R = jax.lax.sort((flat_R, position), num_keys=1, is_stable=True)
    # saved by every rematerialisation policy, a few bytes a row: the backward pass sorts nothing
    order_R = checkpoint_name(order_R, "route")
    slot_R = checkpoint_name(jnp.zeros_like(order_R).at[order_R].set(position, unique_indices=True), "route")
    sizes_E = jnp.sum(flat_R[:, None] == jnp.arange(experts, dtype=flat_R.dtype)[None, :], axis=0, dtype=jnp.int32)
    shape = expert_MC.shape
    return Plan(order_R[:rows], slot_R.reshape(shape), (flat_R < experts).reshape(shape), sizes_E)


def limit_capacity(expert_MC: Int[Array, "M C"], experts: int, capacity: int) -> Int[Array, "M C"]:
    """Give every expert its first `capacity` choices in token order; the others become expert number `experts`."""
    flat_R = expert_MC.reshape(-1)
    onehot_RE = (flat_R[:, None] == jnp.arange(experts, dtype=flat_R.dtype)[None, :]).astype(jnp.int32)
    rank_R = jnp.sum((jnp.cumsum(onehot_RE, axis=0) - 1) * onehot_RE, axis=1)
    return jnp.where(rank_R < capacity, flat_R, experts).reshape(expert_MC.shape)


@jax.custom_vjp
def _take_rows(x_MD: jax.Array, order_R: jax.Array, slot_MC: jax.Array, here_MC: jax.Array) -> jax.Array:
    return jnp.take(x_MD, order_R // slot_MC.shape[1], axis=0, mode="clip")


def _take_rows_fwd(x_MD, order_R, slot_MC, here_MC):
    return _take_rows(x_MD, order_R, slot_MC, here_MC), (slot_MC, here_MC)


def _take_rows_bwd(saved, g_RD):
    slot_MC, here_MC = saved
    g_MCD = jnp.take(g_RD, slot_MC, axis=0, mode="clip")
    g_MD = jnp.sum(jnp.where(here_MC[..., None], g_MCD, 0), axis=1, dtype=jnp.float32)
    return g_MD.astype(g_RD.dtype), None, None, None


_take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


def dispatch(x_MD: Float[Array, "M D"], plan: Plan) -> Float[Array, "R D"]:
    """Each routed row's token. Its gradient gathers by the inverse permutation and sums over the choices in fp32."""
    return _take_rows(*same_variance(x_MD, plan.order_R, plan.slot_MC, plan.here_MC))


@jax.custom_vjp
def _weighted_sum(y_RD, gate_MC, order_R, slot_MC, here_MC):
    y_MCD = jnp.where(here_MC[..., None], jnp.take(y_RD, slot_MC, axis=0, mode="clip"), 0)
    return jnp.sum(y_MCD.astype(jnp.float32) * gate_MC[..., None], axis=1)


def _weighted_sum_fwd(y_RD, gate_MC, order_R, slot_MC, here_MC):
    return _weighted_sum(y_RD, gate_MC, order_R, slot_MC, here_MC), (y_RD, gate_MC, order_R, slot_MC, here_MC)


def _weighted_sum_bwd(saved, g_MD):
    y_RD, gate_MC, order_R, slot_MC, here_MC = saved
    gate_R = jnp.where(here_MC, gate_MC, 0).reshape(-1)[order_R]
    g_RD = gate_R[:, None] * jnp.take(g_MD, order_R // slot_MC.shape[1], axis=0, mode="clip")
    y_MCD = jnp.where(here_MC[..., None], jnp.take(y_RD, slot_MC, axis=0, mode="clip"), 0)
    g_gate_MC = jnp.sum(y_MCD.astype(jnp.float32) * g_MD[:, None, :], axis=-1)
    return g_RD.astype(y_RD.dtype), g_gate_MC, None, None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def combine(y_RD: Float[Array, "R D"], gate_MC: Float[Array, "M C"], plan: Plan) -> Float[Array, "M D"]:
    """sum over the choices of gate * y, in fp32, in the order of the choices; choices without a row give 0.

    Rows of `y_RD` behind the last group are never read, whatever they hold.
    """
    return _weighted_sum(*same_variance(y_RD, gate_MC, plan.order_R, plan.slot_MC, plan.here_MC))
