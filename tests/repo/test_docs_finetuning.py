"""docs/finetuning.md, command by command, on a tiny Mixtral that stands in for the large one."""

import os
import re
import shlex
from pathlib import Path

import jax
import pytest

from mixtral_jax import launch
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import save_hf
from mixtral_jax.model import Mixtral

ROOT = Path(__file__).resolve().parents[2]
BASE = "Mixtral-8x7B-v0.1"
MODEL = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
# What the stand-in needs of the size of a run; everything else is as the recipe says.
SMALL = [
    f"model={MODEL}".replace("'", ""), "mesh={}", "steps=2", "seq_len=128", "global_batch_size=4",
    "micro_batch_size=null", "optimizer.warmup_steps=0", "data.workers=1", "eval.batches=1", "compute.dtype=float32",
]  # fmt: skip
TAKES_A_RECIPE = ("sft", "dpo", "eval", "data")


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory with the recipes, the samples and the stand-in."""
    for name in ("configs", "data"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for module in ("mixtral_jax.train.trainer", "mixtral_jax.train.commands.evaluate"):
        monkeypatch.setattr(f"{module}.make_mesh", lambda config: None)
    monkeypatch.setattr("mixtral_jax.train.plan.compile.has_libtpu", lambda: False)  # compiling takes minutes
    stand_in = Mixtral(MixtralConfig(**MODEL), key=jax.random.key(0))
    save_hf(stand_in, BASE, dtype="bfloat16", tokenizer=ROOT / "data" / "samples" / "tokenizer.model")
    return tmp_path


def test_every_command_of_the_page_does_what_it_says(elsewhere, capsys):
    page = commands()
    assert [command[0] for command in page].count("sft") == 1 and len(page) >= 15
    said = {}
    for command in page:
        small = SMALL if command[0] in TAKES_A_RECIPE else []
        assert launch.main([*command, *small]) == 0, command
        said[" ".join(command)] = capsys.readouterr().out
    verified = [text for command, text in said.items() if command.startswith("convert verify")]
    assert len(verified) == 2 and all(text.splitlines()[-1] == "identical" for text in verified)
    losses = [text.splitlines()[-1] for command, text in said.items() if command.startswith("eval")]
    assert len(set(losses)) == 2  # the merged adapters changed something
    assert {"config.json", "tokenizer.model"} <= set(os.listdir("mixtral-8x7b-tuned"))
    assert "adapter_config.json" in os.listdir("dpo-adapter")
