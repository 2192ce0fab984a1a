"""Expert parallelism: how tokens reach experts that live on other devices of the `expert` axis.

Both transports give the same numbers. `ring` gathers all tokens of the axis and scatters the summed outputs back:
traffic grows with the axis, not with k. `alltoall` sends each routed row to its expert and back. With an axis of one
device there is nothing to exchange.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.moe.dispatch import combine, dispatch, dispatch_gates, plan_rows
from mixtral_jax.parallel import axis_index, axis_size, platform, same_variance, zeros

# rows sorted by local expert (R, D), their gates, rows of each expert (E_local,) -> gate * expert(row), (R, D)
Experts = Callable[[Float[Array, "R D"], Float[Array, " R"], Int[Array, " E"]], Float[Array, "R D"]]


def resolve_transport(transport: str, expert_axis: int) -> str:
    """What `auto` stands for: `alltoall`, and `none` wherever the expert axis has one device."""
    if expert_axis == 1:
        return "none"
    return "alltoall" if transport == "auto" else transport


def exchange_experts(
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
    run: Experts,
    *,
    experts: int,
    transport: str,
    capacity: int | None,
) -> Float[Array, "M D"]:
    """sum over the choices of gate * expert(x) for this device's tokens, added in fp32 and returned in x's dtype.

    `expert_MC` counts all experts; the number `experts` stands for a choice that nobody computes (padding, dropped).
    `capacity`, if any, is the number of rows that one device sends to one expert at most; it bounds the buffers.
    """
    tokens, choices = expert_MC.shape
    local = experts // axis_size("expert")
    bound = tokens * min(choices, local)
    if capacity is not None:
        bound = min(bound, local * capacity)
    exchange = {"none": _local, "ring": _ring, "alltoall": _alltoall}[resolve_transport(transport, experts // local)]
    return exchange(x_MD, expert_MC, gate_MC, run, local, bound)


def _local(x_MD, expert_MC, gate_MC, run: Experts, local: int, bound: int) -> jax.Array:
    """All experts are here."""
    plan = plan_rows(expert_MC, local, bound)
    y_RD = run(dispatch(x_MD, plan), dispatch_gates(gate_MC, plan), plan.group_sizes_E)
    return combine(y_RD, plan).astype(x_MD.dtype)


def _ring(x_MD, expert_MC, gate_MC, run: Experts, local: int, bound: int) -> jax.Array:
    """Every device sees all tokens of the axis, computes its experts' share, and the shares are summed."""
    x, expert, gate = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_MD, expert_MC, gate_MC))
    mine = expert - axis_index("expert") * local
    mine = jnp.where((mine >= 0) & (mine < local), mine, local)
    out = _local(x, mine, gate, run, local, bound * axis_size("expert"))
    return jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)


def _alltoall(x_MD, expert_MC, gate_MC, run: Experts, local: int, bound: int) -> jax.Array:
    """Each routed row travels to its expert's device and back."""
    ranks, me = axis_size("expert"), axis_index("expert")
    plan = plan_rows(expert_MC, ranks * local, expert_MC.size)
    sizes_SRE = jax.lax.all_gather(plan.group_sizes_E, "expert").reshape(ranks, ranks, local)  # sender, receiver
    sizes_SR = jnp.sum(sizes_SRE, axis=2)
    received = ragged_exchange(dispatch(x_MD, plan), sizes_SR, bound * ranks)
    gates = ragged_exchange(dispatch_gates(gate_MC, plan), sizes_SR, bound * ranks)
    # Rows arrive by sender, then by expert; the grouped matmul wants them by expert.
    arrived_G = jax.lax.dynamic_index_in_dim(sizes_SRE, me, axis=1, keepdims=False).reshape(-1)
    row_R = jnp.arange(received.shape[0])
    group_R = jnp.searchsorted(jnp.cumsum(arrived_G), row_R, side="right")
    expert_R1 = jnp.where(group_R < ranks * local, group_R % local, local)[:, None]
    regroup = plan_rows(expert_R1, local, received.shape[0])
    y_RD = run(dispatch(received, regroup), dispatch_gates(gates[:, None], regroup), regroup.group_sizes_E)
    y_RD = combine(y_RD, regroup).astype(x_MD.dtype)
    return combine(ragged_exchange(y_RD, sizes_SR.T, expert_MC.size), plan).astype(x_MD.dtype)


def ragged_exchange(x_RD: Float[Array, "R *D"], sizes_SR: Int[Array, "S S"], rows: int) -> Float[Array, "rows *D"]:
    """All-to-all of unequal runs of rows along `expert`: sizes_SR[s, r] rows go from device s to device r.

    Runs lie one after another in the order of their receivers when sent and of their senders when they arrive; rows
    behind the last are 0. The gradient is the exchange the other way.
    """
    return _exchange((x_RD.shape[0], rows), *same_variance(x_RD, sizes_SR))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(rows: tuple[int, int], x_RD: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    return _moved(x_RD, sizes_SR, rows[1])


def _exchange_forward(rows, x_RD, sizes_SR):
    return _exchange(rows, x_RD, sizes_SR), sizes_SR


def _exchange_backward(rows, sizes_SR, g_RD):
    return _moved(g_RD, sizes_SR.T, rows[0]), None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _moved(x_RD: jax.Array, sizes_SR: jax.Array, rows: int) -> jax.Array:
    me = axis_index("expert")
    before_send = jnp.cumsum(sizes_SR, axis=1) - sizes_SR
    before_arrive = jnp.cumsum(sizes_SR, axis=0) - sizes_SR
    if platform() != "cpu":

        def mine(a_SR: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(a_SR, me, axis=0, keepdims=False)

        out = zeros((rows, *x_RD.shape[1:]), x_RD.dtype, x_RD)
        send_sizes, receive_sizes = mine(sizes_SR), mine(sizes_SR.T)
        return jax.lax.ragged_all_to_all(
            x_RD, out, mine(before_send), send_sizes, mine(before_arrive), receive_sizes, axis_name="expert"
        )
    # CPU has no such collective: gather everything and pick, with the same result.
    all_SRD = jax.lax.all_gather(x_RD, "expert")
    arrive_S = jax.lax.dynamic_index_in_dim(sizes_SR, me, axis=1, keepdims=False)
    ends_S = jnp.cumsum(arrive_S)
    row_R = jnp.arange(rows)
    sender_R = jnp.minimum(jnp.searchsorted(ends_S, row_R, side="right"), sizes_SR.shape[0] - 1)
    within_R = row_R - (ends_S - arrive_S)[sender_R]
    source_R = before_send[sender_R, me] + within_R
    picked = all_SRD[sender_R, jnp.clip(source_R, 0, x_RD.shape[0] - 1)]
    return jnp.where((row_R < ends_S[-1]).reshape(-1, *(1,) * (x_RD.ndim - 1)), picked, 0)
