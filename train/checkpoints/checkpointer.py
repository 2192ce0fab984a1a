"""Which step is saved when, and which one is resumed from."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax
from etils import epath
from pydantic import Field, field_validator

from mixtral_jax import checkpoint
from mixtral_jax.config import FrozenConfig
from mixtral_jax.data.config import check_place_name
from mixtral_jax.data.records import is_remote
from mixtral_jax.train.checkpoints.best import LINK, noted_evaluation, point_to
from mixtral_jax.train.checkpoints.patience import PAUSES, patiently, why
from mixtral_jax.train.checkpoints.together import Together
from mixtral_jax.train.errors import UserError, is_of_storage, is_of_the_system
from mixtral_jax.train.meetings import told
from mixtral_jax.train.state import TrainState, as_stored, hold_as

Say = Callable[[str], None]


class CheckpointConfig(FrozenConfig):
    """When the run is saved and what is kept; the last step is always saved."""

    every: int | None = Field(200, gt=0, description="steps between checkpoints; null: only the last step")
    every_minutes: float | None = Field(
        None, gt=0, description="minutes after which one is made however many steps that are; null: steps alone count"
    )
    keep_last: int = Field(2, gt=0, description="how many of the newest checkpoints are kept")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints at multiples of this many steps are kept for ever"
    )
    directory: str | None = Field(
        None, description="where checkpoints go, gs:// too; null: <output_dir>/<run_name>/checkpoints"
    )
    asynchronous: bool = Field(True, description="write in the background while training goes on")

    @field_validator("directory")
    @classmethod
    def _is_known(cls, place: str | None) -> str | None:
        scheme, address, _ = (place or "").partition("://")
        if address and scheme not in ("gs", "s3"):
            raise ValueError("must be a directory of a file system, gs:// or s3://")
        return place and check_place_name(place)


class Found(NamedTuple):
    """A checkpoint to resume from."""

    step: int
    path: epath.Path
    dataset: dict[str, Any]  # next_row, fingerprint, tokens
    meta: dict[str, Any]  # step, config, best, evaluation_owed, as a note beside it says
    trunk: str = ""  # the run that it is of, where that is another one (resume_from)

    @property
    def name(self) -> str:
        """As a part of a sentence."""
        return f"checkpoint {self.step}" + f" of {self.trunk}" * bool(self.trunk)


class Saved(NamedTuple):
    """A checkpoint that is complete on disk."""

    step: int
    bytes: int
    seconds: float
    problem: str = ""  # with what else was to be done: removing the old ones


class Checkpointer:
    """Saves in the background, one at a time, and prunes what is not kept. Directory: <step>/{state,dataset,meta}.

    `asynchronous` is for whoever calls it: else it waits behind each save.

    All processes call all of it in the same order, and get the same answers.
    """

    def __init__(self, config: CheckpointConfig, directory: epath.PathLike, newest: int | None = None):
        """`newest` is a step whose checkpoint is whole: it is not saved again."""
        self._config = config
        self.directory, self.asynchronous = epath.Path(directory), config.asynchronous
        self._newest = self._tried = newest
        self.owed: int | None = None  # the step whose save is under way or was refused, until one is made
        self._under_way: Together[Saved] | None = None
        self._refusals = 0  # in a row
        self._again: float | None = None  # the time at which what was refused is tried again
        self._last: float | None = None  # that of the last save
        self._word = (-1, "")  # a step, and what process 0 said behind it

    def due(self, step: int, last: bool) -> bool:
        """Is a checkpoint to be made after `step` updates, or is there news of the one under way?"""
        return self.wanted(step, last) or self._said(step) != ""

    def wanted(self, step: int, last: bool) -> bool:
        """Is a checkpoint to be made?"""
        every = self._config.every
        return last or (every is not None and step % every == 0) or self._said(step) == _SAVE

    @property
    def owes(self) -> bool:
        """Whether a save was refused that is still to be tried again."""
        return self._again is not None

    def _said(self, step: int) -> str:
        """What clock and storage of process 0 ask for after this step; nobody asks them while nothing can have come."""
        if self._config.every_minutes is None and self._under_way is None and self._again is None:
            return ""
        if self._word[0] != step:
            self._word = (step, told(self._look))
        return self._word[1]

    def _look(self) -> str:
        now = time.monotonic()
        if self._last is None:  # before the first step was compiled nothing could be saved
            self._last = now
        if self._under_way is not None:
            return _ENDED if self._under_way.ended() else ""
        minutes = self._config.every_minutes
        passed = minutes is not None and now - self._last >= 60 * minutes
        return _SAVE if passed or (self._again is not None and now >= self._again) else ""

    def save(
        self, state: TrainState, step: int, dataset: Mapping[str, Any], meta: Mapping[str, Any], best: int | None = None
    ) -> Saved | None:
        """Start to save; the state may be donated as soon as this returns. Returns the save before, if one ended.

        `best` is the step that <directory>/best stands for once this one is whole, and that is never pruned.

        Raises:
            OSError: this one, or the one before, could not be written. Complete checkpoints are untouched.
        """
        before = self.wait()
        if step == self._newest:
            self._prune(step, best)  # it may have become that only now
            return before
        started, path = time.perf_counter(), self.directory / str(step)
        self._last, self._again, self.owed = time.monotonic(), None, step
        if step == self._tried and told(lambda: checkpoint.damage(path) or _WHOLE) == _WHOLE:
            self._newest, self._refusals, self.owed = step, 0, None  # refused behind its commit
            self._prune(step, best)
            return before
        if jax.process_index() == 0:
            remove(path)  # one that was passed over as broken when this run resumed, or that was refused
        self._tried = step
        self._pending = pending = checkpoint.save_async(path, state, {"dataset": dataset, "meta": meta})
        self._newest = step

        def finish() -> Saved:
            size, seconds = pending.result(), time.perf_counter() - started
            return Saved(step, size, seconds, problem=self._prune(step, best))

        self._under_way = Together(finish)
        return before

    def wait(self) -> Saved | None:
        """Until nothing is being written. The finished save that was not reported yet, if any.

        Raises:
            OSError: it could not be written.
        """
        if self._under_way is None:
            return None
        try:
            saved = self._under_way.result()
        except Exception:
            self._newest = self._under_way = None  # it may be tried again
            self._pending.left_behind = True  # a part of it may wait for five minutes yet, and give up then
            raise
        self._under_way, self._refusals, self.owed = None, 0, None  # where the waiting is interrupted it goes on
        return saved

    def refused(self) -> float | None:
        """A save was: in how many seconds `due` asks for another one. None: that was the last attempt."""
        if self._refusals == len(PAUSES):
            return None
        pause = PAUSES[self._refusals]
        self._refusals, self._again = self._refusals + 1, time.monotonic() + pause
        return pause

    def _prune(self, newest: int, best: int | None) -> str:
        """Keep the best checkpoint, the newest `keep_last` whole ones and every multiple of `keep_every`.

        `newest` has just become whole: those above it are broken, or of steps that a roll back took back.
        Returns what could not be done: no reason to save it again.
        """
        if jax.process_index() != 0:
            return ""
        try:
            if best is None:  # of a run that watched something before
                best = best_step(self.directory)
            elif best != best_step(self.directory):
                point_to(self.directory, best)
            steps, every = saved_steps(self.directory), self._config.keep_every
            discard(self.directory, [s for s in steps if s > newest])
            older = [s for s in steps if s < newest]
            kept: set[int | None] = set(
                itertools.islice(whole_steps(self.directory, older), self._config.keep_last - 1)
            )
            kept |= {best, *(s for s in older if every is not None and s % every == 0)}
            discard(self.directory, [step for step in older if step not in kept])
        except Exception as error:
            if not is_of_storage(error):
                raise
            return f"older checkpoints could not be removed: {why(error)}"
        return ""


_SAVE, _ENDED, _WHOLE = "save", "ended", "whole"


def saved_steps(directory: epath.PathLike) -> list[int]:
    """Steps with a directory, whole or not, in order.

    Raises:
        OSError: nobody could look.
    """
    root = epath.Path(directory)
    names = [p.name for p in root.iterdir()] if checkpoint.is_there(root) else []
    return sorted(int(name) for name in names if name.isdigit() and checkpoint.is_there(root / name, directory=True))


def whole_steps(directory: epath.PathLike, steps: Sequence[int] | None = None) -> Iterator[int]:
    """Those of the steps (None: of all) whose checkpoint is whole, the newest first."""
    root = epath.Path(directory)
    found = saved_steps(root) if steps is None else steps
    return (step for step in reversed(found) if checkpoint.damage(root / str(step)) is None)


def stands(directory: epath.PathLike) -> str:
    """The newest whole checkpoint as a part of a sentence."""
    try:
        newest = next(whole_steps(directory), None)
    except Exception as error:
        if not is_of_storage(error):
            raise
        return f"which checkpoints stand cannot be seen ({why(error)})"
    return "there is no checkpoint" if newest is None else f"checkpoint {newest} stands"


def best_step(directory: epath.PathLike) -> int | None:
    """The step that <directory>/best stands for, if it is there."""
    link = epath.Path(directory) / LINK
    if not is_remote(str(directory)):
        return int(os.readlink(link)) if os.path.islink(link) else None
    return int(link.read_text()) if link.exists() else None


def name_best(directory: epath.PathLike, best: int | None) -> None:
    """What a save that was killed behind its commit has left undone; process 0 does it."""
    if jax.process_index() == 0 and best is not None and best != best_step(directory):
        point_to(directory, best)


def find(
    directory: epath.PathLike, resume: Literal["auto", "never", "must"] | int, say: Say, every: int | None = None
) -> Found | None:
    """The checkpoint that `resume` asks for; None: begin anew. Broken ones are named to `say` and passed over.

    Args:
        every: multiples of it, made at steps that no signal and no clock has chosen, come before all others.

    Raises:
        UserError: the step asked for, or with `must` any, is not there whole; or checkpoints exist and none is whole.
    """
    root = epath.Path(directory)
    if resume == "never":
        return None
    steps = saved_steps(root)
    if isinstance(resume, int):
        if resume not in steps:
            raise UserError(
                f"resume: {resume}: {root} has no such checkpoint; it has {', '.join(map(str, steps)) or 'none'}"
            )
        steps = [resume]
    steps.sort(key=lambda step: (every is None or step % every == 0, step))
    broken: list[str] = []
    for step in reversed(steps):
        problem = checkpoint.damage(root / str(step))
        try:
            if problem is None:
                items = {name: checkpoint.read_item(root / str(step), name) for name in ("dataset", "meta")}
                meta = items["meta"] | noted_evaluation(root / str(step))
                best = meta.get("best") or {"step": None}
                if best["step"] is not None and checkpoint.damage(root / str(best["step"])) is not None:
                    meta["best"] = best | {"step": None, "value": None}  # one of steps taken back replaced it
                if broken:
                    say(f"{'; '.join(broken)}: using checkpoint {step} instead")
                return Found(step, root / str(step), items["dataset"], meta)
        except Exception as error:
            if is_of_the_system(error):
                raise  # nothing is wrong with the checkpoint
            problem = f"it cannot be read ({type(error).__name__})"
        broken.append(f"checkpoint {step} is not whole ({problem})")
    if broken:
        raise UserError(f"{root}: {'; '.join(broken)}; none is whole. Start anew with resume=never and --force")
    if resume == "must":
        raise UserError(f"resume: must, but {root} holds no checkpoint")
    return None


def find_together(
    directory: epath.PathLike, resume: Literal["auto", "never", "must"] | int, say: Say, every: int | None = None
) -> Found | None:
    """What `find` finds. Process 0 looks, again where storage does not answer, and the others are told.

    Raises:
        UserError: see `find`.
        StorageError: it still does not answer: no older checkpoint takes the place of one that may be whole.
    """
    what = f"the checkpoints in {directory} could not be read"
    look = partial(find, directory, resume, say, every)
    found = told(lambda: json.dumps(patiently(what, look, say), default=os.fspath))
    return None if (items := json.loads(found)) is None else Found(items[0], epath.Path(items[1]), *items[2:])


def restore_state(found: Found, abstract: TrainState, changed: Sequence[str] = ()) -> TrainState:
    """The state, placed as `abstract` says, on any mesh; its moments are held so too, however they were.

    Args:
        changed: `a.b: old -> new` of the settings that may be to blame where it does not fit.

    Raises:
        UserError: a leaf has another shape than the model; it is named, and so is what changed.
    """
    stored = as_stored(abstract, found.meta.get("config", {}).get("optimizer", {}).get("state_dtype", "float32"))
    try:
        state = checkpoint.restore(found.path, stored)
    except (ValueError, KeyError, TypeError) as error:
        if is_of_the_system(error):
            raise
        if (older := _restore_with_factor(found, stored)) is None:
            detail = str(error).partition("\n")[0][:300]  # Orbax shows whole trees
            if changed:
                detail += f"; changed since then: {', '.join(changed)}: set it back, or choose another run_name"
            raise UserError(f"checkpoint {found.step} does not fit: {detail}") from error
        state = older
    return state if stored is abstract else hold_as(abstract, state)


def _restore_with_factor(found: Found, abstract: TrainState) -> TrainState | None:
    """A state of before 2026-11-29, when the factor on the router's updates was a part of optax's chain."""
    moments: Any = (*abstract.optimizer.moments, optax.MaskedState(optax.EmptyState()))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        state = checkpoint.restore(
            found.path, abstract._replace(optimizer=abstract.optimizer._replace(moments=moments))
        )
        moments = state.optimizer.moments
        return state._replace(optimizer=state.optimizer._replace(moments=moments[:-1]))
    return None


def discard(directory: epath.PathLike, steps: Iterable[int]) -> None:
    """Remove these checkpoints, and the name of the best where it is one of them; process 0 does it."""
    for step in steps if jax.process_index() == 0 else ():
        if best_step(directory) == step:
            point_to(directory, None)
        remove(epath.Path(directory) / str(step))


def remove(path: epath.Path) -> None:
    """Remove a checkpoint; half removed it counts as incomplete."""
    (path / checkpoint.COMMIT).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


def discard_unfinished(directory: epath.PathLike) -> None:
    """Remove what a save that was killed has left; it was never a checkpoint."""
    root = epath.Path(directory)
    names = [p.name for p in root.iterdir()] if root.exists() else []
    for step in {name.partition(".")[0] for name in names if "." in name}:
        if step.isdigit():
            checkpoint.discard_unfinished(root / step)
