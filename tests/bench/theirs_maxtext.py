"""MaxText's training step on a CPU: `python -m tests.bench.theirs_maxtext SHAPE capacity|dropless`.

Its own model, loss, optimizer and train_step, jitted by its own helper, which donates the state. Runs in a Python of
its own (3.12), with the packages of requirements-maxtext.txt.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText's own switch: it then does without Google's cloud packages
# without any flags MaxText sets its own, which write every compiled step to /tmp/xla_dump
os.environ.setdefault("XLA_FLAGS", "--xla_dump_to=")

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train.train import train_step
from maxtext.utils import sharding, train_utils

from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Shape, parse
from tests.bench.worker import serve

# What a layer keeps for its backward pass: all that MaxText can keep by name. With scanned layers the policy `none`
# would keep nothing, as the scan wraps each layer in jax.checkpoint all the same.
KEPT = (
    "query_proj", "key_proj", "value_proj", "context", "out_proj", "attention_out", "mlpwi_0", "mlpwi_1", "mlpwo",
    "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo", "moe_x_sorted", "moe_routing_maps",
)  # fmt: skip
# The fastest of what MaxText offers on a CPU in each mode. Its Pallas kernels (megablox) would run interpreted.
MODES: dict[str, dict[str, Any]] = {
    "capacity": {"sparse_matmul": False, "capacity_factor": 1.25, "remat_policy": "minimal_with_context"},
    "dropless": {"sparse_matmul": True, "remat_policy": "custom", **dict.fromkeys(KEPT, "device")},
}


def model_options(shape: Shape) -> dict[str, Any]:
    """The model of a shape: MaxText's mixtral-8x7b.yml with other sizes."""
    return {
        "decoder_block": "mixtral", "mlp_activations": ["silu", "linear"], "base_emb_dim": shape.hidden,
        "base_mlp_dim": shape.ffn, "base_moe_mlp_dim": shape.ffn, "base_num_decoder_layers": shape.layers,
        "base_num_query_heads": shape.heads, "base_num_kv_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads, "vocab_size": shape.vocab, "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k, "rope_max_timescale": 1_000_000, "normalization_layer_epsilon": 1e-5,
        "logits_via_embedding": False, "enable_dropout": False, "dtype": "float32", "weight_dtype": "float32",
        "attention": "dot_product", "megablox": False, "load_balance_loss_weight": BALANCE_COEFFICIENT,
    }  # fmt: skip


def run_options(shape: Shape, directory: str) -> dict[str, Any]:
    """One device, a constant learning rate, and nothing written but into `directory`."""
    return {
        "run_name": "bench", "base_output_directory": directory, "hardware": "cpu", "steps": 100_000,
        "skip_jax_distributed_system": True, "enable_checkpointing": False, "enable_tensorboard": False,
        "jax_cache_dir": "", "log_config": False, "dataset_type": "synthetic", "packing": False,
        "max_target_length": shape.seq_len, "per_device_batch_size": shape.batch, "sharding_tolerance": 1.0,
        "opt_type": "adamw", "learning_rate": LEARNING_RATE, "lr_schedule_type": "wsd", "warmup_steps_fraction": 0.0,
        "wsd_decay_steps_fraction": 0.0, "gradient_clipping_threshold": 1.0,
    }  # fmt: skip


class Trainer:
    """MaxText's train state and its compiled step, put together as its train_loop does."""

    def __init__(self, shape: Shape, mode: str, directory: str):
        base = str(Path(pyconfig.__file__).with_name("base.yml"))
        options = model_options(shape) | run_options(shape, directory) | MODES[mode]
        self.shape, self.config, self.loss = shape, pyconfig.initialize(["", base], **options), float("nan")
        _, _, shardings, _, self.mesh, _, _, loader, *_, state = train_utils.setup_train_loop(self.config, None)
        self.batch, self.batch_sharding = loader.load_next_batch(), loader.input_data_shardings
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(state.model, nnx.Param)))
        graphdef, self.state = nnx.split(state)
        params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(self.config, shardings)
        self.train_step, _ = train_utils.jit_train_and_eval_step(
            self.config, graphdef, self.mesh, self.state, shardings, train_step, params_shardings=params_shardings
        )

    def step(self, index: int) -> None:
        """One update on random tokens, every one a target."""
        rows = (self.shape.batch, self.shape.seq_len + 1)
        tokens = np.random.default_rng(index).integers(0, self.shape.vocab, rows).astype(np.int32)
        batch = self.batch | {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        with jax.set_mesh(self.mesh), logical_axis_rules(self.config.logical_axis_rules):
            self.state, metrics = self.train_step(self.state, jax.device_put(batch, self.batch_sharding))
        self.loss = float(metrics["scalar"]["learning/loss"])

    def facts(self) -> dict[str, Any]:
        """The loss of the last step, how large the model is, and what ran."""
        versions = ", ".join(f"{package} {version(package)}" for package in ("maxtext", "jax", "flax"))
        return {"loss": self.loss, "parameters": self.parameters, "versions": versions}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(parse(sys.argv[1]), sys.argv[2], folder)
        serve(trainer.step, trainer.facts)
