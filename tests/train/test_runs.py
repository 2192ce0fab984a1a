"""`runs ls`, `diff` and `tail`: of two real runs, of runs in every state, and of what is damaged or no run at all."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from mixtral_jax import launch
from mixtral_jax.train import trainer as training
from mixtral_jax.train.commands import runs
from mixtral_jax.train.config.load import load_config
from tests.tiny import metrics_of, write_run_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a run `a`, and `b`: the same, but for its schedule, and its loss at step 4."""
    root = tmp_path_factory.mktemp("runs")
    changes = {"steps": 4, "log": {"every": 1}, "checkpoint": {"every": None}, "optimizer": {"schedule": "cosine"}}
    file = write_run_file(root / "files", run_name="a", output_dir=str(root / "out"), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: None)
        with training.Trainer(*load_config(file), quiet=True) as trainer:
            for _ in trainer.steps():
                pass
    a, b = root / "out" / "a", root / "out" / "b"
    shutil.copytree(a, b)
    for name, old, new in (("config.yaml", "cosine", "linear"), ("config.yaml", "run_name: a", "run_name: b")):
        text = (b / name).read_text()
        assert old in text
        (b / name).write_text(text.replace(old, new))
    lines = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 4 and "train/loss" in line:
            line["train/loss"] += 0.5
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "out"


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture
def call(capsys):
    """Exit code and what was printed, the errors too."""

    def call(*words):
        code = launch.main(["runs", *map(str, words)])
        heard = capsys.readouterr()
        return code, heard.out + heard.err

    return call


def set_status(place, age=0.0, **status):
    file = place / "STATUS"
    file.write_text(json.dumps(status))
    then = time.time() - age
    os.utime(file, (then, then))


def states(call, directory):
    code, text = call("ls", directory, "--json")
    assert code == 0
    return {os.path.basename(row["run"]): row for row in json.loads(text)}


def test_ls_shows_every_run_and_nothing_else(out, call):
    (out / "notes").mkdir()
    (out / "notes" / "config.yaml").write_text("a: 1")
    (out / "file").write_text("")
    os.makedirs(os.fsencode(out) + b"/\xff/logs")
    (out / os.fsdecode(b"\xff") / "STATUS").write_text("{}")
    set_status(out / "b", state="preempted", step=3, exit_code=75, goodput=0.875, time=time.time() - 7200)
    code, text = call("ls", out)
    head, *rows = text.splitlines()
    assert code == 0 and head.split() == ["run", "state", "step", "loss", "tokens/s", "goodput", "age"]
    assert {row.split()[0]: row.split()[1:3] for row in rows} == {
        "a": ["done", "4/4"],
        "b": ["preempted", "3/4"],
        "?": ["unknown", "-"],
    }
    losses = [line["train/loss"] for line in metrics_of(out / "a") if "train/loss" in line]
    found = states(call, out)
    assert found["b"]["goodput"] == 0.875 and 0 < found["a"]["goodput"] < 1
    assert found["a"]["tokens_per_second"] > 0
    assert found["a"]["loss"] == losses[-1]
    assert [*states(call, out / "a")] == ["a"]  # a run itself
    assert call("ls", out / "notes") == (0, f"there are no runs in {out / 'notes'}\n")
    assert call("ls", out / "gone")[0] == 2


@pytest.mark.parametrize(
    ("status", "age", "state"),
    [
        ({"state": "training", "time": 0}, 5, "training"),
        ({"state": "training", "time": 0}, 90, "stopped responding"),
        ({"state": "compiling", "exit_code": None}, 3000, "stopped responding"),  # its metrics are as old
        ({"state": "done", "exit_code": 0}, 3000, "done"),
        ({"state": "failed", "exit_code": 74}, 3000, "failed"),
        ({"state": "a word to come", "exit_code": 7}, 3000, "a word to come"),
    ],
)
def test_a_run_whose_heart_does_not_beat_has_stopped_responding(out, call, status, age, state):
    if "time" in status:
        status = status | {"time": time.time() - age}
    else:
        os.utime(out / "a" / "metrics.jsonl", (0, 0))
    set_status(out / "a", age, step=2, **status)
    row = states(call, out)["a"]
    assert row["state"] == state and row["age"] == pytest.approx(age, abs=5)
    assert state != "stopped responding" or status["state"] in row["reason"]


@pytest.mark.parametrize("ahead", [-3600, 3600])
@pytest.mark.parametrize(("silent", "state"), [(5, "training"), (300, "stopped responding")])
def test_a_file_system_with_another_clock_deceives_nobody(out, call, ahead, silent, state):
    """All its times are off by an hour; the run's host has the time that we have."""
    set_status(out / "a", state="training", step=2, time=time.time() - silent)
    for place in (out / "a", out / "b"):
        for path in (*place.rglob("*"), place):
            then = time.time() - silent + ahead
            os.utime(path, (then, then))
    assert states(call, out)["a"]["state"] == state


def test_diff_shows_what_differs_and_from_which_step_on(out, call):
    code, text = call("diff", out / "a", out / "b")
    assert code == 0
    assert "optimizer.schedule" in text and "cosine" in text and "linear" in text
    assert "run_name" not in text and "environment: the same" in text
    found = json.loads(call("diff", out / "a", out / "b", "--json")[1])
    assert list(found["settings"].items()) == [("optimizer.schedule", ["cosine", "linear"])]
    assert (found["losses"]["step"], found["losses"]["equal"]) == (4, 3)
    assert f"from step 4 on not: {found['losses']['a']!r} and {found['losses']['b']!r}" in text
    assert found["evaluation"]["step"] == [4, 4] and found["evaluation"]["eval/loss"][0] > 0
    same = call("diff", out / "a", out / "a")[1]
    assert "settings: the same" in same and "the same in all 4 steps that both logged, the last 4" in same
    environment = json.loads((out / "b" / "env.json").read_text())
    environment["versions"]["jax"], environment["git"] = "0.0.1", "abc"
    (out / "b" / "env.json").write_text(json.dumps(environment))
    found = json.loads(call("diff", out / "a", out / "b", "--json")[1])
    assert {*found["environment"]} == {"versions.jax", "git"}


def test_tail_speaks_as_the_run_did(out, call):
    code, text = call("tail", out / "a", "--lines", 3)
    *lines, last = text.splitlines()
    assert code == 0 and last.startswith("done (") and "4 steps are done" in last
    log = [line[20:] for line in (out / "a" / "logs" / "process_0.log").read_text().splitlines()]
    assert any(line.startswith("step 4/4 | loss") for line in lines)
    assert {line for line in lines if not line.startswith("step 4/4")} <= set(log)
    assert call("tail", out / "a", "--lines", 0)[1].count("\n") == 1
    assert call("tail", out / "a", "--lines", -1)[0] == 2


def test_tail_follows_until_the_run_ends(out, call, monkeypatch):
    monkeypatch.setattr(runs, "FOLLOW_SECONDS", 0.02)
    place = out / "a"
    set_status(place, state="training", step=4, time=time.time())
    follow, begun = runs._follow, threading.Event()
    monkeypatch.setattr(runs, "_follow", lambda *args: (begun.set(), follow(*args)))

    def train():
        begun.wait()
        with (place / "metrics.jsonl").open("a") as file:
            for text in ('{"step": 5, "x/y": 0.', "5}\n", '{"step": 6, "x/y": NaN}\n'):
                file.write(text)
                file.flush()
                time.sleep(0.2)
        kept = (place / "metrics.jsonl").read_text().splitlines()[:-1]
        (place / "new").write_text("\n".join([*kept, '{"step": 6, "x/y": 1.5}']) + "\n")
        os.replace(place / "new", place / "metrics.jsonl")  # as a start does that goes on from step 5, and fast
        time.sleep(0.2)
        with (place / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "x/y": 2.5}\n')
        set_status(place, state="done", step=6, exit_code=0, reason="6 steps", time=time.time())

    thread = threading.Thread(target=train)
    thread.start()
    code, text = call("tail", place, "--follow", "--lines", 0)
    thread.join()
    assert code == 0
    told = [
        "step 5: x/y 0.5",
        "step 6: x/y nan",
        "started again, from a checkpoint",
        "step 6: x/y 1.5",
        "step 7: x/y 2.5",
    ]
    assert text.splitlines()[:-1] == told
    assert text.splitlines()[-1].endswith("6 steps")


def test_a_feed_of_the_end_of_a_file_bears_one_that_is_shorter(tmp_path, capsys):
    file, lines = tmp_path / "metrics.jsonl", [json.dumps({"step": step}) + "\n" for step in range(9)]
    file.write_text("".join(lines[:8]))
    feed = runs._Feed(file)
    assert [line["step"] for line in feed.more(len(lines[0]))] == [7]
    for kept, more in ((8, [8]), (3, []), (3, [8])):
        (tmp_path / "new").write_text("".join([*lines[:kept], *lines[8 : 8 + len(more)]]))
        os.replace(tmp_path / "new", file)
        assert [line["step"] for line in feed.more()] == more
        assert feed.more() == []
    assert capsys.readouterr().out.count("started again") == 3


DAMAGE = {
    "STATUS": [
        b"", b"{", b"[]", b"\xff", b'{"state": 3, "step": "x", "goodput": {}, "time": "yesterday"}',
        b'{"state": "\\ud800"}',
        b'{"state": "training", "time": "0001-01-01T00:00:00", "goodput": 1' + b"0" * 400 + b"}", b"[" * 9999, None,
    ],
    "config.yaml": [b"", b"a: [", b"- 1", b"steps: many", b"\xff\xfe", b"a: 2026-01-01", b"[" * 9999, None],
    "env.json": [b"", b"{", b"[1]", None],
    "metrics.jsonl": [
        b"", b"\n\n", b'{"step": 1, "train/lo', b"[1]\n3\nnull\n", b'{"train/loss": 1}\n{"step": null}\n',
        b'{"step": 1, "train/loss": "x", "train/learning_rate": []}\n{"step": 2, "eval/loss": null}\n',
        b'{"step": 3, "train/loss": 1' + b"0" * 400 + b', "train/learning_rate": 1, "train/grad_norm": 1}\n', None,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_nothing_that_is_damaged_or_missing_is_an_error(out, call, name):
    for content in DAMAGE[name]:
        file = out / "a" / name
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for words in (("ls", out), ("ls", out, "--json"), ("tail", out / "a"), ("diff", out / "a", out / "b")):
            code, text = call(*words)
            assert code == 0 and "Traceback" not in text, (name, content, words, text)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_what_is_no_run_is_said_to_be_none(out, call):
    code, text = call("tail", out)
    assert code == 2 and text.startswith(f"error: {out} is no run") and str(out / "a") in text
    assert call("diff", out / "a", out / "c") == (2, f"error: {out / 'c'} is no directory of a run\n")


def test_jax_is_not_imported(out):
    code = "import sys; from mixtral_jax.launch import main; assert main() == 0; assert 'jax' not in sys.modules"
    words = [sys.executable, "-c", code, "runs"]
    for more in (["ls", out], ["diff", out / "a", out / "b"], ["tail", out / "a"]):
        subprocess.run([*words, *map(str, more)], check=True, capture_output=True)
