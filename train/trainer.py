"""A run from its configuration to its exit code: set up; for each step: batch, step, hooks."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mixtral_jax.data.loader import eval_sources
from mixtral_jax.data.prepare.prepare import prepare
from mixtral_jax.data.text.chat import encode_prompt
from mixtral_jax.data.text.template import load_template
from mixtral_jax.generation.generate import generate
from mixtral_jax.parallel.mesh import make_mesh
from mixtral_jax.train.build import Parts, build
from mixtral_jax.train.checkpoints.best import Best
from mixtral_jax.train.checkpoints.checkpointer import Checkpointer, saved_steps
from mixtral_jax.train.config.load import Provenance
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.config.validate import rebuilt
from mixtral_jax.train.console import Console
from mixtral_jax.train.feed import Feed
from mixtral_jax.train.hooks.checkpoint import Checkpoint
from mixtral_jax.train.hooks.evaluate import PAIRS, TOKENS, Evaluate
from mixtral_jax.train.hooks.log import Log
from mixtral_jax.train.hooks.moment import Hook, Moment, to_floats
from mixtral_jax.train.hooks.profile import Profile
from mixtral_jax.train.hooks.sample import Sample
from mixtral_jax.train.hooks.sinks import Writer
from mixtral_jax.train.hooks.throughput import Throughput
from mixtral_jax.train.hooks.watchdog import Watchdog
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.first_screen import compiled_line
from mixtral_jax.train.run.memory import drop_freed_memory, pause
from mixtral_jax.train.run.peers import agree, failures_reported, meet
from mixtral_jax.train.run.resume import where_to_start
from mixtral_jax.train.run.signals import EXIT_PREEMPTED, Interrupts
from mixtral_jax.train.run.trackers import Writers
from mixtral_jax.train.step import StepReport

EXIT_DONE, EXIT_DIVERGED = 0, 3


class Outcome(NamedTuple):
    """How a run ended."""

    exit_code: int
    state: str
    step: int
    reason: str


class Diverged(Exception):
    """Loss or gradient norm of `step` is not finite; the state is that before its update."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(f"step {step} has loss {loss} and gradient norm {grad_norm}")
        self.step = step


class Run(NamedTuple):
    """What lives as long as a run."""

    config: RunConfig
    place: RunDirectory
    console: Console
    interrupts: Interrupts
    began: float

    @property
    def checkpoints(self) -> Any:
        """Where checkpoints go."""
        return self.config.checkpoint.directory or self.place.checkpoints


def run(config: RunConfig, provenance: Provenance | None = None, *, force: bool = False) -> int:
    """Train; the exit code is that of INTERFACE: 0 done, 3 diverged, 75 preempted.

    Raises:
        UserError, ValueError: what the user can mend (exit code 2); STATUS says so too.
    """
    began = time.perf_counter()
    place = RunDirectory(config.run_dir)
    with failures_reported(place):
        config = settle_steps(config)
        place.create()
        console = Console(place.log, speak=jax.process_index() == 0, progress=config.log.progress)
        with contextlib.closing(console), Interrupts() as interrupts:
            outcome = _run(Run(config, place, console, interrupts, began), provenance, force)
            place.write_status(outcome.state, outcome.step, outcome.reason, outcome.exit_code)
            console.say(f"exit {outcome.exit_code}: {outcome.reason}")
        return outcome.exit_code


def _run(run: Run, provenance: Provenance | None, force: bool) -> Outcome:
    config = run.config
    found = where_to_start(config, run.checkpoints, force, run.place, run.console.say)
    if found is not None and found.step >= config.steps:
        reason = f"nothing left to do: {found.step} of {config.steps} steps are done (--force starts again)"
        return Outcome(EXIT_DONE, "done", found.step, reason)
    best = Best(config.early_stopping, None if found is None else found.meta.get("best"))
    if found is not None and best.exhausted:
        reason = f"nothing left to do: {best.why_stopped} (a larger early_stopping.patience goes on)"
        return Outcome(EXIT_DONE, "done", found.step, reason)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        parts = build(config, mesh, found, run.console.say)
        with contextlib.closing(parts.loader), contextlib.closing(Writers(config, run.place, parts.start)) as writers:
            run.place.describe(config, provenance, mesh)
            run.place.write_status("running", parts.start, "", None)
            return _train(run, parts, writers, best)


def _train(run: Run, parts: Parts, writers: Writers, best: Best) -> Outcome:
    """Compile, make the hooks, run the steps, and say how it ended."""
    config = run.config
    feed = Feed(parts.loader, parts.put)
    batch = next(feed)
    began = time.perf_counter()
    train_step = parts.train_step.lower(parts.state, parts.frozen, batch).compile()  # exactly one, here
    seconds = time.perf_counter() - began
    drop_freed_memory()
    writers.metrics.write(parts.start, {"perf/compile_seconds": seconds})
    run.console.say(f"compiled  {compiled_line(train_step, seconds)}")
    meet("compiled")
    throughput = Throughput(config.model.flops_per_token(config.seq_len, "causal"))
    ledger = _Ledger(parts.tokens, writers.metrics, throughput)
    checkpointer, items = Checkpointer(config.checkpoint, run.checkpoints), _items(config, parts, best)
    checkpoint = Checkpoint(checkpointer, writers.metrics, run.console, items, best)
    log = Log(config.log, writers.metrics, writers.moe, throughput, lambda: feed.waited, run.console, config.steps)
    # A checkpoint holds what the evaluation of its step said.
    hooks: list[Hook] = [log, *_evaluation(run, parts, writers.metrics, best), checkpoint, *_other_hooks(run, parts)]
    watchdog = _watchdog(run)
    run.console.start(config.steps, parts.start)
    try:
        with contextlib.closing(watchdog):
            outcome = _steps(run, parts, train_step, feed, batch, ledger, hooks, checkpoint, watchdog, best)
        checkpoint.finish(outcome.step)
        return outcome
    except Diverged as error:
        checkpoint.finish(error.step)
        steps = saved_steps(run.checkpoints)
        stands = f"checkpoint {steps[-1]} stands" if steps else "there is no checkpoint"
        return Outcome(EXIT_DIVERGED, "diverged", error.step - 1, f"{error}; no update was made, {stands}")


def _steps(
    run: Run, parts: Parts, train_step: Any, feed: Feed, batch: Any, ledger: "_Ledger", hooks: list[Hook],
    checkpoint: Checkpoint, watchdog: Watchdog, best: Best,
) -> Outcome:  # fmt: skip
    state, steps = parts.state, run.config.steps
    ledger.throughput.restart()
    for step in range(parts.start + 1, steps + 1):
        state, report = train_step(state, parts.frozen, batch)
        first, last = step == parts.start + 1, step == steps
        if not last:
            batch = next(feed)  # while the step runs
        ledger.enter(step, report)
        signal = run.interrupts.requested(step)
        if first or signal or any(hook.due(step, last) for hook in hooks):
            ledger.settle()
        if first:
            run.console.say(f"step {step} done {time.perf_counter() - run.began:.1f} s after the start")
        moment = Moment(step, state, report, ledger.tokens, last)
        for hook in hooks:
            if not hook.due(step, last):  # asked again: an evaluation can make a checkpoint due
                continue
            with ledger.pause(counted=isinstance(hook, Log)):
                hook.run(moment)
        run.console.advance(step)
        watchdog.beat()
        if last or not (signal or best.exhausted):
            continue
        checkpoint.run(moment)
        checkpoint.finish(step)
        if best.exhausted:
            return Outcome(EXIT_DONE, "done", step, f"stopped after step {step} of {steps}: {best.why_stopped}")
        reason = f"{signal} after step {step}; checkpoint {step} is saved: run the same command again"
        return Outcome(EXIT_PREEMPTED, "preempted", step, reason)
    reason = f"{steps} steps are done; everything is in {run.place.path}"
    return Outcome(EXIT_DONE, "done", steps, f"{reason}; {best}" if str(best) else reason)


class _Ledger:
    """The flag of each step, read one step late so that the device never waits for the host.

    A CPU is both: nothing is gained there, and the temporaries of two steps would be held at once.
    """

    def __init__(self, tokens: int, writer: Writer, throughput: Throughput):
        self.tokens, self.throughput = tokens, throughput
        self._writer, self._late = writer, jax.default_backend() != "cpu"
        self._open: tuple[int, StepReport] | None = None

    def enter(self, step: int, report: StepReport) -> None:
        """Check the step before, remember this one."""
        self.settle()
        self._open = (step, report)
        if not self._late:
            began = time.perf_counter()
            self.settle()
            pause(time.perf_counter() - began)

    def settle(self) -> None:
        """Wait for the newest step.

        Raises:
            Diverged: its loss or gradient norm was not finite. Its metrics are written, NaN and all.
        """
        if self._open is None:
            return
        (step, report), self._open = self._open, None
        flags = (report.healthy, report.scalars["train/tokens"], report.scalars["train/skipped"])
        healthy, tokens, skipped = jax.device_get(flags)
        if not healthy or skipped:  # said at once, whatever the interval of the log
            scalars = to_floats(report.scalars) | {"train/tokens": self.tokens}
            self._writer.write(step, scalars)
        if not healthy:
            raise Diverged(step, scalars["train/loss"], scalars["train/grad_norm"])
        self.tokens += int(tokens)
        self.throughput.add(int(tokens))

    @contextlib.contextmanager
    def pause(self, *, counted: bool) -> Any:
        """Time spent in here is no training time, unless it is `counted`."""
        began = time.perf_counter()
        yield
        if not counted:
            self.throughput.exclude(time.perf_counter() - began)


def _items(config: RunConfig, parts: Parts, best: Best) -> Callable[[Moment], tuple[dict[str, Any], dict[str, Any]]]:
    """What a checkpoint holds beside the state: the position in the data, and what made it."""
    resolved = config.model_dump(mode="json")

    def items(moment: Moment) -> tuple[dict[str, Any], dict[str, Any]]:
        row = parts.first_row + (moment.step - parts.start) * config.global_batch_size
        dataset = {"next_row": row, "fingerprint": parts.prepared.fingerprint, "tokens": moment.tokens}
        return dataset, {"step": moment.step, "stage": config.stage, "config": resolved, "best": best.record}

    return items


def _evaluation(run: Run, parts: Parts, writer: Writer, best: Best) -> list[Hook]:
    config = run.config
    batch_size = config.eval.batch_size or config.rows_per_micro_batch
    sources = eval_sources(parts.prepared, batch_size=batch_size, shard=parts.share, references=parts.references)
    agree(validation=" ".join(source.fingerprint for source in sources.values()))
    if not sources:
        return []
    measure = PAIRS if config.stage == "dpo" else TOKENS
    evaluate = Evaluate(
        config.eval, sources, parts.eval_step, parts.put, writer, run.console, measure=measure, best=best
    )
    return [evaluate]


def _other_hooks(run: Run, parts: Parts) -> list[Hook]:
    config = run.config
    hooks: list[Hook] = []
    if config.sample.every is not None and config.sample.prompts:
        hooks.append(Sample(config.sample, _continuation(config, parts), run.place.samples, run.console))
    if config.log.profile is not None:
        hooks.append(Profile(config.log.profile, run.place.profile, run.console))
    return hooks


def _continuation(config: RunConfig, parts: Parts) -> Callable[[Any], list[str]]:
    """A function from parameters to what the model makes of each prompt."""
    sample, tokenizer = config.sample, parts.tokenizer
    if config.data.examples == "text":
        prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in sample.prompts]
    else:  # a user's message
        template = load_template(config.data.template, tokenizer)
        chats = [[{"role": "user", "content": prompt}] for prompt in sample.prompts]
        prompts = [encode_prompt(chat, tokenizer, template) for chat in chats]

    def continue_prompts(params: Any) -> list[str]:
        rows = generate(
            parts.merge(params, parts.frozen),
            prompts,
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            seed=config.seed,
            eos_id=tokenizer.eos_id,
        )
        # the model may have more rows than the tokenizer has pieces, and an untrained one draws from them too
        known = [[t for t in row if t < tokenizer.vocab_size and t != tokenizer.eos_id] for row in rows]
        return [tokenizer.decode(row) for row in known]

    return continue_prompts


def _watchdog(run: Run) -> Watchdog:
    return Watchdog(run.config.log.watchdog_seconds, lambda reason: run.place.write_status("watchdog", -1, reason, 124))


def settle_steps(config: RunConfig) -> RunConfig:
    """The same run with `steps` instead of data.epochs: epochs * rows / global_batch_size, rounded up.

    Prepares the data where that was not done yet, since only then the number of rows is known.

    Raises:
        UserError: with the steps known, other fields do not fit (a warm-up that is longer than the run, say).
    """
    if config.data.epochs is None:
        return config
    prepared = prepare(config.data, config.seq_len, config.seed, progress=jax.process_index() == 0)
    rows = sum(source.rows for source in prepared.train)
    steps = math.ceil(config.data.epochs * rows / config.global_batch_size)
    return rebuilt(config, {"steps": steps, "data": {"epochs": None}})
