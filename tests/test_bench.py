"""The benchmark's own parts: shapes with changes, our steps at a tiny shape, the document."""

from pathlib import Path

import pytest

from tests.bench import ours, rounds, tuning_ours
from tests.bench.run import write_section
from tests.bench.shapes import SHAPES, parse


def test_a_shape_with_changes():
    assert parse("S") == SHAPES["S"]
    assert parse("S:experts=16,batch=4") == SHAPES["S"]._replace(experts=16, batch=4)
    with pytest.raises(KeyError):
        parse("Z")


def test_the_pretraining_step():
    step, facts = ours.prepare(parse("XS"), capacity=None)
    assert 5 < step(0) < 7.5  # about log 512
    assert facts()["flops"] > 0 and facts()["grown_bytes"] == 0


@pytest.mark.parametrize("kind", ["sft", "lora", "dpo"])
def test_the_steps_of_fine_tuning(kind):
    loss = tuning_ours.prepare(parse("XS"), kind=kind, prompt=0.5)(0)
    # DPO on random pairs starts at log 2, plus the balance loss
    assert (0.5 < loss < 1.2) if kind == "dpo" else (5 < loss < 7.5)


ECHO = """
import sys
from tests.bench.worker import serve
if sys.argv[1] == "bad": sys.exit("no")
serve(lambda index: print("said", index), lambda: {"last": 7})
"""


def test_processes_step_in_turn_and_a_dead_one_is_named(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    runs = rounds.beside("ours", ["echo_worker", "a"], {"b": ["echo_worker", "b"], "c": ["echo_worker", "c"]}, steps=3)
    assert list(runs) == ["ours", "b", "c"]
    assert [len(run["times"]) for run in runs.values()] == [6, 3, 3]
    assert all(run["last"] == 7 and run["peak_bytes"] > 0 for run in runs.values())
    assert rounds.faster({"ratios": [2.0, 1.0, 4.0]}) == "2.00x (1.00 to 4.00)"
    with pytest.raises(RuntimeError, match="echo_worker bad ended"):
        rounds.in_turn({"ours": ["echo_worker", "bad"]}, steps=1)


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("# Benchmarks\n\nkept\n")
    write_section(document, "step", "first")
    write_section(document, "tuning", "other")
    write_section(document, "step", "second")
    text = document.read_text()
    assert "kept" in text and "other" in text and "second" in text and "first" not in text
    assert text.count("## The training step") == 1
