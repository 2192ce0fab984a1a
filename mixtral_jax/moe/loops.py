"""The experts in a loop, on some tokens or on some rows at a time, which bounds the buffer of routed rows.

Of a pass only its inputs are kept; the backward pass computes it again. Left to autodiff the gradient of a matrix
would be added up over the passes in the dtype of the matrix: in bf16 it stops growing. And a loop whose number of
passes is known on the device alone has no derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from mixtral_jax.moe.experts import ExpertWeights
from mixtral_jax.parallel import same_variance, variance, varying, zeros

# (weights, x, gate, ids, index) -> what one pass makes; `ids`: all integers that it needs, `index`: its number. It must
# get all that it differentiates by as arguments.
Pass = Callable[[ExpertWeights, jax.Array, jax.Array, Any, jax.Array], Any]


def by_chunks(
    apply: Pass,
    chunk: int,
    experts: int,
    weights: ExpertWeights,
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """`apply` to `chunk` tokens at a time, each with adapter dropout of its own: rows of its first output, joined, and
    the sum of the second, which has no gradient.

    The last chunk is filled up with what is no expert's, number `experts`.
    """
    tokens = x_MD.shape[0]
    filled = (
        jnp.pad(a, ((0, -tokens % chunk), (0, 0)), constant_values=value)
        for a, value in ((x_MD, 0), (expert_MC, experts), (gate_MC, 0))
    )
    x, expert, gate = (a.reshape(-1, chunk, a.shape[1]) for a in filled)
    x, expert, gate, index = same_variance(x, expert, gate, jnp.arange(x.shape[0]))
    leaves, tree = jax.tree.flatten(weights)
    y, extra = _loop(_Static(apply, tree), leaves, x, gate, (expert, index), None, None)
    return y.reshape(-1, x_MD.shape[1])[:tokens], jnp.sum(extra)


def more_rounds(
    apply: Pass,
    rounds: Int[Array, ""],
    weights: ExpertWeights,
    x: Float[Array, "R D"],
    gate: Float[Array, "..."],
    ids: Any,
    first: Float[Array, "N D"],
) -> Float[Array, "N D"]:
    """first + sum of apply(..., index) for index 1 ... rounds - 1, each with adapter dropout of its own.

    Devices that exchange anything in a round must agree on `rounds`.
    """
    leaves, tree = jax.tree.flatten(weights)
    axes = sorted(variance(first))
    leaves, x, gate, ids = jax.tree.map(lambda a: varying(a, axes), (leaves, x, gate, ids))
    return _loop(_Static(apply, tree), leaves, x, gate, ids, rounds, first)


class _Static(NamedTuple):
    """What is no array."""

    apply: Pass
    tree: Any  # of the weights

    def __call__(self, leaves: list[jax.Array], x: jax.Array, gate: jax.Array, ids: Any, index: jax.Array) -> Any:
        weights = jax.tree.unflatten(self.tree, leaves)
        adapters = {name: adapter.part(index) for name, adapter in weights.adapters.items()}
        return self.apply(weights._replace(adapters=adapters), x, gate, ids, index)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(one: _Static, leaves, x, gate, ids, rounds, first):
    """Over the leading axis of x, gate and ids, the passes' outputs stacked; or `rounds` times over all of them."""
    if rounds is None:
        return jax.lax.map(lambda rows: one(leaves, *rows), (x, gate, *ids))
    return jax.lax.fori_loop(1, rounds, lambda index, y: y + one(leaves, x, gate, ids, index), first)


def _loop_forward(one, *args):
    # saved values are arrays only, so what is differentiated by is told by structure: () or None
    learns = [() if leaf.perturbed else None for leaf in args[0]]
    values = jax.tree.map(lambda leaf: leaf.value, args)
    return _loop(one, *values), (values[:-1], learns)


def _loop_backward(one, saved, g):
    (leaves, x, gate, ids, rounds), learns = saved
    g, dfirst = (g[0], None) if rounds is None else (g, g)
    if isinstance(g, SymbolicZero):
        return (None,) * 6

    def merged(learned: list[jax.Array]) -> list[jax.Array]:
        own = iter(learned)
        return [leaf if learn is None else next(own) for leaf, learn in zip(leaves, learns, strict=True)]

    def add(sums: list[jax.Array], g: Any, x: Any, gate: Any, ids: Any, index: Any) -> tuple[list[jax.Array], Any]:
        def run(learned: list[jax.Array], x: jax.Array, gate: jax.Array) -> jax.Array:
            out = one(merged(learned), x, gate, ids, index)
            return out[0] if rounds is None else out

        more, *gradients = jax.vjp(run, learned, x, gate)[1](g)
        return jax.tree.map(jnp.add, sums, more), gradients

    def round(index: jax.Array, totals: Any) -> Any:  # rows of other rounds have a gradient of 0
        sums, more = add(totals[0], g, x, gate, ids, index)
        return sums, jax.tree.map(jnp.add, totals[1], more)

    learned = [leaf for leaf, learn in zip(leaves, learns, strict=True) if learn is not None]
    none = [zeros(w.shape, jnp.float32, w) for w in learned]
    if rounds is None:
        sums, gradients = jax.lax.scan(lambda sums, rows: add(sums, *rows), none, (g, x, gate, *ids))
    else:
        sums, gradients = jax.lax.fori_loop(1, rounds, round, (none, [jnp.zeros_like(x), jnp.zeros_like(gate)]))
    own = (total.astype(w.dtype) for total, w in zip(sums, learned, strict=True))
    return [None if learn is None else next(own) for learn in learns], *gradients, None, None, dfirst


_loop.defvjp(_loop_forward, _loop_backward, symbolic_zeros=True)
