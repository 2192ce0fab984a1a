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
            if "ft_in" in eqn.params:  # jax 0.12: constants, carries, rows
                first, carries, _ = map(len, eqn.params["ft_in"].unpack())
            else:
                first, carries = eqn.params["num_consts"], eqn.params["num_carry"]
            yield from _carried(eqn.params["jaxpr"].jaxpr, first, carries, inner)
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
        eqn = _source(out, made)
        if eqn is not None and eqn.primitive.name == "dynamic_update_slice" and eqn.invars[0] is carried:
            eqn = _source(eqn.invars[1], made)  # a part of the carry is written: is it a sum with what stood there?
            kept = {v for v in made if _source(v, made, stop="dynamic_slice") is not None}
        else:
            kept = {carried, *(v for v in made if _plain(v, made) is carried)}
        if eqn is not None and eqn.primitive.name in ("add", "add_any") and any(v in kept for v in eqn.invars):
            yield Equation("carried_sum", str(carried.aval.dtype), tuple(out.aval.shape), (), loops)


SAME = ("convert_element_type", "reduce_precision", "reshape", "squeeze", "broadcast_in_dim", "pvary", "copy")


def _plain(var, made):
    """The variable behind changes of dtype and shape alone."""
    while not isinstance(var, jax.extend.core.Literal) and var in made and made[var].primitive.name in SAME:
        var = made[var].invars[0]
    return var


def _source(var, made, stop: str | None = None):
    """The equation that makes a variable, changes of dtype and shape left out; with `stop`, only one of that name."""
    var = _plain(var, made)
    eqn = None if isinstance(var, jax.extend.core.Literal) else made.get(var)
    return eqn if stop is None or (eqn is not None and eqn.primitive.name == stop) else None
