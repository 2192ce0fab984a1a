"""`make demo`, shortened: its own commands run end to end, and what its last page says is measured."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from mixtral_jax import launch
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.commands import demo, quickstart
from mixtral_jax.train.config.load import load_config
from tests.tiny import metrics_of

ROOT = Path(__file__).resolve().parents[2]
SHORT = "steps=3 optimizer.warmup_steps=0 seq_len=64 global_batch_size=4 eval.batches=2 data.workers=1"


def commands() -> list[list[str]]:
    """The commands of the recipe, without the interpreter."""
    dry = ["make", "-n", "demo", "RUN=PYTHON", f"DEMO_ARGS={SHORT}"]
    printed = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line.split(" PYTHON ")[1]) for line in printed.splitlines() if line.startswith("JAX_PLATFORMS")]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory with the samples and recipes of the checkout, and none of its runs."""
    for name in ("configs", "data"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)
    monkeypatch.setattr("mixtral_jax.train.commands.evaluate.make_mesh", lambda config: None)
    return tmp_path


def test_the_demo_runs_end_to_end_when_shortened(elsewhere, capsys):
    *stages, report = commands()
    assert [command[1] for command in stages] == ["pretrain", "sft", "dpo", "convert"]
    for command in stages:
        assert command[0] == "launch.py" and launch.main(command[1:]) == 0
    assert report[:2] == ["-m", "mixtral_jax.train.commands.demo"]
    capsys.readouterr()
    code = demo.main(*report[2:])
    page = capsys.readouterr().out
    assert code in (0, 1)  # three steps need not teach anything
    for source in ("translation", "reasoning", "dialogue", "conversational"):
        assert re.search(rf"{source}.*\d", page), source
    assert "the same answer as ours" in page
    assert "model.safetensors" in page and "config.json" in page

    dpo = load_config("runs/dpo-tiny/config.yaml").config
    before, after = (demo.pair_logps(dpo, run)["all"] for run in ("runs/sft-tiny", "runs/dpo-tiny"))
    assert len(before) > 10
    evaluated = [line for line in metrics_of(Path("runs/dpo-tiny")) if "eval/rewards/accuracies" in line]
    assert demo.reward_accuracy(before, after) == pytest.approx(evaluated[-1]["eval/rewards/accuracies"])


def test_reward_accuracy_counts_strict_gains():
    before = np.array([[-1.0, -2.0], [-1.0, -1.0], [-5.0, -1.0]])
    after = np.array([[-1.0, -2.0], [-1.0, -1.5], [-4.0, -1.0]])
    assert demo.reward_accuracy(before, after) == pytest.approx(2 / 3)


def test_brackets_that_a_model_writes_are_no_markup(monkeypatch, capsys):
    written = "self.a[i] = b[key] # [/etc/apt]"
    monkeypatch.setattr(quickstart, "load", lambda run: None)
    monkeypatch.setattr(quickstart, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(quickstart, "generate", lambda model, prompts, **how: [written] * len(prompts))
    config = SimpleNamespace(data=SimpleNamespace(tokenizer=""))
    quickstart.write_samples(config, "runs/quickstart", Console(soft_wrap=True))
    assert capsys.readouterr().out.count(written) == len(quickstart.LANGUAGES)
