"""A run from its configuration to its exit code: set up; for each step: batch, step, hooks."""

import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Self

import jax
from etils import epath

from mixtral_jax.data.rows import Batch, PairBatch
from mixtral_jax.model import Mixtral
from mixtral_jax.parallel import make_mesh
from mixtral_jax.train.build import Parts, benchmark, build, continuations, settle_steps
from mixtral_jax.train.checkpoints import Best, Checkpointer, Found, comparable, note_evaluation, stands, why
from mixtral_jax.train.config import Provenance, RunConfig
from mixtral_jax.train.console import Console
from mixtral_jax.train.errors import AGAIN, ExitCode, Outcome, StorageError, UserError, command_began, failure_of
from mixtral_jax.train.feed import Feed
from mixtral_jax.train.hooks import (
    Checkpoint,
    Diverged,
    Evaluate,
    Hook,
    Ledger,
    Log,
    Moment,
    Throughput,
    run_due,
)
from mixtral_jax.train.phases import Phase
from mixtral_jax.train.plan import peak_flops, useful_flops
from mixtral_jax.train.run import (
    Interrupts,
    RunDirectory,
    compiled,
    end,
    extra_hooks,
    failures_reported,
    open_files,
    roll_back,
    watch,
    where_to_start,
)


def run(config: RunConfig, provenance: Provenance | None = None, *, force: bool = False) -> int:
    """Train from the command line; the exit code is that of INTERFACE: 0 done, 3 diverged, 75 preempted.

    Raises:
        UserError, ValueError: what the user can mend (exit code 2); STATUS says so too.
    """
    place = RunDirectory(config.run_dir, command_began())
    code = ExitCode.STOPPED  # where a signal comes while there is nothing to save
    with (
        failures_reported(place),
        Interrupts(place, config.stop_after_minutes) as interrupts,
        Trainer(config, provenance, force=force, interrupts=interrupts, place=place) as trainer,
    ):
        for _ in trainer.steps():
            pass
        assert trainer.outcome is not None
        code = trainer.outcome.exit_code
    return end(code)


class Trainer:
    """One run: made from its configuration, or resumed from its newest checkpoint.

    ```
    with Trainer(config) as trainer:
        for moment in trainer.steps():
            print(moment.step, moment.metrics["train/loss"])
        print(trainer.evaluate()["eval/loss"], trainer.history[-1])
    ```

    It writes the run directory that the command line writes, and resumes as that does. Where `mesh` is not None, the
    model is to be called under `jax.set_mesh(trainer.mesh)`.
    """

    def __init__(
        self, config: RunConfig, provenance: Provenance | None = None, *, force: bool = False, quiet: bool = False,
        interrupts: Interrupts | None = None, place: RunDirectory | None = None,
    ):  # fmt: skip
        """Find the checkpoint to go on from, prepare the data, make or read the weights.

        Args:
            provenance: which file and overrides the configuration came from, for config.input.yaml.
            force: begin anew; the run that is there is moved aside.
            quiet: lines go to the run's log only.
            interrupts: asked after each step, and within evaluations, what wants the run to save and stop.
            place: the run's directory, where the caller wants to know what comes to pass there.

        Raises:
            UserError, ValueError: what the user can mend.
        """
        self.outcome: Outcome | None = None  # how the run ended; None: steps are left
        self.run = place or RunDirectory(config.run_dir)
        self._provenance, self._phases = provenance, self.run.phases
        self._interrupts = interrupts or Interrupts(self.run, config.stop_after_minutes)
        self.mesh: jax.sharding.Mesh | None = None
        self._parts: Parts | None = None
        self._program: Any = None
        with contextlib.ExitStack() as opened:
            opened.callback(self.run.release)
            opened.enter_context(watch(self.run, config.log))
            self._begin = begin = where_to_start(config, force, self.run, partial(make_mesh, config.mesh))
            self.config = settle_steps(begin.config, self.run.begin, begin.found)
            speak = jax.process_index() == 0 and not quiet
            self._console = Console(self.run.log, speak=speak, progress=self.config.log.progress)
            opened.enter_context(contextlib.closing(self._console))
            self._opened = opened
            for note in begin.notes:
                self.say(note)
            self._checkpoints = begin.directory
            self._stand_at(begin.found)
            if left := "" if self._owed else begin.nothing_left(self.config, self._best, self.say):
                self.run.withdraw()  # of epochs it had begun
                self._end("done", f"nothing left to do: {left}", ExitCode.DONE)
            else:
                self.run.begin()
                self._ready()
            self._opened = opened.pop_all()

    def _stand_at(self, found: Found | None) -> None:
        """Where the run goes on from."""
        self._found, self.step = found, 0 if found is None else found.step
        self._start, meta = self.step, {} if found is None else found.meta
        self._owed = bool(meta.get("evaluation_owed"))
        best = comparable(meta, self.config.model_dump(mode="json"), self.say)
        self._best = Best(self.config.early_stopping, best, self.config.checkpoint.every)

    def _ready(self) -> Parts:
        """What the steps need and what happens between them; made once. A finished run needs it only where asked."""
        if self._parts is not None:
            return self._parts
        config = self.config
        self.mesh = make_mesh(config.mesh)
        with self._on_mesh():
            parts, self._state = build(config, self.mesh, self._found, self.say, self._phases)
        if self.outcome is None:
            self._begin.clear(self._console)
        self._underway = self._opened.enter_context(contextlib.ExitStack())
        return self._set_out(parts)

    def _set_out(self, parts: Parts) -> Parts:
        """What reads, logs and happens between the steps, from where the run stands."""
        self._parts, config = parts, self.config
        before = {} if self._found is None else self._found.dataset
        self._passed = before.get("passed", [])  # rows, by on_nonfinite
        self.run.account = account = parts.account
        loader = self._underway.enter_context(contextlib.closing(parts.open_loader(account, self.step)))
        self._feed = Feed(self._phases.reading(loader), parts.put)
        self._batch: Any = None
        metrics, counts = open_files(self.run, config, self._start, self._owed, self._underway)
        self._metrics = metrics
        throughput = Throughput(useful_flops(config), peak_flops(jax.devices()[0].device_kind))
        waited, steps = lambda: self._feed.waited, config.steps
        log = Log(config.log, metrics, counts, throughput, waited, self._console, steps, account.metrics)
        self._ledger = Ledger(
            parts.tokens, metrics, throughput, config.optimizer.max_skips, before.get("skips", 0),
            lambda step: log.due(step, step == config.steps),
        )  # fmt: skip
        own = None if self._found is None or self._found.trunk else self._found.step
        checkpointer = Checkpointer(config.checkpoint, self._checkpoints, own)
        self._checkpoint = Checkpoint(checkpointer, metrics, self._console, self._position, self._best, self._phases)
        self._evaluate = Evaluate(
            config.eval, parts.held_out, parts.eval_step, parts.put, metrics, self._console, self._best, self._phases,
            self._interrupts.check, self._owed, partial(benchmark, parts, config, self.run.path / "eval", self.say),
        )  # fmt: skip
        write = partial(continuations, parts, config)
        extra = extra_hooks(self.run, config, write, self._console, self._underway)
        # A checkpoint holds what the evaluation of its step said, and nothing that belongs to its step comes behind it.
        self._hooks: list[Hook] = [log, account, self._evaluate, *extra, self._checkpoint]
        return parts

    def steps(self) -> Iterator[Moment]:
        """Train; after each step and what happens behind it, yields what the hooks saw. `outcome` says how it ended.

        A loop that was left goes on with the next step when this is called again.

        Raises:
            StorageError: a checkpoint or metrics could not be written, or data not read; the checkpoints before stand.
        """
        if self.outcome is not None:
            return
        self._compile()
        self._ledger.throughput.restart(self._feed.waited)
        if self.step >= self.config.steps and not self._evaluate.owed:  # the last save had failed
            self._end_where_due(None)
        while self.outcome is None:
            self.run.check_held()
            owed = self._evaluate.owed
            try:
                with self._on_mesh(), self._phases.during(Phase.STEP if self.step > self._start else Phase.FIRST_STEP):
                    moment, signal = self._make_up() if owed else self._one_step()
            except Diverged as error:
                self._recover_or_end(error)
                continue
            except OSError as error:
                self._save_what_there_is(error)
                raise
            self._end_where_due(signal)
            if not owed:
                with self._ledger.pause(counted=False):
                    yield moment

    def _compile(self) -> None:
        """The first batch, and exactly one program for it."""
        parts = self._ready()
        if self._program is not None:
            return
        self.run.describe(self.config, self._provenance, self.mesh)
        self.run.step = self.step
        with self._on_mesh(), self._phases.during(Phase.COMPILING):
            self._batch = next(self._feed)
            self._program, seconds = compiled(parts.train_step, self._state, parts.frozen, self._batch, say=self.say)
            self._metrics.write(self.step, {"perf/compile_seconds": seconds})
        self._phases.become(Phase.BETWEEN)
        self._console.start(self.config.steps, self.step)

    def _one_step(self) -> tuple[Moment, str | None]:
        """Step, next batch, hooks; and the signal that asked to stop."""
        parts, step, batch = self._ready(), self.step + 1, self._batch
        first, last = step == self._start + 1, step == self.config.steps
        if batch is None:  # the loop was interrupted while it read it, or it could not be read
            batch = next(self._feed)
        self._state, report = self._program(self._state, parts.frozen, batch)
        self.step = self.run.step = step
        self._batch, self._evaluate.owed = None, self._evaluate.due(step, last)
        self._ledger.enter(step, report)
        if not last:
            self._batch = self._feed.ahead()  # while the step runs
        self._ledger.follow()
        signal = self._interrupts.requested(step)
        if first or signal or any(hook.due(step, last) for hook in self._hooks):
            self._ledger.settle()
        if first:
            self.say(f"step {step} done {time.monotonic() - self._phases.began:.1f} s after the start")
        moment = Moment(step, self._state, report, self._ledger.tokens, last)
        signal = run_due(self._hooks, moment, self._ledger.pause) or signal
        self._console.advance(step)
        return moment, signal

    def _make_up(self) -> tuple[Moment, str | None]:
        """For an evaluation that was broken off behind the last step, or failed, and what is due behind it."""
        moment = Moment(self.step, self._state, None, self._ledger.tokens, self.step >= self.config.steps)
        signal = run_due(self._hooks, moment, self._ledger.pause)
        self._evaluate.owed = signal is not None
        if signal is None and jax.process_index() == 0:
            note_evaluation(epath.Path(self._checkpoints) / str(self.step), self._best.record)
        return moment, signal

    def _end_where_due(self, signal: str | None) -> None:
        """After the last step, where patience ran out, or at a signal: save what is not, and say how it ended."""
        step, steps = self.step, self.config.steps
        if step < steps and not signal and not self._best.exhausted:
            return
        self.save()
        if step >= steps and not self._evaluate.owed:
            best = f"; {self._best}" if str(self._best) else ""
            self._end("done", f"{steps} steps are done; everything is in {self.run.path}{best}", ExitCode.DONE)
        elif self._best.exhausted and not self._evaluate.owed:
            self._end("done", f"stopped after step {step} of {steps}: {self._best.why_stopped}", ExitCode.DONE)
        else:
            reason = f"{signal} after step {step}; checkpoint {step} is saved: {self._begin.again}"
            self._end("preempted", reason, ExitCode.STOPPED)

    def _save_what_there_is(self, error: OSError) -> None:
        """Metrics or data could not be written or read: checkpoints may lie where they can.

        Raises:
            StorageError: says what is saved; where it was a file system that failed.
        """
        if jax.process_count() == 1:  # the others do not know of it, and would have to save with us
            with contextlib.suppress(OSError, UserError):
                self.save()
        failure = failure_of(error)
        if failure.exit_code != ExitCode.UNEXPECTED:  # else a pipe or a process
            raise StorageError(f"{failure.reason}; {stands(self._checkpoints)}: {failure.remedy or AGAIN}") from error

    def _recover_or_end(self, error: Diverged) -> None:
        """Back to a checkpoint and past the rows since, where that is asked for; else the end with exit 3."""
        self.step = error.done
        self._checkpoint.finish()
        parts, row = self._ready(), self._ready().account.row(error.step)
        with self._phases.during(Phase.RESTORING):
            got = roll_back(
                self.config, self._checkpoints, error, row, self._passed, self._state, self.say, self._found
            )
        if isinstance(got, str):
            why = "; ".join(filter(None, (str(error), got, stands(self._checkpoints))))
            return self._end("diverged", why, ExitCode.NOT_FINITE)
        self._underway.close()
        found, self._state = got
        self.run.undone += error.step - found.step
        self._stand_at(found)
        self.run.step = self.step
        self._set_out(parts._replace(account=parts.account.back_to(found, row), tokens=int(found.dataset["tokens"])))
        bad = {"step": error.step, "loss": error.loss, "grad_norm": error.grad_norm, "next_row": row}
        self._metrics.write(self.step + 1, {f"rollback/{name}": value for name, value in bad.items()})

    @property
    def model(self) -> Mixtral:
        """The model as it is now. The next step takes its arrays over."""
        return self._ready().merge(self._state.params)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `step`, and train/*, eval/*, perf/*, moe/* where they were measured."""
        return [json.loads(line) for line in self.run.metrics.read_text(encoding="utf-8").splitlines()]

    @property
    def batches(self) -> Iterator[Batch | PairBatch]:
        """Host batches of this process from the next step's on, in numpy; looking at them takes none from the steps."""
        with contextlib.closing(self._ready().open_loader(self._ready().account, self.step)) as loader:
            yield from loader

    def evaluate(self) -> dict[str, float]:
        """eval/* of the model as it is now, over data.validation as the `eval` section says."""
        self._ready()
        with self._on_mesh():
            return self._evaluate.measure(self._state.params)

    def save(self) -> epath.Path:
        """Save a checkpoint of the step that was done last, and wait until it is whole.

        Raises:
            UserError: it could not be written, or the step was not finite; those before stand.
        """
        self._ready()
        self.run.check_held()
        if self.outcome is not None and self.outcome.exit_code == ExitCode.NOT_FINITE:
            raise UserError(f"there is nothing to save: {self.outcome.reason}")
        with self._on_mesh():
            try:
                self._ledger.settle()
            except Diverged as error:
                self._recover_or_end(error)
                raise UserError(f"there is nothing to save: {error}") from error
            self._checkpoint.save(Moment(self.step, self._state, None, self._ledger.tokens, False))
        return epath.Path(self._checkpoints) / str(self.step)

    def say(self, line: str) -> None:
        """A line to the console and to the run's log."""
        self._console.say(line)

    def close(self) -> None:
        """Wait for a save under way, end the readers, close the files.

        Raises:
            UserError: the save could not be written; those before stand.
        """
        try:
            if self._parts is not None:
                self._checkpoint.finish()
        finally:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        elif jax.process_count() > 1:
            self._opened.close()  # the save may wait for a process that is gone
        else:
            with contextlib.suppress(OSError, UserError):  # what came first is what is told
                self.close()

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _end(self, state: str, reason: str, exit_code: ExitCode) -> None:
        self.outcome = Outcome(state, self.step, reason, exit_code)
        self._phases.become(Phase.BETWEEN)  # no signal ends it otherwise
        try:
            lines = self.run.write_status(state, self.step, reason, exit_code)
        except OSError as error:
            lines = [f"STATUS could not be written: {why(error)}"]
            if exit_code == ExitCode.DONE:  # the same command again says it there
                raise StorageError(f"{reason}; {lines[0]}; {AGAIN}") from error
        for line in lines:
            self.say(line)
        self.run.release()
        self.say(f"exit {exit_code}: {reason}")
        self.run.leave_page()

    def _position(self, moment: Moment) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds beside the state: the position in the data, and what made it."""
        parts, config = self._ready(), self.config
        dataset = {"tokens": moment.tokens, "skips": self._ledger.skips, "passed": self._passed}
        dataset |= parts.account.note(moment.step)
        resolved = config.model_dump(mode="json")
        meta = {"step": moment.step, "stage": config.stage, "config": resolved, "best": self._best.record}
        meta |= {"base": parts.base, "evaluation_owed": self._evaluate.owed, "resumed_from": self.run.resumed_from}
        return dataset, meta
