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
from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel import same_variance, zeros

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
    y, extra = _chunks(_Static(apply, tree), leaves, x, gate, (expert, index))
    return y.reshape(-1, x_MD.shape[1])[:tokens], jnp.sum(extra)


def in_rounds(
    apply: Pass,
    rounds: Int[Array, ""],
    weights: ExpertWeights,
    x: Float[Array, "R D"],
    gate: Float[Array, "..."],
    ids: Any,
    *,
    disjoint: bool,
) -> Float[Array, "R D"]:
    """Sum of apply(..., index) for index 0 ... rounds - 1, each with adapter dropout of its own.

    `disjoint`: each row of the sum, and of the gradient of x, is of one round and 0 in all others; else the sum is in
    fp32, and so are the outputs. Devices that exchange anything in a round must agree on `rounds`.

    The first round is differentiated as anything is, and costs what it costs without others. Their backward pass begins
    with its gradients, and so behind it: at no time are there buffers for more than one round.
    """
    leaves, tree = jax.tree.flatten(weights)
    leaves, x, gate, ids = same_variance(leaves, x, gate, ids)
    one = _Static(apply, tree, disjoint)
    leaves, x, gate, ticket = _before(one, leaves, x, gate, ids, rounds)
    first = one(leaves, x, gate, ids, jnp.zeros((), jnp.int32))
    return _behind(one, leaves, x, gate, ids, rounds, first, ticket)


class _Static(NamedTuple):
    """What is no array."""

    apply: Pass
    tree: Any  # of the weights
    disjoint: bool = True

    def join(self, total: jax.Array, more: jax.Array) -> jax.Array:
        """The sum of what rounds make."""
        return jnp.where(more != 0, more, total) if self.disjoint else total + more

    def __call__(self, leaves: list[jax.Array], x: jax.Array, gate: jax.Array, ids: Any, index: jax.Array) -> Any:
        weights = jax.tree.unflatten(self.tree, leaves)
        adapters = {name: adapter.part(index) for name, adapter in weights.adapters.items()}
        return self.apply(weights._replace(adapters=adapters), x, gate, ids, index)


class _Saved(NamedTuple):
    """For the backward pass."""

    leaves: list[jax.Array]  # of the weights
    learns: list[Any]  # (): differentiated by, None: not; told by structure, for saved values are arrays only
    rest: tuple[Any, ...]

    def pick(self, values: list[Any]) -> list[Any]:
        """Of values of all leaves, those of the learned ones."""
        return [value for value, learn in zip(values, self.learns, strict=True) if learn is not None]

    def spread(self, learned: list[Any], others: list[Any]) -> list[Any]:
        """All leaves: learned ones in their order, and the others."""
        own = iter(learned)
        return [other if learn is None else next(own) for learn, other in zip(self.learns, others, strict=True)]

    def add(self, run: Any, sums: list[jax.Array], g: Any, x: Any, gate: Any, *ids: Any) -> tuple[list[jax.Array], Any]:
        """The fp32 sums of the learned leaves' gradients and those of one more pass; (dx, dgate) of that pass."""

        def one(learned: list[jax.Array], x: jax.Array, gate: jax.Array) -> jax.Array:
            return run(self.spread(learned, self.leaves), x, gate, *ids)

        more, *gradients = jax.vjp(one, self.pick(self.leaves), x, gate)[1](g)
        return jax.tree.map(jnp.add, sums, more), gradients

    def gradients(self, sums: list[jax.Array]) -> list[jax.Array | None]:
        """Of all leaves, in their own dtype; None for those without."""
        own = [total.astype(w.dtype) for total, w in zip(sums, self.pick(self.leaves), strict=True)]
        return self.spread(own, [None] * len(self.leaves))


def _values(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], _Saved]:
    """Of the arguments of a forward rule with symbolic zeros: their values, and what to save."""
    learns = [() if leaf.perturbed else None for leaf in args[0]]
    values = jax.tree.map(lambda leaf: leaf.value, args)
    return values, _Saved(values[0], learns, values[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(one: _Static, leaves, x, gate, ids):
    """Over the leading axis of x, gate and ids."""
    return jax.lax.map(lambda rows: one(leaves, *rows), (x, gate, *ids))


def _chunks_forward(one, *args):
    values, saved = _values(args)
    return _chunks(one, *values), saved


def _chunks_backward(one, saved, gradients):
    g, (x, gate, ids) = gradients[0], saved.rest
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    none = [zeros(w.shape, jnp.float32, w) for w in saved.pick(saved.leaves)]
    add = partial(saved.add, lambda *rows: one(*rows)[0])
    sums, (dx, dgate) = jax.lax.scan(lambda sums, rows: add(sums, *rows), none, (g, x, gate, *ids))
    return saved.gradients(sums), dx, dgate, None


_chunks.defvjp(_chunks_forward, _chunks_backward, symbolic_zeros=True)


def _further(rounds: jax.Array, body: Callable[..., Any], carry: Any, *given: Any) -> Any:
    """carry = body(carry, index, *given) for index 1 ... rounds - 1."""

    def one(index: jax.Array, carry: Any) -> Any:
        return body(carry, *quirks.barrier(quirks.HOISTS_INVARIANTS, (index, *given)))

    return jax.lax.fori_loop(1, rounds, one, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _before(one: _Static, leaves, x, gate, ids, rounds):
    """What the first round takes, and a ticket to hand to `_behind`, which returns its gradient for it."""
    return leaves, x, gate, zeros(x.shape, x.dtype if one.disjoint else jnp.float32, x)


def _before_forward(one, *args):
    values, saved = _values(args)
    return _before(one, *values), saved


def _before_backward(one, saved, gradients):
    """The further rounds' part, added to the first one's."""
    (firsts, dx, dgate, g), (x, gate, ids, rounds) = gradients, saved.rest
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None

    def known(d: Any, like: jax.Array, dtype: Any) -> jax.Array:
        return zeros(like.shape, dtype, like) if isinstance(d, SymbolicZero) else d.astype(dtype)

    def round(totals: Any, index: jax.Array, leaves: list[jax.Array], *rows: Any) -> Any:
        sums, more = saved._replace(leaves=leaves).add(one, totals[0], *rows, index)
        return sums, jax.tree.map(one.join, totals[1], more)

    pairs = zip(saved.pick(firsts), saved.pick(saved.leaves), strict=True)
    sums = [known(d, w, jnp.float32) for d, w in pairs]
    totals = [known(d, a, a.dtype if one.disjoint else jnp.float32) for d, a in ((dx, x), (dgate, gate))]
    sums, (dx, dgate) = _further(rounds, round, (sums, totals), saved.leaves, g, x, gate, ids)
    return saved.gradients(sums), dx.astype(x.dtype), dgate.astype(gate.dtype), None, None


_before.defvjp(_before_forward, _before_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _behind(one: _Static, leaves, x, gate, ids, rounds, first, ticket):
    """The first round's sum and that of the others."""

    def add(y: jax.Array, index: jax.Array, leaves: list[jax.Array], *rows: Any) -> jax.Array:
        x, gate, ids = rows
        return one.join(y, one(leaves, x, gate, ids, index))

    return _further(rounds, add, first, leaves, x, gate, ids)


def _behind_backward(one, _, g):
    return None, None, None, None, None, g, g


_behind.defvjp(lambda one, *args: (_behind(one, *args), None), _behind_backward)
