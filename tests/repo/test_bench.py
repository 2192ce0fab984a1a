"""The benchmark's own parts: shapes with changes, our steps at a tiny shape, the document."""

import subprocess
from pathlib import Path

import pytest

from tests.bench import ours, rounds, speedrun, step, tuning_ours
from tests.bench.run import write_section
from tests.bench.shapes import SHAPES, Options, parse


def test_a_shape_with_changes():
    assert parse("S") == SHAPES["S"]
    assert parse("S:experts=16,batch=4") == SHAPES["S"]._replace(experts=16, batch=4)
    with pytest.raises(KeyError):
        parse("Z")


def test_the_pretraining_step():
    take, facts = ours.prepare(parse("XS"), Options())
    assert 5 < take(0) < 7.5  # about log 512
    assert facts()["flops"] > 0 and facts()["compile_seconds"] > 0


@pytest.mark.parametrize("kind", ["sft", "lora", "dpo"])
def test_the_steps_of_fine_tuning(kind):
    loss = tuning_ours.prepare(parse("XS"), kind=kind, prompt=0.5, options=Options())(0)
    # DPO on random pairs starts at log 2, plus the balance loss
    assert (0.5 < loss < 1.2) if kind == "dpo" else (5 < loss < 7.5)


ECHO = """
import os, sys
from tests.bench.worker import serve
if sys.argv[1] == "bad": sys.exit("no")
steps = 0
def step(index):
    global steps
    steps += 1
    print("said", index)
    if sys.argv[1] == "mortal" and index == 3: os._exit(1)
serve(step, lambda: {"steps": steps})
"""


def test_processes_step_in_turn_and_a_dead_one_is_named(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    runs = rounds.beside("ours", ["echo_worker", "a"], {"b": ["echo_worker", "b"], "c": ["echo_worker", "c"]}, steps=3)
    assert list(runs) == ["ours", "b", "c"]
    assert [len(run["times"]) for run in runs.values()] == [6, 3, 3]
    assert all(run["steps"] == 2 + 3 and run["peak_bytes"] > 0 for run in runs.values())
    assert rounds.faster({"ratios": [2.0, 1.0, 4.0]}) == "2.00x (1.00 to 4.00)"
    with pytest.raises(RuntimeError, match="echo_worker bad ended"):
        rounds.in_turn({"ours": ["echo_worker", "bad"]}, steps=1)
    with pytest.raises(RuntimeError, match="echo_worker mortal ended"):
        rounds.in_turn({"ours": ["echo_worker", "mortal"], "b": ["echo_worker", "b"]}, steps=3)


def test_a_trainer_takes_one_step_when_it_is_told_to():
    pytest.importorskip("trl", reason="the other side of the benchmark needs trl (extra: parity)")
    from tests.bench import tuning_theirs

    gate, seen = tuning_theirs.Gate(), []

    def train():
        for number in range(2):
            gate.on_step_begin()
            seen.append(number)

    gate.run(train)
    assert seen == []
    gate.step(0)
    assert seen == [0]
    with pytest.raises(RuntimeError, match="took all the steps"):
        gate.step(1)
    with pytest.raises(RuntimeError, match="the trainer ended: ValueError"):
        tuning_theirs.Gate().run(lambda: [].remove(0))


def test_the_table_of_steps(monkeypatch):
    def in_turn(commands, steps):
        seconds = {"mixtral-jax": 2.0, "mixtral-jax, capacity 1.25": 1.6}
        facts = dict(flops=1e9, matmul_flops_per_second=1e9, compile_seconds=5, peak_bytes=2e9)
        times = {name: seconds.get(name, 4.0) for name in commands}
        return {name: {**facts, "times": [t] * steps, "seconds": t} for name, t in times.items()}

    monkeypatch.setattr(rounds, "in_turn", in_turn)
    table = step.section(["M"], step.DTYPES, steps=3)
    assert "| mixtral-jax | 2.00 | 1,024 | 1.00x | 2.00 |" in table
    assert "| transformers, eager | 4.00 | 512 | 2.00x (2.00 to 2.00) | 2.00 |" in table
    assert "+25 % more time than capacity" in table and "50 % of XLA's own" in table
    assert "| mixtral-jax, bf16 | 4.00 |" in table
    assert "bf16" not in step.section(["M"], ["float32"], steps=3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nosuch.yaml"], "nosuch.yaml does not exist"),
        (["optimizer.lerning_rate=1"], "lerning_rate"),
        (["configs/sft/tiny.yaml"], "is of stage sft"),
        (["eval.batches=1"], "eval.batches is the record's in every entry"),
        (["data.tokenizer=other.model"], "data.tokenizer is the record's"),
        (["data.temperature=5"], "data.temperature is the record's"),
        (["resume_from=runs/quickstart@487"], "resume_from is the record's"),
        (["checkpoint.directory=steps"], "checkpoint.directory is the record's"),
        (["seq_len=32"], "rows have 64 tokens or more"),
        (["a.yaml", "b.yaml"], "one file, not a.yaml and b.yaml"),
        (["--pairs", "-1"], "--pairs 0 or more"),
        (["--seeds", "0"], "--seeds is 1 or more"),
        (["--dev", "--write", "x"], "three seeds and the validation texts"),
        (["--write", "x", "--pairs", "0", "router.router_z_loss_coef=0"], "in turn with the record's"),
        (["--write", "x", "--anchor", "router.router_z_loss_coef=0"], "in turn with the record's"),
    ],
)
def test_an_entry_that_cannot_race_is_told_in_a_sentence(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(speedrun, "in_turn", None)  # nothing is begun
    monkeypatch.setattr("sys.argv", ["speedrun", *words])
    with pytest.raises(SystemExit) as ended:
        speedrun.main()
    assert ended.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_seeds_before_one_that_fails_are_shown_and_not_written(monkeypatch, capsys, tmp_path):
    def trained(folder, *_):
        if folder.name == "1":
            raise subprocess.CalledProcessError(3, "launch.py")
        return {"en": 2.0, "code": 3.0}

    monkeypatch.setattr(speedrun, "launch", lambda *_: None)
    monkeypatch.setattr(speedrun, "budget", lambda *_, **__: 974)
    monkeypatch.setattr(speedrun, "trained", trained)
    monkeypatch.setattr(speedrun, "DOC", tmp_path / "speedrun.md")
    monkeypatch.setattr("sys.argv", ["speedrun", "--write", "more heads", "model.num_attention_heads=8"])
    assert speedrun.main() == 3
    out, err = capsys.readouterr()
    assert err == "speedrun: after 1 seeds: launch.py ended with 3\n"
    assert "| more heads: model.num_attention_heads=8 | 2.5000 (2.5000 to 2.5000) |" in out
    assert not speedrun.DOC.exists()


def test_the_texts_held_back_are_a_twentieth_and_none_is_trained_on(tmp_path):
    speedrun.held_back(tmp_path)
    for file in tmp_path.glob("*.train.jsonl"):
        trained, held = (
            set(Path(f"{str(file)[:-12]}.{part}.jsonl").read_text().splitlines()) for part in ("train", "validation")
        )
        assert held and not trained & held and len(trained) > 15 * len(held)


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("# Benchmarks\n\nkept\n")
    write_section(document, "step", "first")
    write_section(document, "tuning", "other")
    write_section(document, "step", "second")
    text = document.read_text()
    assert "kept" in text and "other" in text and "second" in text and "first" not in text
    assert text.count("## The training step") == 1
