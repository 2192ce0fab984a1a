"""Useful FLOPs: the metrics' are the plan's in every stage, and XLA counts the same where nothing is done twice."""

import jax
import pytest

from mixtral_jax.train import trainer as training
from mixtral_jax.train.plan import peak_flops, useful_flops
from mixtral_jax.train.plan.chips import CHIPS
from mixtral_jax.train.plan.closed_form import useful
from mixtral_jax.train.plan.compile import compile_step
from mixtral_jax.train.plan.gpus import GPUS
from mixtral_jax.train.plan.hlo import read_program
from mixtral_jax.train.plan.placement import adapter_params
from tests.tiny import TINY, metrics_of

STAGES = {
    "pretrain": ("pretrain", {}),
    "sft": ("sft", {}),
    "sft, adapters": ("sft", {"lora": {"rank": 8}}),
    "sft, adapters of attention and a trained router": (
        "sft", {"lora": {"rank": 8, "targets": ["q_proj"]}, "router": {"update": "train"}}
    ),
    "sft, 4-bit base": ("sft", {"lora": {"rank": 8, "base_dtype": "nf4"}}),
    "dpo, live reference": ("dpo", {"dpo": {"reference": "frozen"}}),
    "dpo, precomputed": ("dpo", {"dpo": {"reference": "precomputed"}}),
    "dpo, adapters": ("dpo", {"lora": {"rank": 8}}),
    "orpo": ("dpo", {"dpo": {"loss_type": "orpo"}}),
}  # fmt: skip


@pytest.fixture
def make(make_config, make_tuning_config):
    def make(name, **changes):
        stage, own = STAGES[name]
        return make_config(**changes) if stage == "pretrain" else make_tuning_config(stage, **own, **changes)

    return make


SAME = ("sft", "dpo, precomputed")  # programs as pretrain's and orpo's
FASTER = [pytest.param(name, marks=pytest.mark.slow if name in SAME else ()) for name in STAGES if "4-bit" not in name]


@pytest.mark.parametrize("name", FASTER)  # a 4-bit base must recompute
def test_useful_flops_are_those_of_the_program(make, name):
    """Of one expert, as the dense product of more computes all of each row's; attention of all pairs, without tiles."""
    model = TINY | {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "head_dim": 16,
    }
    plain = {"remat": "none", "attention": "reference", "dtype": "float32"}
    config = make(name, model=model, seq_len=64, global_batch_size=4, compute=plain)
    _, texts = compile_step(config, None, 1e12)
    counted = sum(read_program(text).dot_flops for text in texts)
    if config.stage == "dpo":  # the logits of the loss are made once more for its gradient
        counted -= 2 * config.model.matmul_params.head * config.tokens_per_step
    assert counted == pytest.approx(useful_flops(config, "full"), rel=0.01)
    below = useful_flops(config, "full") - useful_flops(config)
    assert below == pytest.approx(config.tokens_per_step * (useful_of_pairs(config) * 63 / 128), rel=1e-6)


def useful_of_pairs(config):
    """Attention's own FLOPs of one token, all pairs."""
    passes = 3 + (config.stage == "dpo" and config.reference in ("frozen", "lora_base"))
    return passes * config.model.attention_flops(config.seq_len)


LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("pretrain", "sft, 4-bit base", "dpo, live reference")]


@pytest.mark.parametrize("name", ["sft, adapters", *LONGER])
def test_a_run_reports_the_plans_flops(make, name, monkeypatch):
    """Padding counts: most of the rows of these chats and pairs is padding."""
    monkeypatch.setattr(training, "make_mesh", lambda config: None)
    config = make(name, steps=1, checkpoint={"every": None}, optimizer={"warmup_steps": 0})
    with training.Trainer(config, quiet=True) as trainer:
        for _ in trainer.steps():
            pass
    (line,) = [line for line in metrics_of(config.run_dir) if "train/loss" in line]
    seconds = line["perf/step_seconds"] * jax.device_count()
    planned = useful(config, config.mesh.sizes(8))[0] * 8
    assert line["perf/tflops_per_device"] * 1e12 * seconds == pytest.approx(planned, rel=1e-6)
    assert planned == useful_flops(config)


def test_a_quantised_base_costs_what_the_same_base_costs_unpacked(make):
    assert useful_flops(make("sft, 4-bit base")) == useful_flops(make("sft, adapters"))
    assert sum(adapter_params(make("sft, adapters"))) > 0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks_by_the_names_that_jax_gives(kind, peak):
    assert peak_flops(kind) == peak


def test_chips_have_the_peaks_of_their_devices():
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}
    kinds |= {name: gpu.device_kind for name, gpu in GPUS.items()}
    assert {name: peak_flops(kind) for name, kind in kinds.items()} == {c.name: c.flops for c in CHIPS.values()}
