"""Our training step: `python -m tests.bench.ours SHAPE [OPTIONS]`, a step for each line of input."""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.train.hooks.ledger import pause_for_memory
from mixtral_jax.train.memory import drop_freed_memory
from mixtral_jax.train.objective import RouterConfig, next_token
from mixtral_jax.train.optimizer import OptimizerConfig, make_optimizer
from mixtral_jax.train.plan import peak_flops
from mixtral_jax.train.state import create_state
from mixtral_jax.train.step import make_train_step
from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Options, Shape, parse
from tests.bench.worker import resident_bytes, serve

SETTLED = 20  # steps after which memory is not to grow any more


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


def compute_of(options: Options) -> ComputeConfig:
    """How our side computes."""
    moe = MoeConfig(capacity_factor=options.capacity, matmul=options.experts)
    return ComputeConfig(dtype=options.dtype, attention=options.attention, moe=moe)


def prepare(shape: Shape, options: Options) -> tuple[Callable[[int], float], Callable[[], dict[str, float]]]:
    """The very step that a run takes, compiled, as a function of its number that gives the loss; and what is known."""
    config = model_of(shape)
    compute = compute_of(options)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"), 10_000)
    graphdef, _ = nnx.split(abstract_model(config, compute))
    params = nnx.to_pure_dict(nnx.state(Mixtral(config, compute, key=jax.random.key(0))))
    state = jax.jit(lambda p: create_state(p, optimizer), donate_argnums=0)(params)
    objective = next_token(RouterConfig(router_aux_loss_coef=BALANCE_COEFFICIENT, router_z_loss_coef=0.0), config)
    train_step = make_train_step(objective, optimizer, lambda params, _: nnx.merge(graphdef, params))
    began = time.perf_counter()
    compiled = train_step.lower(state, None, batch_of(shape, 0)).compile()
    known = {
        "compile_seconds": time.perf_counter() - began,
        "flops": config.flops_per_token(shape.seq_len) * shape.tokens,
        "planned_bytes": peak_bytes(compiled.memory_analysis()),
    }
    drop_freed_memory()

    def step(index: int) -> float:
        nonlocal state
        began = time.perf_counter()
        state, report = compiled(state, None, jax.device_put(batch_of(shape, index)))
        known["loss"] = float(report.scalars["train/loss"])
        pause_for_memory(time.perf_counter() - began)
        if index == SETTLED:
            known["settled_bytes"] = resident_bytes()
        return known["loss"]

    def facts() -> dict[str, float]:
        resident = resident_bytes()
        grown = resident - known.get("settled_bytes", resident)
        return {**known, "grown_bytes": grown, "matmul_flops_per_second": matmul_rate(options.dtype), **device_facts()}

    return step, facts


def peak_bytes(stats: Any) -> float:
    """What a compiled program holds at most, as its compiler says."""
    return (
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    )


def device_facts() -> dict[str, float]:
    """Of an accelerator: the most that was in use on it, in place of the host's memory."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return {}
    seen = {"peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0)}
    return {**seen, "peak_flops": peak_flops(device.device_kind) or 0.0}


def matmul_rate(dtype: str = "float32") -> float:
    """XLA's own matmul, 2048 x 2048 x 2048, its result in fp32: the best of ten."""
    a = jnp.ones((2048, 2048), dtype)
    product = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


if __name__ == "__main__":
    serve(*prepare(parse(sys.argv[1]), Options.of(sys.argv[2:])))
