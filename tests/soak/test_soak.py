"""The soak is not blind: what it must notice, and that a seed draws the same faults."""

import json
import random

import pytest

from tests.soak import faults
from tests.soak.attempt import Ended, wrong_codes
from tests.soak.checks import History, Reference, numbers
from tests.soak.faults import Abilities, Fault
from tests.soak.run import HEADING, record
from tests.sources import ROOT

EVENTS = [{"prepare": 53, "save": 218, "prune": 160, "step": 40, "compile": 1}, {"save": 80, "step": 40}]
STEPS, KEEP_LAST = 6, 2


def rows_until(step):
    return [{"step": i, "train/loss": 1 / i, "perf/step_seconds": i} for i in range(1, step + 1)]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """One that has come to step 5, with checkpoints 2 and 4."""
    for step in (2, 4):
        place = tmp_path / "checkpoints" / str(step)
        place.mkdir(parents=True)
        for name, text in (("commit_success.txt", ""), ("array", "12345"), ("files.json", '{"array": 5}')):
            (place / name).write_text(text)
    write_rows(tmp_path / "metrics.jsonl", rows_until(5))
    (tmp_path / "STATUS").write_text(json.dumps({"state": "running", "step": 4, "exit_code": None}))
    return tmp_path


@pytest.fixture
def history(run):
    made = History(run, Reference(STEPS, {"metrics.jsonl": numbers(rows_until(STEPS))}, {}, ""), KEEP_LAST)
    made.before()
    return made


def test_a_run_that_was_killed_in_order_is_right(run, history):
    assert history.after([-9], full=False) == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    assert history.after([-9], full=False) == []


def spoil_loss(run):
    write_rows(run / "metrics.jsonl", [*rows_until(4), {"step": 5, "train/loss": 0.2000000001}])


def lose_row(run):
    write_rows(run / "metrics.jsonl", rows_until(5)[1:])


def repeat_row(run):
    write_rows(run / "metrics.jsonl", [*rows_until(5), rows_until(5)[-1]])


def cut_checkpoint(run):
    (run / "checkpoints/4/array").write_text("1234")


def halve_status(run):
    (run / "STATUS").write_text('{"state": "run')


def claim_an_end(run):
    (run / "STATUS").write_text(json.dumps({"state": "preempted", "step": 5, "exit_code": 75}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_loss, "metrics.jsonl: (5, 'train/loss') is 0.2000000001, undisturbed 0.2"),
        (lose_row, "metrics.jsonl: (1, 'train/loss') is missing"),
        (repeat_row, "metrics.jsonl: train/loss of step 5 is there twice"),
        (cut_checkpoint, "whole checkpoints [4] are gone"),
        (halve_status, "STATUS is no JSON"),
        (claim_an_end, "killed, but STATUS says"),
    ],
)
def test_what_is_wrong_is_noticed(run, history, spoil, told):
    spoil(run)
    (problem,) = history.after([-9], full=False)
    assert problem.startswith(told)


def test_exit_0_with_work_undone_is_noticed(run, history):
    problems = " ".join(history.after([0], full=False))
    assert "(6, 'train/loss') is missing" in problems and "done without checkpoint 6" in problems
    assert "exit 0 with STATUS {'state': 'running'" in problems


def test_what_we_cut_ourselves_is_no_fault_of_the_run(run, history):
    write_rows(run / "metrics.jsonl", rows_until(3))
    history.before(cut="metrics.jsonl")
    write_rows(run / "metrics.jsonl", [*rows_until(3), rows_until(5)[4]])  # it went on from checkpoint 4
    assert history.after([-9], full=False) == []


@pytest.mark.parametrize(
    ("kind", "codes", "right"),
    [
        ("SIGKILL", [-9, 76], True), ("SIGKILL", [-9, -6], False), ("SIGTERM", [75, 75], True),
        ("SIGTERM", [-15, 75], False), ("fill", [74, 74], True), ("fill", [2, 2], False), ("none", [75, 75], False),
    ],
)  # fmt: skip
def test_exit_codes_are_those_of_the_interface(kind, codes, right):
    ended = Ended(codes, 1.0, struck=kind != "none", early=False, outputs=["", ""])
    assert (wrong_codes(Fault(kind, "step"), ended) == []) == right


def test_a_seed_draws_the_same_faults():
    able = Abilities(disk=True, clock=True, lease=True)
    first, second = ([faults.draw(random.Random(f"1/{i}"), EVENTS, able) for i in range(400)] for _ in range(2))
    assert first == second and len(set(first)) > 300
    assert {fault.kind for fault in first} >= {"SIGKILL", "SIGTERM", "SIGUSR1", "fill", "twin"}
    assert {fault.cut for fault in first} == {None, *faults.CUTS}
    unable = [faults.draw(random.Random(i), EVENTS, Abilities(False, False, False)) for i in range(400)]
    assert not any(fault.kind in ("fill", "twin") or fault.clock for fault in unable)


def test_the_table_takes_a_line(tmp_path):
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    copy = tmp_path / "reliability.md"
    copy.write_text(text)
    record(copy, "| a row |")
    *_, before = text.partition(HEADING)[2].partition("\n\n")[0].splitlines()
    assert copy.read_text() == text.replace(f"{before}\n", f"{before}\n| a row |\n", 1)
