"""Our training step in a process of its own: `python -m tests.bench.ours SHAPE STEPS [capacity]` prints JSON."""

import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.batch import Batch
from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.model import Mixtral, abstract_model
from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Shape, parse
from train.host import drop_freed_memory, pause
from train.objectives import RouterConfig, next_token
from train.optimizer import OptimizerConfig, make_optimizer
from train.state import create_state
from train.step import make_train_step


def batch_of(shape: Shape, seed: int) -> Batch:
    """Random tokens, every one a target."""
    rows = (1, shape.batch, shape.seq_len)
    tokens = np.random.default_rng(seed).integers(0, shape.vocab, (*rows[:2], shape.seq_len + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape.seq_len, dtype=np.int32), rows)
    ones = np.ones(rows, np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], ones.astype(np.float32), ones, positions)


def model_of(shape: Shape) -> MixtralConfig:
    """The model of a shape."""
    return MixtralConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip


def measure(shape: Shape, steps: int, capacity: float | None) -> dict[str, float]:
    """Seconds per step (median), compile seconds and peak memory of the very step that a run takes."""
    config = model_of(shape)
    compute = ComputeConfig(dtype="float32", moe=MoeConfig(capacity_factor=capacity))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"), steps + 1)
    graphdef, _ = nnx.split(abstract_model(config, compute))
    params = nnx.to_pure_dict(nnx.state(Mixtral(config, compute, key=jax.random.key(0))))
    state = jax.jit(lambda p: create_state(p, optimizer), donate_argnums=0)(params)
    objective = next_token(RouterConfig(router_aux_loss_coef=BALANCE_COEFFICIENT, router_z_loss_coef=0.0), config)
    step = make_train_step(objective, optimizer, lambda params, _: nnx.merge(graphdef, params))
    began = time.perf_counter()
    compiled = step.lower(state, None, batch_of(shape, 0)).compile()
    compile_seconds, times = time.perf_counter() - began, []
    drop_freed_memory()
    settled = 0
    for index in range(steps + 2):
        batch = jax.device_put(batch_of(shape, index))
        began = time.perf_counter()
        state, report = compiled(state, None, batch)
        loss = float(report.scalars["train/loss"])
        pause(time.perf_counter() - began)
        times.append(time.perf_counter() - began)
        if index == 20:
            settled = resident_bytes()
    timed, quarter = times[2:], max(1, steps // 4)
    return {
        "seconds": float(np.median(timed)), "compile_seconds": compile_seconds, "loss": loss,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "grown_bytes": resident_bytes() - settled if settled else 0,
        "slowed": float(np.median(timed[-quarter:]) / np.median(timed[:quarter])),
        "flops": config.flops_per_token(shape.seq_len) * shape.tokens,
        "matmul_flops_per_second": matmul_rate(),
    }  # fmt: skip


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def matmul_rate() -> float:
    """XLA's own fp32 matmul, 2048 x 2048 x 2048: the best of ten."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


if __name__ == "__main__":
    capacity = float(sys.argv[3]) if len(sys.argv) > 3 else None
    print(json.dumps(measure(parse(sys.argv[1]), int(sys.argv[2]), capacity)))
