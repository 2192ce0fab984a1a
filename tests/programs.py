"""What a traced program does, equation by equation: its sums and its collectives, with where they stand."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

SUMS = ("reduce_sum", "cumsum", "scatter-add", "scatter_add", "cumlogsumexp", "reduce_window_sum")
REDUCTIONS = ("psum", "psum2", "psum_invariant", "reduce_scatter", "psum_scatter")


class Equation(NamedTuple):
    """One equation, and the lengths of the scans around it (0 for a loop of unknown length)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # of a collective
    loops: tuple[int, ...]

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size


def equations(jaxpr, loops: tuple[int, ...] = ()) -> Iterator[Equation]:
    """Of a jaxpr and all that it calls. An addition to what a loop carries is named `carried_sum`."""
    for eqn in jaxpr.eqns:
        axes = eqn.params.get("axes") or eqn.params.get("axis_name") or ()
        axes = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
        for out in eqn.outvars:
            if hasattr(out.aval, "dtype") and not eqn.params.get("unique_indices"):  # a permutation adds nothing
                yield Equation(eqn.primitive.name, str(out.aval.dtype), tuple(out.aval.shape), axes, loops)
        inner = loops
        if eqn.primitive.name == "scan":
            inner = (*loops, eqn.params["length"])
            first = eqn.params["num_consts"]
            yield from _carried(eqn.params["jaxpr"].jaxpr, first, eqn.params["num_carry"], inner)
        elif eqn.primitive.name == "while":
            inner = (*loops, 0)
            body = eqn.params["body_jaxpr"].jaxpr
            first = eqn.params["body_nconsts"]
            yield from _carried(body, first, len(body.outvars), inner)
        for param in eqn.params.values():
            for sub in param if isinstance(param, (list, tuple)) else [param]:
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from equations(sub, inner)


def _carried(body, first: int, count: int, loops: tuple[int, ...]) -> Iterator[Equation]:
    """The carries of a loop that are added to as they are, a sum over its rounds."""
    made = {out: eqn for eqn in body.eqns for out in eqn.outvars}
    for index in range(count):
        carried, out = body.invars[first + index], body.outvars[index]
        eqn = made.get(out) if not isinstance(out, jax.extend.core.Literal) else None
        if eqn is not None and eqn.primitive.name in ("add", "add_any") and carried in eqn.invars:
            yield Equation("carried_sum", str(out.aval.dtype), tuple(out.aval.shape), (), loops)
