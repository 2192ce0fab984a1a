"""Sorting tokens by expert and adding them up again, against loops over choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.moe.dispatch import combine, dispatch, dispatch_gates, limit_capacity, plan_rows
from tests.oracles import moe as oracle

M, C, D, E = 9, 2, 4, 5


def draw_experts(kind):
    rng = np.random.default_rng(0)
    expert = np.stack([rng.permutation(E)[:C] for _ in range(M)]).astype(np.int32)
    if kind == "padding":
        expert[[2, 5, 8]] = E
    if kind == "one_expert":
        expert[:, 0], expert[:, 1] = 3, E
    if kind == "empty_experts":
        expert = expert % 2 * 4
    if kind == "nobody":
        expert[:] = E
    return expert


KINDS = ("all", "padding", "one_expert", "empty_experts", "nobody")


@pytest.mark.parametrize("kind", KINDS)
def test_plan_is_a_stable_sort_by_expert(kind):
    expert = draw_experts(kind)
    plan = jax.jit(plan_rows, static_argnums=(1, 2))(expert, E, M * C)
    order, sizes = oracle.sorted_rows(expert, E)
    np.testing.assert_array_equal(plan.order_R[: len(order)], order)
    np.testing.assert_array_equal(plan.group_sizes_E, sizes)
    np.testing.assert_array_equal(plan.here_MC, expert < E)
    for m, c in np.argwhere(expert < E):
        assert plan.order_R[plan.slot_MC[m, c]] == m * C + c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [M * C, 13])
def test_dispatch_and_combine_with_gradients(kind, rows):
    """Rows behind the last group are NaN, in the values and in the incoming gradient of nobody: neither may leak."""
    expert = draw_experts(kind)
    order, _ = oracle.sorted_rows(expert, E)
    if rows < len(order):
        expert[6:] = E  # a smaller buffer is for fewer choices
        order, _ = oracle.sorted_rows(expert, E)
    rng = np.random.default_rng(1)
    x, g = rng.normal(0, 1, (2, M, D)).astype(np.float32)
    gate, scale = rng.random((M, C)).astype(np.float32), rng.normal(0, 1, (rows, 1)).astype(np.float32)
    inside = (np.arange(rows) < len(order))[:, None]

    @jax.jit
    def run(x, gate, expert, scale, inside, g):
        plan = plan_rows(expert, E, rows)

        def block(x, gate):
            x_RD = jnp.where(inside, dispatch(x, plan), 0) * scale * dispatch_gates(gate, plan)[:rows, None]
            return combine(jnp.where(inside, x_RD, jnp.nan), plan)

        out, pull = jax.vjp(block, x, gate)
        return out, *pull(g)

    out, dx, dgate = run(x, gate, expert, scale, inside, g)
    want, want_dx, want_dgate = np.zeros((M, D)), np.zeros((M, D)), np.zeros((M, C))
    for row, choice in enumerate(order):
        m, c = divmod(choice, C)
        want[m] += gate[m, c] * scale[row, 0] * x[m]
        want_dx[m] += gate[m, c] * scale[row, 0] * g[m]
        want_dgate[m, c] = scale[row, 0] * (x[m] @ g[m])
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(dx, want_dx, atol=1e-6)
    np.testing.assert_allclose(dgate, want_dgate, atol=2e-6)


def test_combine_adds_in_fp32_for_bf16_rows():
    plan = plan_rows(jnp.asarray([[0, 1, 2, 3]]), 4, 4)
    y = jnp.asarray([[256.0], [1.0], [1.0], [1.0]], jnp.bfloat16)  # 256 + 1 is 256 in bf16
    out = combine(y, plan)
    assert out.dtype == jnp.float32 and float(out[0, 0]) == 259


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["probability", "choice", "token"])
@pytest.mark.parametrize("capacity", [1, 2, 4, 100])
def test_capacity_keeps_those_of_the_highest_standing(kind, order, capacity):
    """Of equals, and many gates are equal here, the first in token order."""
    expert = draw_experts(kind)
    gate = np.random.default_rng(4).integers(1, 4, expert.shape).astype(np.float32) / 4
    got = np.asarray(limit_capacity(jnp.asarray(expert), jnp.asarray(gate), E, capacity, order))
    np.testing.assert_array_equal(got, oracle.limit(expert, gate, E, capacity, order))
    if capacity == 100:
        np.testing.assert_array_equal(got, expert)
