"""Each hook alone: when it is due, what it writes, how it ends."""

import errno
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.train.checkpoints.best import Best
from mixtral_jax.train.console import Console, clock, train_line
from mixtral_jax.train.hooks.evaluate import EvalConfig, Evaluate, metrics_of
from mixtral_jax.train.hooks.log import Log, LogConfig
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.hooks.profile import Profile, ProfileConfig
from mixtral_jax.train.hooks.sample import Sample, SampleConfig
from mixtral_jax.train.hooks.sinks import JsonLines, Writer
from mixtral_jax.train.hooks.throughput import Throughput
from mixtral_jax.train.objective import EvalSums
from mixtral_jax.train.step import StepReport


@pytest.fixture
def console(tmp_path):
    console = Console(tmp_path / "log", speak=False)
    yield console
    console.close()


@pytest.fixture
def writer(tmp_path):
    writer = Writer(JsonLines(tmp_path / "metrics.jsonl"))
    yield writer
    writer.close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def moment(step, last=False, **scalars):
    state = SimpleNamespace(params={"w": jnp.array([3.0, 4.0])})
    report = StepReport(
        {f"train/{k}": jnp.float32(v) for k, v in scalars.items()}, jnp.array([[5.0, 3.0]]), jnp.array(True)
    )
    return Moment(step, state, report, 1000 * step, last)


def due_steps(hook, steps=12):
    return [s for s in range(1, steps + 1) if hook.due(s, s == steps)]


def test_log_writes_what_the_step_said(tmp_path, console, writer):
    moe = JsonLines(tmp_path / "moe.jsonl")
    log = Log(LogConfig(every=5), writer, moe, Throughput(1e6, None), lambda: 0.0, console, 12)
    assert due_steps(log) == [5, 10, 12]
    log.run(moment(5, loss=2.5, grad_norm=0.5, learning_rate=1e-3))
    moe.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["train/loss"], line["train/param_norm"], line["train/tokens"]) == (5, 2.5, 5.0, 5000)
    assert lines(tmp_path / "moe.jsonl") == [{"step": 5, "counts": [[5, 3]]}]
    assert "step  5/12 | loss 2.5000" in (tmp_path / "log").read_text()


def test_a_full_disk_costs_neither_file_its_line(tmp_path, console, writer, monkeypatch):
    """The checkpoint of that step may lie elsewhere, or find room a second later: then nobody does the step again."""
    moe = JsonLines(tmp_path / "moe.jsonl")
    log = Log(LogConfig(every=5), writer, moe, Throughput(1e6, None), lambda: 0.0, console, 12)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write", full)
    with pytest.raises(OSError):
        log.run(moment(5, loss=2.5, grad_norm=0.5, learning_rate=1e-3))
    moe.close()
    assert [line["step"] for line in lines(tmp_path / "moe.jsonl")] == [5]


class Source(list):
    """Two batches of two targets each; 10 bytes of text."""

    text_bytes = 10


def fake_eval(params, batch):
    return EvalSums(jnp.float32(batch), jnp.float32(2), jnp.float32(1))


def test_evaluate_sums_before_it_divides(tmp_path, console, writer):
    hook = Evaluate(
        EvalConfig(every=4),
        {"a": Source([1.0, 3.0])},
        fake_eval,
        lambda b: b,
        writer,
        console,
        Best(None),
    )
    assert due_steps(hook) == [4, 8, 12]
    hook.run(moment(4))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["eval/a/loss"] == line["eval/loss"] == pytest.approx(4 / 4)
    assert line["eval/a/perplexity"] == pytest.approx(math.e)
    assert line["eval/a/bits_per_byte"] == pytest.approx(4 / (math.log(2) * 10))
    assert line["eval/a/accuracy"] == pytest.approx(0.5)


def test_sources_together_are_weighted_by_tokens():
    sources = {"a": SimpleNamespace(text_bytes=8), "b": SimpleNamespace(text_bytes=32)}
    metrics = metrics_of({"a": EvalSums(10.0, 10.0, 5.0), "b": EvalSums(90.0, 30.0, 3.0)}, sources)
    assert metrics["eval/loss"] == 100 / 40
    assert metrics["eval/bits_per_byte"] == pytest.approx(100 / (math.log(2) * 40))
    assert (metrics["eval/a/loss"], metrics["eval/b/loss"]) == (1.0, 3.0)


def test_samples_are_written_and_shown(tmp_path, console):
    config = SampleConfig(every=6, prompts=("Once", "Two\n"))
    hook = Sample(config, lambda params, prompts: [" upon a\ntime", " eggs"], False, tmp_path / "samples", console)
    assert due_steps(hook) == [6, 12]
    assert due_steps(Sample(SampleConfig(prompts=("x",)), lambda *_: [""], False, tmp_path, console)) == []
    hook.run(moment(6))
    written = lines(tmp_path / "samples" / "6.jsonl")
    assert written[0] == {"step": 6, "prompt": "Once", "text": " upon a\ntime"}
    assert "Once⟶upon a time" in (tmp_path / "log").read_text()


def test_profile_traces_the_steps_that_were_asked_for(tmp_path, console, monkeypatch):
    import jax

    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    hook = Profile(ProfileConfig(start=4, steps=3), tmp_path, console)
    for step in range(1, 11):
        if hook.due(step, step == 10):
            calls.append(step)
            hook.run(Moment(step, None, None, 0, step == 10))
    assert calls == [3, "start", 6, "stop"]
    calls.clear()  # a run that goes on behind that is traced where it begins, once
    for name, steps in (("new", [20, "start", 23, "stop"]), ("traced", [])):
        hook = Profile(ProfileConfig(start=4, steps=3), tmp_path / name, console)
        (tmp_path / "traced").mkdir(exist_ok=True)
        (tmp_path / "traced" / "trace.json").touch()
        for step in range(20, 26):
            if hook.due(step, step == 30):
                calls.append(step)
                hook.run(Moment(step, None, None, 0, step == 30))
        assert calls == steps
        calls.clear()


def test_lines_for_people():
    metrics = {
        "train/loss": 2.34567, "train/accuracy": 0.5, "train/grad_norm": 1.0, "train/learning_rate": 3e-4,
        "perf/tokens_per_second": 12345.6, "perf/mfu": None,
    }  # fmt: skip
    assert train_line(7, 100, metrics, 3723.0) == (
        "step   7/100 | loss 2.3457 | acc 50.0% | grad 1.00 | lr 3.00e-04 | 12,346 tok/s | left 1:02:03"
    )
    assert clock(59.6) == "1:00" and clock(float("nan")) == "?"
    assert "loss nan" in train_line(1, 10, metrics | {"train/loss": np.nan}, 1.0)


def test_each_warning_is_one_line_and_said_once(tmp_path, console):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = console._show_warning
        for _ in range(3):
            warnings.warn("the disk is nearly full", stacklevel=1)
    assert (tmp_path / "log").read_text().count("warning: the disk is nearly full") == 1
