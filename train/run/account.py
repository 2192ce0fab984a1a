"""Where a run stands in its data: the position that a checkpoint keeps, and what was read of each source."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mixtral_jax.data.prepare import PreparedData
from mixtral_jax.data.rows import Position, at_step
from mixtral_jax.train.checkpoints import Found, Say
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.hooks import Moment

_ORDERS = ("seed:", "seq_len:", "data.")
_NO_ORDER = ("data.cache_dir:", "data.staging_", "data.workers:", "data.restart:", "data.epochs:", "data.validation:")


class Account:
    """The rows of each step from where the run stands, and what was read of each source up to them, over all resumes.

    The order and the sizes of the rows say all of it, so no process asks another. Rows that a roll back passes over
    are drawn, and their tokens are not seen. A hook too: it says where a phase begins.

    Args:
        seen: (tokens, bytes) of each source that were seen before.
    """

    def __init__(
        self, prepared: PreparedData, start: Position, batch: int, seen: Mapping[str, Sequence[int]], say: Say
    ):
        self.start, self.order = start, prepared.order_from(start, batch)
        self._prepared, self._batch, self._say = prepared, batch, say
        self._sizes = {source.name: source.sizes() for source in prepared.train}
        self._seen = {name: np.array(counts, np.int64) for name, counts in seen.items()}
        self._summed = start.row  # the rows before it are in `seen`
        self.last = self.count(start.step)  # what was counted last

    def row(self, step: int) -> int:
        """The row that the step behind this one begins with."""
        return self.start.row + (step - self.start.step) * self._batch

    def note(self, step: int) -> dict[str, Any]:
        """What a checkpoint behind this step keeps."""
        self.count(step)
        here = self.start.at(step, self.row(step), self.order, self._prepared.sources)
        return {**here.note(), "seen": {name: counts.tolist() for name, counts in self._seen.items()}}

    def metrics(self, step: int) -> dict[str, float | None]:
        """data/* behind a step that was done."""
        phase: dict[str, float | None] = {}
        if self._prepared.config.phases:
            phase["data/phase"] = self._phase(step - 1)
        return phase | {f"data/{name}/{key}": n for name, found in self.count(step).items() for key, n in found.items()}

    def count(self, step: int) -> dict[str, dict[str, int | float]]:
        """Of each source the rows that were drawn up to a step that was done, in epochs too; tokens and bytes seen."""
        row, found = self.row(step), dict[str, dict[str, int | float]]()
        assert row >= self._summed, "steps are counted in their order"
        drawn, taken = self.order.drawn(row), self.order.taken(self._summed, row)
        for source in self._prepared.train:
            seen = self._seen.setdefault(source.name, np.zeros(2, np.int64))
            seen += self._sizes[source.name][taken[source.name]].sum(axis=0, dtype=np.int64)
            rows, (tokens, size) = drawn[source.name], seen.tolist()
            found[source.name] = {"rows": rows, "epoch": rows / source.rows, "tokens": tokens, "bytes": size}
        self._summed, self.last = row, found
        return found

    def back_to(self, found: Found, row: int) -> "Account":
        """That of a run that goes back to a checkpoint, and on with another row, up to which all counts as drawn."""
        start = self.start.at(found.step, row, self.order, self._prepared.sources)
        noted = found.dataset.get("next_row", 0) - found.dataset.get("lost", 0)
        trained = noted if found.step < self.start.step else self.row(found.step) - self.start.lost
        start = replace(start, lost=max(0, row - trained))
        return Account(self._prepared, start, self._batch, found.dataset.get("seen", {}), self._say)

    def due(self, step: int, last: bool) -> bool:
        return not last and any(step == mixture.from_step for mixture in self._prepared.mixtures)

    def run(self, moment: Moment) -> None:
        number, count = self._phase(moment.step), len(self._prepared.mixtures)
        mixture = self._prepared.mixtures[number - 1]
        parts = ", ".join(f"{name} {100 * float(share):.4g} %" for name, share in mixture.shares.items())
        row = self.row(moment.step)
        self._say(f"phase {number} of {count} begins behind step {moment.step}, with row {row}: {parts}")

    def _phase(self, step: int) -> int:
        """The number, from 1 on, of the phase that the batch behind these updates is of."""
        return sum(mixture.from_step <= step for mixture in self._prepared.mixtures)


def check_order(found: Found, config: RunConfig) -> None:
    """Whether the position of a checkpoint means something in the order of today, or is to be left.

    Raises:
        UserError: neither.
    """
    if not config.data.restart and Position.read(found.step, found.dataset) is None:
        raise UserError(
            f"{found.name} was made by version 0.1.0, whose rows came in another order: its position means nothing "
            "in this one. Set data.restart=true to begin at the first row of every source, with its weights"
        )


def begin_at(
    found: Found | None, prepared: PreparedData, config: RunConfig, changed: Sequence[str], say: Say
) -> Position:
    """The position in the data that the run goes on from: every source where it stood, where its rows are the same.

    Args:
        changed: `a.b: old -> new` of every setting that is another one than the checkpoint's.

    Raises:
        UserError: another mixture than the checkpoint's is to be read, and neither data.restart nor resume_from says
            so; see also `check_order`.
    """
    if found is None:
        return Position()
    check_order(found, config)
    position, restart = Position.read(found.step, found.dataset), config.data.restart
    if position is None:
        say(f"{found.name} was made by version 0.1.0, whose rows came in another order: every source begins at row 0")
        return Position(found.step)
    if not position.goes_on(at_step(prepared.mixtures, found.step), prepared.sources):
        if not restart and not found.trunk:
            raise UserError(_other_data(found, prepared, changed))
        say(f"the data are read in another mixture from row {position.row} on: each source goes on where it stood")
        position = replace(position, leg=None)  # a new one begins here
    for name in position.others(prepared.sources):
        say(f"source {name} has other rows than those that were read of it: it begins at its first")
    for name, old in position.renamed(prepared.sources):
        say(
            f"source {name} has the rows of source {old}, of which {position.drawn[old]} were read, and begins at its "
            f"first: name it {old} to go on behind those"
        )
    return position


def _other_data(found: Found, prepared: PreparedData, changed: Sequence[str]) -> str:
    blamed = [line for line in changed if line.startswith(_ORDERS) and not line.startswith(_NO_ORDER)]
    why = (
        f"made with {' and '.join(blamed)}, which now is another order of rows"
        if blamed
        else f"made from data with fingerprint {found.dataset['fingerprint']}, but the data now have "
        f"{at_step(prepared.mixtures, found.step).fingerprint} (other files, or rows made by another version)"
    )
    return (
        f"{found.name} was {why}. Set data.restart=true to go on with that (each source where it stood, and where its "
        f"rows are others at its first){', or set it back' if blamed else ''}"
    )
