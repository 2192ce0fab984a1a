"""Throughput arithmetic, peaks, and sinks that hide no NaN and survive a failing tracker."""

import json
import math
import warnings

import pytest

from mixtral_jax.train.hooks import sinks, throughput
from mixtral_jax.train.hooks.evaluate import bits_per_byte, perplexity


def test_nan_and_infinity_are_written_visibly(tmp_path):
    sink = sinks.JsonLines(tmp_path / "metrics.jsonl")
    sink.write(3, {"train/loss": math.nan, "train/grad_norm": math.inf, "perf/mfu": None})
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "train/loss": NaN, "train/grad_norm": Infinity, "perf/mfu": null}\n'
    assert math.isnan(json.loads(text)["train/loss"])


def test_a_resumed_run_drops_what_a_killed_one_logged_later(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "x": 1}}\n' for step in (1, 2, 3, 4)]
    file.write_text("".join(lines) + '{"step": 5, "tr')  # killed while it wrote
    sink = sinks.JsonLines(file, start_step=2)
    sink.write(3, {"x": 2})
    sink.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "x": 1}, {"step": 2, "x": 1}, {"step": 3, "x": 2}
    ]  # fmt: skip


class Tracker:
    def __init__(self, fails_at=None):
        self.seen, self.closed, self._fails_at = [], False, fails_at

    def write(self, step, metrics):
        if step == self._fails_at:
            raise ConnectionError("no route")
        self.seen.append(step)

    def close(self):
        self.closed = True


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path):
    good, bad = Tracker(), Tracker(fails_at=2)
    writer = sinks.Writer(sinks.JsonLines(tmp_path / "metrics.jsonl"), [bad, good])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 3):
            writer.write(step, {"x": 1.0})
        writer.close()
    assert [str(w.message) for w in caught] == ["Tracker failed (no route); training goes on without it"]
    assert (bad.seen, good.seen) == ([1], [1, 2, 3])
    assert good.closed and not bad.closed
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboardX.proto import event_pb2

    sink = sinks.TensorBoard(tmp_path)
    sink.write(7, {"train/loss": 1.5, "perf/mfu": None})
    sink.close()
    data = next(tmp_path.iterdir()).read_bytes()
    values, offset = {}, 0
    while offset < len(data):  # length (8), its crc (4), record, crc (4)
        length = int.from_bytes(data[offset : offset + 8], "little")
        event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
        values |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        offset += length + 16
    assert values == {"train/loss": (7, 1.5)}


def test_wandb_runs_offline_and_writes_below_the_run(tmp_path):
    settings = {"project": "test", "entity": None, "mode": "offline"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what wandb warns of is its own
        sink = sinks.Wandb(tmp_path, settings, "name", {"steps": 3})
        sink.write(1, {"train/loss": 2.0})
        sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_throughput_counts_steps_tokens_and_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 4)
    meter = throughput.Throughput(flops_per_step=4e11, peak=1e12)
    for _ in range(5):
        now[0] += 2.0
        meter.add(400)
    now[0] += 30.0
    meter.exclude(30.0)
    read = meter.read(data_wait=1.0)
    assert read == {
        "perf/step_seconds": 2.0, "perf/tokens_per_second": 200.0, "perf/tokens_per_second_per_device": 50.0,
        "perf/tflops_per_device": pytest.approx(0.05), "perf/mfu": pytest.approx(0.05), "perf/data_wait_seconds": 0.2,
    }  # fmt: skip
    now[0] += 1.0
    meter.add(400)
    assert meter.read(data_wait=1.5)["perf/data_wait_seconds"] == 0.5


def test_bits_per_byte_and_perplexity():
    # 3 tokens, each of probability 1/4, over 2 bytes: 6 bits / 2
    assert bits_per_byte(3 * math.log(4), 2) == pytest.approx(3.0)
    assert perplexity(math.log(5)) == pytest.approx(5.0)
    assert perplexity(1e4) == math.inf
