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


def window_sizes(sizes_E: Int[Array, "*R E"], start: Int[Array, ""], rows: int) -> Int[Array, "*R E"]:
    """Of groups one after another: how many of each one's rows are among the `rows` from `start` on."""
    ends_E = jnp.cumsum(sizes_E, axis=-1)
    return jnp.maximum(jnp.minimum(ends_E, start + rows) - jnp.maximum(ends_E - sizes_E, start), 0)


def window_of(plan: Plan, index: Int[Array, ""], rows: int) -> Plan:
    """The part of a plan for a larger buffer that is its `index`-th `rows` rows."""
    start = index * rows
    order_R = jax.lax.dynamic_slice_in_dim(jnp.pad(plan.order_R, (0, rows)), start, rows)
    slot_MC = plan.slot_MC - start
    here_MC = plan.here_MC & (slot_MC >= 0) & (slot_MC < rows)
    return Plan(order_R, slot_MC, here_MC, window_sizes(plan.group_sizes_E, start, rows))


def limit_capacity(
    expert_MC: Int[Array, "M C"], gate_MC: Float[Array, "M C"], experts: int, capacity: int, order: str
) -> Int[Array, "M C"]:
    """Give every expert `capacity` of its choices at most; the others become expert number `experts`.

    Kept are, of equals the first in token order: `probability`, those with the largest gates (Megatron-Core's
    token_drop_policy "probs"); `choice`, all first choices before any second one (GShard 2006.16668, algorithm 1);
    `token`, those of the first tokens.
    """
    flat_R = jnp.minimum(expert_MC.reshape(-1), experts)
    position_R = jnp.arange(flat_R.shape[0], dtype=jnp.int32)
    rank_R = {
        "probability": -jax.lax.stop_gradient(gate_MC).reshape(-1),
        "choice": position_R % expert_MC.shape[1],
        "token": position_R,
    }[order]
    sorted_R, _, order_R = jax.lax.sort((flat_R, rank_R, position_R), num_keys=2, is_stable=True)
    first_R = jax.lax.cummax(jnp.where(jnp.diff(sorted_R, prepend=-1) != 0, position_R, 0))  # of the same expert
    kept_R = jnp.where(position_R - first_R < capacity, sorted_R, experts)
    kept_R = jnp.zeros_like(kept_R).at[order_R].set(kept_R, unique_indices=True)
    # saved: gates that are computed again may differ in the last bit, and so in who is dropped
    return checkpoint_name(kept_R.reshape(expert_MC.shape), "route")


@jax.custom_vjp
def _take_rows(x_MD: jax.Array, plan: Plan) -> jax.Array:
    return jnp.take(x_MD, plan.order_R // plan.slot_MC.shape[1], axis=0, mode="clip")


def _take_rows_bwd(saved, g_RD):
    slot_MC, here_MC = saved
    g_MCD = jnp.take(g_RD, slot_MC, axis=0, mode="clip")
    g_MD = jnp.sum(jnp.where(here_MC[..., None], g_MCD, 0), axis=1, dtype=jnp.float32)
    return g_MD.astype(g_RD.dtype), None


_take_rows.defvjp(lambda x_MD, plan: (_take_rows(x_MD, plan), (plan.slot_MC, plan.here_MC)), _take_rows_bwd)


def dispatch(x_MD: Float[Array, "M D"], plan: Plan) -> Float[Array, "R D"]:
    """Each routed row's token. Its gradient gathers by the inverse permutation and sums over the choices in fp32."""
    return _take_rows(*same_variance(x_MD, plan))


@jax.custom_vjp
def _take_gates(gate_MC: jax.Array, plan: Plan) -> jax.Array:
    return gate_MC.reshape(-1)[plan.order_R]


def _take_gates_bwd(saved, g_R):
    slot_MC, here_MC = saved
    return jnp.where(here_MC, jnp.take(g_R, slot_MC, mode="clip"), 0), None


_take_gates.defvjp(lambda gate_MC, plan: (_take_gates(gate_MC, plan), (plan.slot_MC, plan.here_MC)), _take_gates_bwd)


def dispatch_gates(gate_MC: Float[Array, "M C"], plan: Plan) -> Float[Array, " R"]:
    """Each routed row's gate."""
    return _take_gates(*same_variance(gate_MC, plan))


@jax.custom_vjp
def _sum_choices(y_RD: jax.Array, plan: Plan) -> jax.Array:
    y_MCD = jnp.where(plan.here_MC[..., None], jnp.take(y_RD, plan.slot_MC, axis=0, mode="clip"), 0)
    return jnp.sum(y_MCD, axis=1, dtype=jnp.float32)


def _sum_choices_fwd(y_RD, plan):
    like = jnp.zeros((0,), y_RD.dtype)
    return _sum_choices(y_RD, plan), (like, plan.order_R, plan.slot_MC)


def _sum_choices_bwd(saved, g_MD):
    like, order_R, slot_MC = saved
    return jnp.take(g_MD.astype(like.dtype), order_R // slot_MC.shape[1], axis=0, mode="clip"), None


_sum_choices.defvjp(_sum_choices_fwd, _sum_choices_bwd)


def combine(y_RD: Float[Array, "R D"], plan: Plan) -> Float[Array, "M D"]:
    """sum over the choices of y, in fp32, in the order of the choices; choices without a row give 0.

    Rows of `y_RD` behind the last group are never read, whatever they hold; their gradient means nothing.
    """
    return _sum_choices(*same_variance(y_RD, plan))
