"""`eval --tasks`: what is printed and kept, what is said of a name or a package that is not there."""

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax import launch
from mixtral_jax.train.commands import benchmark
from mixtral_jax.train.config import load_config, resolved_yaml
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals import TaskOptions, benchmarks, find_tasks
from mixtral_jax.train.run import RunDirectory
from tests.evals.cases import TASKS, write_model, write_tasks
from tests.tiny import metrics_of, write_run_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evals")
    write_model(place / "model")
    write_tasks(place / "tasks")
    return place


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own files are 14,683."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    real = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path, **_: real(include_path=include_path, include_defaults=False)
    )


def run(place: Path, *arguments: str) -> int:
    return launch.main(["eval", str(place / "model"), "--include", str(place / "tasks"), *arguments])


def test_scores_are_printed_and_kept(own_tasks_alone, place: Path, tmp_path: Path, capsys) -> None:
    where = ["--tasks", "tiny_let*", "--limit", "2", "--out", str(tmp_path / "out")]
    assert run(place, "compute.dtype=float32", *where, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["tasks"]["tiny_letters"]["scores"]["acc"] == printed["eval/tiny_letters/acc"]
    assert (kept["tasks"]["tiny_letters"]["documents"], kept["tasks"]["tiny_letters"]["options"]["limit"]) == (2, 2)
    samples = (tmp_path / "out" / "samples_tiny_letters.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["resps"]) for line in samples] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_leters"], "task tiny_leters is unknown; did you mean tiny_letters?"),
        (["--tasks", ","], "--tasks names none"),
        (["--tasks", "tiny_letters", "--include", "nowhere"], "--include nowhere is no directory"),
        (["--tasks", "tiny_letters", "--limit", "0"], "limit is 0: it must be at least 1"),
        (["--tasks", "tiny_letters", "mesh.fdsp=2"], "mesh.fdsp"),
        (["--tasks", "tiny_letters", "--out", f"{__file__}/x"], "x cannot be made (Not a directory): --out names"),
        (["--tasks", "tiny_letters", "--template", "v1"], "are for chats: add --apply-chat-template"),
        ([], "eval needs CFG"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_a_weight_is_read(
    own_tasks_alone, place: Path, arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "read_model", None)
    assert run(place, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_pattern_finds_tasks_and_not_their_groups_too(own_tasks_alone, place: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny_all.yaml").write_text("group: tiny_all\ntask: [tiny_choice, tiny_letters]\n")
    options = TaskOptions(include=[str(place / "tasks"), str(tmp_path)])
    assert find_tasks(["tiny_*"], options, longest=128)["tasks"].keys() == {f"tiny_{name}" for name in TASKS}
    assert find_tasks(["tiny_all"], options, longest=128)["tasks"].keys() == {"tiny_choice", "tiny_letters"}
    with pytest.raises(UserError, match="tasks tiny_all,tiny_letters: Duplicate task 'tiny_letters'"):
        find_tasks(["tiny_all", "tiny_letters"], options, longest=128)


def test_an_answer_has_room_behind_a_prompt(own_tasks_alone, place: Path) -> None:
    options = TaskOptions(include=[str(place / "tasks")])
    assert find_tasks(["tiny_written"], options, longest=13)["tasks"]
    with pytest.raises(UserError, match=r"^task tiny_written writes 12 tokens, no room .* the model reads 12"):
        find_tasks(["tiny_written"], options, longest=12)


def test_scores_of_several_filters_have_their_errors_behind_them() -> None:
    own = {"alias": "a", "acc,none": 1.0, "acc_stderr,none": 0.1, "match,strict": 0.5, "match_stderr,strict": 0.2,
           "match,loose": 0.75, "match_stderr,loose": "N/A"}  # fmt: skip
    found = benchmarks._named(own)
    assert found == {
        "acc": 1.0,
        "acc_stderr": 0.1,
        "match,strict": 0.5,
        "match,strict_stderr": 0.2,
        "match,loose": 0.75,
    }
    table = benchmarks.Results({"a": found}, {}, {}, {}, {}).table().splitlines()
    assert [line.split()[1:] for line in table[1:]] == [
        ["acc", "1.0000", "0.1000"], ["match,strict", "0.5000", "0.2000"], ["match,loose", "0.7500"]
    ]  # fmt: skip


def test_another_task_joins_those_that_are_there(tmp_path: Path) -> None:
    for task, score in (("a", 0.25), ("b", 0.5), ("b", 0.75)):
        benchmarks.Results({task: {"acc": score}}, {}, {}, {}, {}).write(tmp_path, checkpoint="c")
    kept = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert {task: (each["scores"]["acc"], each["checkpoint"]) for task, each in kept.items()} == {
        "a": (0.25, "c"), "b": (0.75, "c")
    }  # fmt: skip


def test_a_part_does_not_take_the_place_of_the_whole(tmp_path: Path) -> None:
    def write(score: float, limit: int | None, **how: Any) -> list[str]:
        results = benchmarks.Results({"a": {"acc": score}}, {}, {}, {}, {"a": [{"score": score}]})
        return results.write(tmp_path, options={"limit": limit}, **how)

    by_hand, other = {"whole_stays": True, "checkpoint": "runs/x"}, {"checkpoint": "y"}
    for score, limit, how, kept in (
        (0.1, 5, by_hand, 0.1), (0.2, 6, by_hand, 0.2), (0.3, None, {}, 0.3),  # the last as training writes it
        (0.4, 5, by_hand, 0.3), (0.5, None, by_hand, 0.5), (0.6, 5, other, 0.6),
    ):  # fmt: skip
        assert write(score, limit, **how) == (["a"] if kept != score else [])
        assert json.loads((tmp_path / "results.json").read_text())["tasks"]["a"]["scores"]["acc"] == kept
        assert json.loads((tmp_path / "samples_a.jsonl").read_text()) == {"score": kept}


def test_the_hub_is_shut_unless_it_is_asked_for(own_tasks_alone, tmp_path: Path, monkeypatch) -> None:
    """In a process too that has had the hub's client for long; and all is as it was thereafter."""
    places = [("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")]
    settings = [f"{module}.{name}" for module, name in places]
    for setting in settings:
        monkeypatch.setattr(setting, False)
    (tmp_path / "away.yaml").write_text("task: tiny_away\ncustom_dataset: !function away.rows\ntest_split: test\n")
    modules = ", ".join(module for module, _ in places)
    (tmp_path / "away.py").write_text(
        f"import {modules}\ndef rows(**_):\n    raise OSError(f'shut: {{{settings[0]}}}, {{{settings[1]}}}')\n"
    )
    before = dict(os.environ)
    for network, message in ((False, "True, True; --network lets"), (True, "False, False$")):
        with pytest.raises(UserError, match=f"^tasks tiny_away: shut: {message}"):
            find_tasks(["tiny_away"], TaskOptions(include=[str(tmp_path)], network=network), longest=128)
    assert not any(getattr(importlib.import_module(module), name) for module, name in places)
    assert dict(os.environ) == before


def test_without_the_harness_the_extra_is_named(place: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(place, "--tasks", "boolq") == 2
    assert "pip install 'mixtral-jax[eval]'" in capsys.readouterr().err


def test_a_run_gets_a_line_unless_it_goes_on(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "runs" / "run"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(resolved_yaml(load_config(write_run_file(tmp_path)).config))
    (place / "metrics.jsonl").write_text(
        '{"step": 4, "train/loss": 2.0}\n{"step": 8, "train/loss": 1.0}\n{"step": 9, "tr'
    )
    benchmark._note(place, 4, {"eval/boolq/acc": 0.5})
    assert [line["step"] for line in metrics_of(place)] == [4, 8, 4]
    assert metrics_of(place)[-1]["eval/boolq/acc"] == 0.5
    assert not (place / "LEASE").exists()

    def held(self: RunDirectory, other: Path | None) -> list[str]:
        raise UserError(f"{self.path} is being written by process 7")

    monkeypatch.setattr(RunDirectory, "hold", held)
    benchmark._note(place, 4, {"eval/boolq/acc": 0.5})
    assert len(metrics_of(place)) == 3
    assert "written by process 7" in capsys.readouterr().err
