"""Expert parallelism: how tokens reach experts that live on other devices of the `expert` axis.

Both transports give the same numbers. `ring` gathers all tokens of the axis and scatters the summed outputs back:
traffic grows with the axis, not with k. `alltoall` sends each routed row to its expert and back. With an axis of one
device there is nothing to exchange.

A device's rows have an order, and round i handles those of the i-th buffer. Without a bound there is one round, in a
buffer for the worst case; with one there may be several (moe/loops.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixtral_jax.moe.dispatch import Plan, combine, dispatch, dispatch_gates, plan_rows, window_of, window_sizes
from mixtral_jax.moe.experts import ExpertWeights
from mixtral_jax.moe.loops import Pass, in_rounds
from mixtral_jax.parallel import TOKEN_AXES, axis_index, axis_max, axis_size, platform, same_variance, zeros

# weights, rows sorted by local expert (R, D), their gates, rows of each expert (E_local,) -> gate * expert(row), (R, D)
Experts = Callable[[ExpertWeights, Float[Array, "R D"], Float[Array, " R"], Int[Array, " E"]], Float[Array, "R D"]]


class Buffer(NamedTuple):
    """Rows that a device's experts handle at a time, and those that could reach it in all."""

    rows: int
    worst: int


def buffer_of(
    tokens: int, choices: int, experts: int, ranks: int, *, capacity: int | None = None, factor: float | None = None
) -> Buffer:
    """The buffer of a device of an expert axis of `ranks`, each with `tokens` tokens of `choices` choices.

    `capacity`, if any, is the number of rows that one device sends to one expert at most. `factor`: MoeConfig's
    buffer_factor, by the rows of an even load.
    """
    local = experts // ranks
    worst = tokens * min(choices, local)
    if capacity is not None:
        worst = min(worst, local * capacity)
    worst *= ranks
    return Buffer(worst if factor is None else min(worst, math.ceil(factor * tokens * choices)), worst)


def resolve_transport(transport: str, expert_axis: int) -> str:
    """What `auto` stands for: `alltoall`, and `none` wherever the expert axis has one device."""
    if expert_axis == 1:
        return "none"
    return "alltoall" if transport == "auto" else transport


def exchange_experts(
    weights: ExpertWeights,
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
    run: Experts,
    *,
    experts: int,
    transport: str,
    capacity: int | None,
    factor: float | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """sum over the choices of gate * expert(x) for this device's tokens, added in fp32 and returned in x's dtype; and
    how many of its rows were of an exchange in more than one round: all or none.

    `expert_MC` counts all experts; the number `experts` stands for a choice that nobody computes (padding, dropped).
    `capacity`, `factor`: see buffer_of.
    """
    ranks, (tokens, choices) = axis_size("expert"), expert_MC.shape
    buffer = buffer_of(tokens, choices, experts, ranks, capacity=capacity, factor=factor)
    exchange = {"none": _local, "ring": _ring, "alltoall": _alltoall}[resolve_transport(transport, ranks)]
    y_MD, rounds = exchange(weights, x_MD, expert_MC, gate_MC, run, experts // ranks, buffer)
    sent = jnp.sum(expert_MC < experts, dtype=jnp.float32)
    return y_MD.astype(x_MD.dtype), jnp.where(rounds > 1, sent, 0)


def _in_rounds(one: Pass, weights: ExpertWeights, x, gate, ids, mine: jax.Array, buffer: Buffer, *, disjoint: bool):
    """The sum over the rounds of `one`, and their number: this device needs as many as its `mine` rows fill buffers.

    All devices make as many as the one that needs most, and both passes the same: the number is saved.
    """
    if buffer.rows >= buffer.worst:
        return one(weights, x, gate, ids, jnp.zeros((), jnp.int32)), jnp.ones((), jnp.int32)
    rounds = checkpoint_name(axis_max(-(-mine // buffer.rows), TOKEN_AXES), "route")
    return in_rounds(one, rounds, weights, x, gate, ids, disjoint=disjoint), rounds


def _local(weights, x_MD, expert_MC, gate_MC, run: Experts, local: int, buffer: Buffer):
    """All experts are here."""
    plan = plan_rows(expert_MC, local, buffer.worst)

    def one(weights: ExpertWeights, x_MD: jax.Array, gate_MC: jax.Array, plan: Plan, index: jax.Array) -> jax.Array:
        plan = window_of(plan, index, buffer.rows) if buffer.rows < buffer.worst else plan
        y_RD = run(weights, dispatch(x_MD, plan), dispatch_gates(gate_MC, plan), plan.group_sizes_E)
        return combine(y_RD, plan)

    return _in_rounds(one, weights, x_MD, gate_MC, plan, jnp.sum(plan.group_sizes_E), buffer, disjoint=False)


def _ring(weights, x_MD, expert_MC, gate_MC, run: Experts, local: int, buffer: Buffer):
    """Every device sees all tokens of the axis, computes its experts' share, and the shares are summed."""
    x, expert, gate = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_MD, expert_MC, gate_MC))
    mine = expert - axis_index("expert") * local
    mine = jnp.where((mine >= 0) & (mine < local), mine, local)
    out, rounds = _local(weights, x, mine, gate, run, local, buffer)
    return jax.lax.psum_scatter(out.astype(x.dtype), "expert", scatter_dimension=0, tiled=True), rounds


def _alltoall(weights, x_MD, expert_MC, gate_MC, run: Experts, local: int, buffer: Buffer):
    """Each routed row travels to its expert's device and back."""
    ranks = axis_size("expert")
    plan = plan_rows(expert_MC, ranks * local, expert_MC.size)
    sizes_SRE = jax.lax.all_gather(plan.group_sizes_E, "expert").reshape(ranks, ranks, local)  # sender, receiver
    sizes_SRE = checkpoint_name(sizes_SRE, "route")

    def one(weights: ExpertWeights, x_RD: jax.Array, gate_R: jax.Array, sizes_SRE: jax.Array, index: jax.Array):
        sizes_SRE, runs = runs_of(sizes_SRE, index, buffer.rows)
        arrived_SE = jax.lax.dynamic_index_in_dim(sizes_SRE, axis_index("expert"), axis=1, keepdims=False)
        rows = ragged_exchange(x_RD, runs, buffer.rows), ragged_exchange(gate_R, runs, buffer.rows)
        y_RD = _by_expert(partial(run, weights), *rows, arrived_SE)
        return ragged_exchange(y_RD, runs.back, x_RD.shape[0])

    mine = jnp.sum(jax.lax.dynamic_index_in_dim(sizes_SRE, axis_index("expert"), axis=1))
    rows = dispatch(x_MD, plan), dispatch_gates(gate_MC, plan)
    y_RD, rounds = _in_rounds(one, weights, *rows, sizes_SRE, mine, buffer, disjoint=True)
    return combine(y_RD, plan), rounds


def _by_expert(run: Callable[..., jax.Array], x_RD: jax.Array, gate_R: jax.Array, sizes_SE: jax.Array) -> jax.Array:
    """`run` on rows that lie by sender, then by expert; it wants them by expert."""
    local, rows = sizes_SE.shape[1], x_RD.shape[0]
    if local == 1:
        return run(x_RD, gate_R, jnp.sum(sizes_SE, axis=0))
    group_R = jnp.searchsorted(jnp.cumsum(sizes_SE.reshape(-1)), jnp.arange(rows), side="right")
    expert_R1 = jnp.where(group_R < sizes_SE.size, group_R % local, local)[:, None]
    plan = plan_rows(expert_R1, local, rows)
    y_RD = run(dispatch(x_RD, plan), dispatch_gates(gate_R[:, None], plan), plan.group_sizes_E)
    return combine(y_RD, plan).astype(x_RD.dtype)


class Runs(NamedTuple):
    """One run of rows from each device s to each device r of the `expert` axis."""

    sizes_SR: Int[Array, "S R"]
    send_SR: Int[Array, "S R"]  # where it begins at its sender
    arrive_SR: Int[Array, "S R"]  # and at its receiver: in the order of the senders, none over another

    @property
    def back(self) -> Self:
        """The way back of the same rows."""
        return type(self)(self.sizes_SR.T, self.arrive_SR.T, self.send_SR.T)


def runs_of(sizes_SRE: Int[Array, "S R E"], index: Int[Array, ""], rows: int) -> tuple[Int[Array, "S R E"], Runs]:
    """Rows of each expert, and runs, of round `index`, where sizes_SRE[s, r, e] rows go in all rounds.

    A device sends its rows in the order of their receivers. Those that a device receives are ordered by sender, then by
    expert, and round i is of those from i * rows on.
    """
    start, sizes_SR = index * rows, jnp.sum(sizes_SRE, axis=2)
    arriving_RG = jnp.swapaxes(sizes_SRE, 0, 1).reshape(sizes_SRE.shape[1], -1)
    here_SRE = jnp.swapaxes(window_sizes(arriving_RG, start, rows).reshape(sizes_SRE.swapaxes(0, 1).shape), 0, 1)
    before_SR = jnp.cumsum(sizes_SR, axis=0) - sizes_SR
    first_SR = jnp.clip(start - before_SR, 0, sizes_SR)  # rows that went before
    send_SR = jnp.cumsum(sizes_SR, axis=1) - sizes_SR + first_SR
    arrive_SR = jnp.clip(before_SR + first_SR - start, 0, rows)
    return here_SRE, Runs(jnp.sum(here_SRE, axis=2), send_SR, arrive_SR)


def ragged_exchange(x_RD: Float[Array, "R *D"], runs: Runs, rows: int) -> Float[Array, "rows *D"]:
    """All-to-all of runs of rows along `expert` into a buffer of `rows`; rows of no run are 0.

    The gradient is the exchange the other way.
    """
    return _exchange((x_RD.shape[0], rows), *same_variance(x_RD, runs))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(rows: tuple[int, int], x_RD: jax.Array, runs: Runs) -> jax.Array:
    return _moved(x_RD, runs, rows[1])


def _exchange_backward(rows, runs, g_RD):
    return _moved(g_RD, runs.back, rows[0]), None


_exchange.defvjp(lambda rows, x_RD, runs: (_exchange(rows, x_RD, runs), runs), _exchange_backward)


def _moved(x_RD: jax.Array, runs: Runs, rows: int) -> jax.Array:
    me = axis_index("expert")
    if platform() != "cpu":

        def mine(a_SR: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(a_SR, me, axis=0, keepdims=False)

        out = zeros((rows, *x_RD.shape[1:]), x_RD.dtype, x_RD)
        ways = (runs.send_SR, runs.sizes_SR, runs.arrive_SR, runs.sizes_SR.T)
        return jax.lax.ragged_all_to_all(x_RD, out, *map(mine, ways), axis_name="expert")
    # CPU has no such collective: gather everything and pick, with the same result.
    all_SRD = jax.lax.all_gather(x_RD, "expert")
    sizes_S, send_S, arrive_S = (jax.lax.dynamic_index_in_dim(a, me, axis=1, keepdims=False) for a in runs)
    row_R = jnp.arange(rows)
    sender_R = jnp.searchsorted(arrive_S, row_R, side="right") - 1  # the last that begins no later
    within_R = row_R - arrive_S[sender_R]
    inside_R = (sender_R >= 0) & (within_R < sizes_S[sender_R])
    picked = all_SRD[sender_R, jnp.clip(send_S[sender_R] + within_R, 0, x_RD.shape[0] - 1)]
    return jnp.where(inside_R.reshape(-1, *(1,) * (x_RD.ndim - 1)), picked, 0)
