"""Where a run stands in its data: what a checkpoint holds of it, and which rows come next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, Self

from mixtral_jax.data.rows.order import ORDER, GlobalOrder, Leg


class Mixture(NamedTuple):
    """A phase of the run, resolved: what is read from the batch behind `from_step` done updates on."""

    from_step: int
    shares: dict[str, Fraction]
    fingerprint: str  # of the sources' rows, the shares, the seed and the order's version


@dataclass(frozen=True)
class Position:
    """`step` updates are done and the next row is `row`, of which `drawn` rows of each source lie before.

    The default is a run's beginning. `sources` are the fingerprints of the rows that `drawn` counts, `leg` is where
    the row before lies (its shares are not kept: the fingerprint tells whether they are the same). `lost` of the rows
    were passed over by roll backs.
    """

    step: int = 0
    row: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    leg: Leg | None = None
    lost: int = 0

    @classmethod
    def read(cls, step: int, dataset: Mapping[str, Any]) -> Self | None:
        """That of a checkpoint's `dataset` behind `step` updates; None where rows came in another order (0.1.0)."""
        if dataset.get("order") != ORDER:
            return None
        leg = dataset["leg"]
        return cls(
            step, int(dataset["next_row"]), dataset["drawn"], dataset["sources"],
            Leg(leg["first_row"], leg["drawn"], {}, leg["fingerprint"]), dataset.get("lost", 0),
        )  # fmt: skip

    def note(self) -> dict[str, Any]:
        """What `read` reads: numbers and text, for a checkpoint's `dataset`."""
        assert self.leg is not None
        drawn = {name: n for name, n in self.leg.drawn.items() if n}  # the same over resumes, which fill in zeros
        leg = {"first_row": self.leg.first_row, "drawn": drawn, "fingerprint": self.leg.fingerprint}
        noted = {"drawn": dict(self.drawn), "sources": dict(self.sources), "lost": self.lost}
        return {"order": ORDER, "next_row": self.row, "leg": leg, "fingerprint": self.leg.fingerprint, **noted}

    def at(self, step: int, row: int, order: GlobalOrder, sources: Mapping[str, str]) -> "Position":
        """The position further on in an order that began here; a source that is gone keeps its place for its return.

        Args:
            sources: fingerprint of the rows of each source of the order.
        """
        leg = order.leg(row - 1) if row > self.row else self.leg or order.leg(row)
        return Position(step, row, {**self.drawn, **order.drawn(row)}, {**self.sources, **sources}, leg, self.lost)

    def others(self, sources: Mapping[str, str]) -> list[str]:
        """Sources of which rows were read, and whose rows are others now: they begin at their first."""
        return [n for n, found in sources.items() if self.drawn.get(n) and self.sources.get(n) != found]

    def renamed(self, sources: Mapping[str, str]) -> list[tuple[str, str]]:
        """Sources that are new, each with one that is gone, of whose rows, the same, some were read."""
        gone = {self.sources[name]: name for name, n in self.drawn.items() if n and name not in sources}
        return [(name, gone[found]) for name, found in sources.items() if found in gone and not self.drawn.get(name)]

    def goes_on(self, mixture: Mixture, sources: Mapping[str, str]) -> bool:
        """Whether this mixture, that of the step, was read before the row, or begins here with the same rows."""
        if self.leg is None or self.leg.fingerprint == mixture.fingerprint:
            return True
        return self.step == mixture.from_step and not {*self.others(sources)} & mixture.shares.keys()


def at_step(mixtures: Sequence[Mixture], step: int) -> Mixture:
    """The phase that the batch behind `step` done updates is read in."""
    return [mixture for mixture in mixtures if mixture.from_step <= step][-1]


def batches(epochs: float, rows: int, global_batch_size: int, trained: int = 0) -> int:
    """Until so many passes over the rows are trained on, `trained` rows of them before; 1.1 is eleven tenths."""
    return max(0, math.ceil((Fraction(str(epochs)) * rows - trained) / global_batch_size))


def order_from(
    position: Position, seed: int, rows: Mapping[str, int], sources: Mapping[str, str], mixtures: Sequence[Mixture],
    global_batch_size: int,
) -> GlobalOrder:  # fmt: skip
    """The rows from a position on: its own leg where the mixture is the same, else a new one, then later mixtures.

    In a new leg every source goes on where it stood, if its rows are the same; others begin at their first.

    Args:
        rows, sources: rows and fingerprint of each source, by name.
    """
    mixture, leg = at_step(mixtures, position.step), position.leg
    first, drawn = position.row, position.drawn
    if leg is not None and leg.fingerprint == mixture.fingerprint:
        first, drawn = leg.first_row, {**drawn, **{name: leg.drawn.get(name, 0) for name in mixture.shares}}
    same = {name for name, fingerprint in sources.items() if position.sources.get(name) == fingerprint}
    legs = [Leg(first, {n: drawn.get(n, 0) for n in rows if n in same}, mixture.shares, mixture.fingerprint)]
    for later in mixtures:
        if later.from_step > position.step and later.fingerprint != legs[-1].fingerprint:
            first = position.row + (later.from_step - position.step) * global_batch_size
            legs.append(Leg(first, GlobalOrder(seed, rows, legs).drawn(first), later.shares, later.fingerprint))
    return GlobalOrder(seed, rows, legs)
