"""Real small weights all the way (slow): GGUF -> Hugging Face -> upcycled -> our logits -> exported -> transformers;
then SFT and DPO through adapters, by the commands of `make demo-small`.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax import launch
from mixtral_jax.config import ComputeConfig
from mixtral_jax.convert import load, orbax2hf, upcycle
from tests import small_weights
from tests.tiny import metrics_of

ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.array(
    [[1, 504, 2365, 6354, 17256, 690, 260, 22876, 2767, 30], [1, 28, 354, 1443, 253, 5023, 506, 253, 338, 2]]
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif(small_weights.missing() is not None, reason=str(small_weights.missing())),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "smollm2-hf"
    small_weights.write_hf(directory)
    return directory


def their_logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_upcycled_weights_have_the_dense_logits_here_and_exported(dense, tmp_path):
    upcycle(dense, tmp_path / "orbax", experts=4, top_k=2)
    orbax2hf(tmp_path / "orbax", tmp_path / "hf")
    model = load(tmp_path / "orbax", dtype="float32", compute=ComputeConfig(dtype="float32"))
    ours, theirs = np.asarray(jax.jit(model)(TOKENS)), their_logits(tmp_path / "hf")
    largest = float(np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * largest)
    np.testing.assert_allclose(ours, their_logits(dense), atol=1e-4 * largest)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_local_experts"] == 4


def test_sft_lowers_the_loss_of_each_source_and_dpo_prefers_held_out_answers(dense, tmp_path, monkeypatch, capsys):
    for name in ("configs", "data"):
        os.symlink(ROOT / name, tmp_path / name)
    (tmp_path / "runs").mkdir()
    os.symlink(dense, tmp_path / "runs" / "smollm2-hf")
    monkeypatch.chdir(tmp_path)
    for module in ("mixtral_jax.train.trainer", "mixtral_jax.train.commands.evaluate"):
        monkeypatch.setattr(f"{module}.make_mesh", lambda config: None)
    dry = subprocess.run(["make", "-n", "demo-small"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split("launch.py ")[1] for line in dry.splitlines() if "launch.py " in line]
    losses = []
    for line in lines:
        capsys.readouterr()
        assert launch.main(shlex.split(line)) == 0, line
        if line.startswith("eval"):
            losses.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    before, tuned, preferred = losses
    for source in ("translation", "reasoning", "dialogue"):
        assert tuned[f"eval/{source}/loss"] < before[f"eval/{source}/loss"], source
    assert preferred["eval/loss"] < 1.1 * tuned["eval/loss"]
    evaluated = [row for row in metrics_of(Path("runs/dpo-smollm2")) if "eval/rewards/accuracies" in row]
    assert evaluated[-1]["eval/rewards/accuracies"] > 0.6
