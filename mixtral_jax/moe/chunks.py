"""The experts on some tokens at a time, which bounds the buffer of routed rows.

Of a chunk only its inputs are kept; the backward pass computes it again. Left to autodiff the gradient of a matrix
would be added up over the chunks in the dtype of the matrix: in bf16 it stops growing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from mixtral_jax.moe.experts import ExpertWeights
from mixtral_jax.parallel import same_variance, zeros

Apply = Callable[..., jax.Array]  # (weights, x_MD, expert_MC, gate_MC) -> y_MD
Ids = tuple[jax.Array, jax.Array]  # experts of the rows of each chunk, numbers of the chunks


def by_chunks(
    apply: Apply,
    chunk: int,
    experts: int,
    weights: ExpertWeights,
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
) -> Float[Array, "M D"]:
    """apply(weights, ...) on `chunk` tokens at a time, each with adapter dropout of its own.

    The last chunk is filled up with what is no expert's, number `experts`. `apply` must get all that it differentiates
    by as arguments.
    """
    tokens = x_MD.shape[0]
    filled = (
        jnp.pad(a, ((0, -tokens % chunk), (0, 0)), constant_values=value)
        for a, value in ((x_MD, 0), (expert_MC, experts), (gate_MC, 0))
    )
    x, expert, gate = (a.reshape(-1, chunk, a.shape[1]) for a in filled)
    x, expert, gate, index = same_variance(x, expert, gate, jnp.arange(x.shape[0]))
    leaves, tree = jax.tree.flatten(weights)
    return _run(_Static(apply, tree), leaves, x, gate, (expert, index)).reshape(-1, x_MD.shape[1])[:tokens]


class _Static(NamedTuple):
    """What is no array."""

    apply: Apply
    tree: Any  # of the weights

    def __call__(self, leaves: list[jax.Array], x: jax.Array, gate: jax.Array, ids: Ids) -> jax.Array:
        weights, (expert, index) = jax.tree.unflatten(self.tree, leaves), ids
        adapters = {name: adapter.part(index) for name, adapter in weights.adapters.items()}
        return self.apply(weights._replace(adapters=adapters), x, expert, gate)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(one: _Static, leaves: list[jax.Array], x: jax.Array, gate: jax.Array, ids: Ids) -> jax.Array:
    return jax.lax.map(lambda rows: one(leaves, *rows), (x, gate, ids))


def _run_forward(one, *args):
    # saved values are arrays only, so what is differentiated by is told by structure: () or None
    learns = [() if leaf.perturbed else None for leaf in args[0]]
    values = jax.tree.map(lambda leaf: leaf.value, args)
    return _run(one, *values), (values, learns)


def _run_backward(one, saved, g):
    (leaves, x, gate, ids), learns = saved
    if isinstance(g, SymbolicZero):
        return None, None, None, None

    def merged(learned: list[jax.Array]) -> list[jax.Array]:
        own = iter(learned)
        return [leaf if learn is None else next(own) for leaf, learn in zip(leaves, learns, strict=True)]

    def chunk(sums: list[jax.Array], rows: Any) -> tuple[list[jax.Array], Any]:
        *values, ids, g = rows
        run = jax.vjp(lambda learned, x, gate: one(merged(learned), x, gate, ids), learned, *values)[1]
        more, *gradients = run(g)
        return jax.tree.map(jnp.add, sums, more), gradients

    learned = [leaf for leaf, learn in zip(leaves, learns, strict=True) if learn is not None]
    sums, (dx, dgate) = jax.lax.scan(chunk, [zeros(w.shape, jnp.float32, w) for w in learned], (x, gate, ids, g))
    own = (total.astype(w.dtype) for total, w in zip(sums, learned, strict=True))
    return [None if learn is None else next(own) for learn in learns], dx, dgate, None


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)
