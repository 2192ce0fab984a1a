"""Throughput arithmetic, peaks, and sinks that hide no NaN and survive a failing tracker."""

import contextlib
import io
import json
import math
import struct
import threading
import time
import warnings
from types import SimpleNamespace

import pytest

from mixtral_jax.train.hooks import sinks, throughput
from mixtral_jax.train.hooks.evaluate import bits_per_byte, perplexity
from mixtral_jax.train.run import open_files


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


def test_an_evaluation_that_is_made_up_takes_the_place_of_its_own_line_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    others = [{"step": 2, "eval/boolq/acc": 0.5}, {"step": 1, "eval/loss": 3.0}]
    own = [{"step": 2, "eval/loss": 1.0}, {"step": 2, "eval/mmlu_law/acc": 0.5}, {"step": 2, "eval/local_arc/acc": 0.5}]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*own, *others]))
    tasks = SimpleNamespace(names=("mmlu", "local_*"))
    run = SimpleNamespace(metrics=file, moe=tmp_path / "moe.jsonl", attempt=1, ended=False)
    log = SimpleNamespace(tensorboard=False, wandb=None)
    config = SimpleNamespace(eval=SimpleNamespace(tasks=tasks), log=log, model=SimpleNamespace(is_dense=True))
    with contextlib.ExitStack() as opened:
        open_files(run, config, 2, True, opened)
    assert [json.loads(line) for line in file.read_text().splitlines()] == others


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


def tensorboard_records(file):
    from tensorboardX.proto import event_pb2

    data, offset = file.read_bytes(), 0
    while offset < len(data):  # length (8), its crc (4), record, crc (4)
        length = int.from_bytes(data[offset : offset + 8], "little")
        yield event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
        offset += length + 16


def test_tensorboard_gets_every_number_and_forgets_what_is_done_again(tmp_path):
    """Three starts within a second have three files; each says from which step on what came before is void."""
    for start in (0, 0, 3):
        sink = sinks.TensorBoard(tmp_path, start)
        sink.write(start + 7, {"train/loss": 1.5, "perf/mfu": None})
        sink.close()
    files = sorted(tmp_path.iterdir(), key=lambda file: file.name[-19:])
    events = [list(tensorboard_records(file)) for file in files]
    values = [{v.tag: (e.step, v.simple_value) for e in file for v in e.summary.value} for file in events]
    assert values == [{"train/loss": (step, 1.5)} for step in (7, 7, 10)]
    starts = [[e.step for e in file if e.HasField("session_log")] for file in events]
    assert starts == [[1], [1], [4]]


def test_tensorboard_on_a_full_disk_is_dropped_and_holds_nobody_up(tmp_path, monkeypatch):
    """Its file's room runs out in the middle of a run, and nobody takes what it is given any more."""
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "open_file", lambda path: io.BufferedWriter(io.FileIO("/dev/full", "w")))

    def train():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            writer = sinks.Writer(None, sinks.open_trackers([lambda: sinks.TensorBoard(tmp_path)]))
            for step in range(30):
                writer.write(step, {"train/loss": 1.0, "train/grad_norm": 2.0})
            writer.close()
        warned.extend(str(warning.message) for warning in told)

    warned: list[str] = []
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    (told,) = [line for line in warned if line.startswith("TensorBoard")]
    assert "No space left on device" in told


def wandb_records(file):
    """Those of a .wandb file: after 7 bytes blocks of 32 KiB with (crc 4, length 2, kind 1, part of a record)."""
    from wandb.proto import wandb_internal_pb2

    data, offset, parts = file.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_wandb_has_one_run_for_all_starts_and_loses_no_row(tmp_path, monkeypatch):
    """The second start is from an older checkpoint: steps 2 and 3 come twice, and no number of a row does."""
    monkeypatch.setattr(sinks.Wandb, "AHEAD", 2)
    settings = {"project": "test", "entity": None, "mode": "offline"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what wandb warns of is its own
        for steps in ((1, 2, 3), (2, 3, 4)):
            sink = sinks.Wandb(tmp_path, settings, "name", {"steps": 3})
            for step in steps:
                sink.write(step, {"train/loss": 2.0 / step, "perf/mfu": None})
            sink.close()
    files, until = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")), time.monotonic() + 30
    while time.monotonic() < until:  # what writes them is a process of its own, which is not done when `finish` is
        records = [record for file in files for record in wandb_records(file)]
        if sum(record.HasField("exit") for record in records) == 2:
            break
        time.sleep(0.1)
    ids = {r.run.run_id for r in records if r.HasField("run")}
    rows = [
        {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert len(files) == 2 and ids == {json.loads((tmp_path / "wandb" / "resume.json").read_text())["id"]}
    assert [(row["step"], row["train/loss"]) for row in rows] == [(s, 2.0 / s) for s in (1, 2, 3, 2, 3, 4)]
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert all(r.metric.step_metric == "step" for r in records if r.HasField("metric") and r.metric.glob_name == "*")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"id": "x"}', '{"id": "x", "rows": "many"}'])
def test_a_damaged_note_of_the_wandb_run_begins_a_new_one(tmp_path, monkeypatch, content):
    import wandb

    begun = []
    monkeypatch.setattr(wandb, "init", lambda **settings: begun.append(settings["id"]) or wandb)
    monkeypatch.setattr(wandb, "define_metric", lambda *_, **__: None)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "resume.json").write_text(content)
    sinks.Wandb(tmp_path, {}, "name", {})
    sinks.Wandb(tmp_path, {}, "name", {})
    assert begun[0] == begun[1] != "x"


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
