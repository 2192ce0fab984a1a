"""Benchmarks while a run learns: when, what is written, and what becomes of one that is broken off."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval (extra: eval)")

from mixtral_jax.train import build
from mixtral_jax.train import trainer as training
from mixtral_jax.train.commands.benchmark import benchmark
from mixtral_jax.train.config import machine_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals import TaskOptions, benchmarks
from mixtral_jax.train.phases import Phase
from mixtral_jax.train.run import Interrupts, RunDirectory
from tests.evals.documents import documents
from tests.tiny import metrics_of

NAMES = ("local_boolq", "local_piqa")  # one choice is a token, the other a sentence


@pytest.fixture
def config_of(make_config, tmp_path):
    def make(name: str, **tasks):
        for file in ("boolq", "piqa"):
            rows = [json.dumps(row) + "\n" for row in documents(file, 5)]
            (tmp_path / f"{file}.jsonl").write_text("".join(rows))
        told = {"names": NAMES, "every": 3, "limit": 4, "data_dir": str(tmp_path), **tasks}
        return make_config(run_name=name, steps=6, eval={"every": 2, "tasks": told}, checkpoint={"every": 2})

    return make


class Breaks(Interrupts):
    """A signal comes ahead of a batch of the first benchmark."""

    def check(self) -> None:
        if self._phases.now is Phase.FIRST_BATCH:
            self._name = "SIGTERM"
        super().check()


def trained(config, kind=Interrupts):
    """How one whole start ended."""
    place = RunDirectory(config.run_dir)
    with training.Trainer(config, quiet=True, interrupts=kind(place), place=place) as trainer:
        for _ in trainer.steps():
            pass
    return trainer.outcome


def evaluations(place: Path) -> list[dict]:
    own = ("step", "eval/")
    return [
        {key: value for key, value in line.items() if key.startswith(own)}
        for line in metrics_of(place)
        if any(key.startswith("eval/") for key in line)
    ]


@pytest.mark.slow
def test_scores_are_written_beside_the_loss(config_of, tmp_path, capsys):
    config = config_of("whole")
    trained(config)
    found = {line["step"]: line for line in evaluations(config.run_dir)}
    assert [*found] == [2, 3, 4, 6]
    assert "eval/loss" not in found[3] and "eval/local_boolq/acc" not in found[4]
    assert found[6].keys() >= {"eval/loss", "eval/local_boolq/acc", "eval/local_piqa/acc_norm_stderr"}
    for step in (3, 6):
        kept = json.loads((config.run_dir / "eval" / str(step) / "results.json").read_text())
        assert kept["tasks"]["local_boolq"]["documents"] == 4
        assert kept["tasks"]["local_boolq"]["scores"]["acc"] == found[step]["eval/local_boolq/acc"]
    samples = (config.run_dir / "eval" / "6" / "samples_local_piqa.jsonl").read_text().splitlines()
    options = TaskOptions(limit=4, data_dir=str(tmp_path))
    benchmark(str(config.run_dir), NAMES, machine_config([]).config, options, out=str(tmp_path / "again"))
    again = (tmp_path / "again" / "samples_local_piqa.jsonl").read_text().splitlines()
    for mine, other in zip(map(json.loads, samples), map(json.loads, again), strict=True):
        assert mine["arguments"] == other["arguments"]
        asked, answered = ([pair[0][0] for pair in sample["resps"]] for sample in (mine, other))
        assert asked == pytest.approx(answered, abs=1e-5)


def test_one_that_is_broken_off_is_made_up_for(config_of):
    whole, broken = config_of("whole"), config_of("broken")
    trained(whole)
    first = trained(broken, Breaks)
    assert (first.exit_code, first.step) == (75, 3)
    assert [line["step"] for line in evaluations(broken.run_dir)] == [2]
    assert trained(broken).exit_code == 0
    assert evaluations(broken.run_dir) == evaluations(whole.run_dir)


def test_nan_in_a_benchmark_ends_no_run(config_of, monkeypatch, capsys):
    def broken(*_, **__):
        raise FloatingPointError("log-probabilities are NaN")

    monkeypatch.setattr(build, "run_tasks", broken)
    config = config_of("nan")
    assert trained(config).exit_code == 0
    assert [line["step"] for line in evaluations(config.run_dir)] == [2, 4, 6]


def test_what_is_wrong_is_said_before_the_run_begins(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "run_tasks", None)
    for changes, problem in (
        ({"names": ("local_csqa",)}, r"^local_csqa: .* has no csqa\.parquet"),
        ({"names": ("local_bolq",)}, r"^task local_bolq is unknown.*local_boolq"),
        ({"names": ("local_humaneval",)}, r"runs code that the model writes"),
        ({"names": ("local_gsm8k",)}, r"^task local_gsm8k writes 256 tokens, no room for a prompt: the model reads 64"),
    ):
        (tmp_path / "gsm8k.jsonl").write_text(json.dumps(documents("gsm8k", 1)[0]))
        (tmp_path / "humaneval.jsonl").write_text(json.dumps(documents("humaneval", 1)[0]))
        config = config_of("wrong", **changes)
        with pytest.raises(UserError, match=problem):
            training.Trainer(config, quiet=True)
        assert not config.run_dir.joinpath("metrics.jsonl").exists()
