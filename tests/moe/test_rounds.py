"""A bounded buffer of rows gives the numbers of the unbounded one, in as many rounds as it takes (NUMERICS H5)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixtral_jax.moe.experts import ExpertWeights, grouped_swiglu
from mixtral_jax.moe.transport import exchange_experts
from mixtral_jax.parallel.collectives import varying
from mixtral_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh

M, D, F, E, C = 8, 8, 4, 8, 2  # tokens of one device
LOADS = ("even", "mixed", "padding", "one device without a token", "one expert", "nobody")


def numbers(load, devices):
    """(weights, x, gate, incoming gradient, experts) of all devices together."""
    rng = np.random.default_rng(0)
    tokens = M * devices
    w13, w2 = (rng.normal(0, 0.5, s).astype(np.float32) for s in ((E, D, 2 * F), (E, F, D)))
    x, g = rng.normal(0, 1, (2, tokens, D)).astype(np.float32)
    gate = rng.random((tokens, C)).astype(np.float32)
    expert = np.stack([rng.permutation(E)[:C] for _ in range(tokens)])
    if load == "even":
        expert = np.arange(tokens * C).reshape(tokens, C) % E
    if load == "padding":
        expert[rng.random(tokens) < 0.4] = E
    if load == "one device without a token":
        expert[M : 2 * M] = E
    if load == "one expert":
        expert[:] = (3, E)
    if load == "nobody":
        expert[:] = E
    return (w13, w2), x, gate, g, expert.astype(np.int32)


class Case(NamedTuple):
    """What is compiled."""

    mesh: tuple[tuple[str, int], ...] = (("expert", 8),)
    transport: str = "alltoall"
    factor: float | None = None
    dtype: str = "float32"


@functools.cache
def compiled(case):
    mesh = make_mesh(MeshConfig(**{"data": -1, **dict(case.mesh)}))

    def local(w13, w2, x, gate, g, expert):
        def run(weights, x, gate, sizes):
            return grouped_swiglu(x, gate, weights, sizes, "blocked")

        def loss(w13, w2, x, gate):
            weights = ExpertWeights(*(varying(w, TOKEN_AXES) for w in (w13, w2)))
            y, again = exchange_experts(
                weights, x, expert, gate, run, experts=E, transport=case.transport, capacity=None, factor=case.factor
            )
            return jnp.sum(y.astype(jnp.float32) * g), (y, again[None])

        (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(w13, w2, x, gate)
        return aux, grads

    rows, own = P(TOKEN_AXES), P("expert")
    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(own, own, rows, rows, rows, rows),
            out_specs=((rows, rows), (own, own, rows, rows)), check_vma=True,
        )
    )  # fmt: skip


def result(case, load):
    (w13, w2), x, gate, g, expert = numbers(load, 8)
    w13, w2, x = (jnp.asarray(a, case.dtype) for a in (w13, w2, x))
    return jax.device_get(compiled(case)(w13, w2, x, gate, g, expert))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("transport", ["alltoall", "ring"])
def test_rounds_change_no_number(transport, factor, load):
    (y, _), grads = result(Case(transport=transport, factor=factor), load)
    (want, none), want_grads = result(Case(transport=transport), load)
    np.testing.assert_array_equal(y, want)
    for got, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5)
    assert not none.any()
