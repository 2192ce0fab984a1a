"""Our SFT, LoRA and DPO steps: `python -m tests.bench.tuning_ours SHAPE sft|lora|dpo PROMPT [OPTIONS]`.

Each row is one chat of the shape's length, of which the share PROMPT is not learned; for DPO two rows are a pair in one
row of twice the length, and the reference's forward pass belongs to the step.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from mixtral_jax.data.rows.batch import Batch, PairBatch
from mixtral_jax.data.rows.row import pair_row
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.train.hooks.ledger import pause_for_memory
from mixtral_jax.train.memory import drop_freed_memory
from mixtral_jax.train.objective import RouterConfig, next_token
from mixtral_jax.train.optimizer import OptimizerConfig, make_optimizer
from mixtral_jax.train.preference.config import DpoConfig
from mixtral_jax.train.preference.objective import make_sequence_logps, preference
from mixtral_jax.train.state import create_state
from mixtral_jax.train.step import make_train_step
from mixtral_jax.train.weights import join, keep
from tests.bench.ours import compute_of, device_facts, model_of
from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Options, Shape, parse
from tests.bench.worker import serve

LORA = LoraConfig(rank=16)


def chats(shape: Shape, seed: int, prompt: float) -> Batch:
    """Rows of random tokens, of which all behind the prompt are learned."""
    rng, T = np.random.default_rng(seed), shape.seq_len
    rows = (1, shape.batch, T)
    tokens = rng.integers(3, shape.vocab, (*rows[:2], T + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), rows)
    learned = (places >= int(T * prompt) - 1) & (places < T - 1)
    return Batch(tokens[..., :-1], tokens[..., 1:], learned.astype(np.float32), np.ones(rows, np.int32), places)


def pairs(shape: Shape, seed: int, prompt: float) -> PairBatch:
    """The same rows, two by two."""
    chat = chats(shape, seed, prompt)
    fields = [field[0].reshape(-1, 2 * shape.seq_len) for field in chat]
    fields[3] = np.repeat(np.array([1, 2], np.int32), shape.seq_len) + 0 * fields[3]
    rows = [pair_row(Batch(*row), pairs=1) for row in zip(*fields, strict=True)]
    return PairBatch(*(np.stack(column)[None] for column in zip(*rows, strict=True)))


def prepare(shape: Shape, kind: str, prompt: float, options: Options) -> Callable[[int], float]:
    """One step as a function of its number that gives the loss."""
    config, compute = model_of(shape), compute_of(options)
    lora = LORA if kind == "lora" else None
    optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"), 10_000)
    graphdef, _ = nnx.split(abstract_model(config, compute, lora=lora))
    weights = nnx.to_pure_dict(nnx.state(Mixtral(config, compute, key=jax.random.key(0), lora=lora)))
    trained, frozen = weights, None
    if lora:
        trained, frozen = keep(weights, is_adapter), keep(weights, lambda path: not is_adapter(path))
    reference = jax.tree.map(np.asarray, weights) if kind == "dpo" else None
    state = jax.jit(lambda p: create_state(p, optimizer), donate_argnums=0)(trained)

    def merge(params: Any, frozen: Any) -> nnx.Module:
        return nnx.merge(graphdef, join(params, frozen))

    router = RouterConfig(router_aux_loss_coef=BALANCE_COEFFICIENT, router_z_loss_coef=0.0)
    objective = next_token(router, config, entropy=True, skip_masked=True)  # as stage sft has it
    if kind == "dpo":
        objective = preference(DpoConfig(), router, config)
    train_step, ask = make_train_step(objective, optimizer, merge), None
    if reference is not None:
        ask, reference = make_sequence_logps(lambda p: merge(p, None), None), jax.device_put(reference)

    def step(index: int) -> float:
        nonlocal state
        batch: Any = (pairs if kind == "dpo" else chats)(shape, index, prompt)
        began = time.perf_counter()
        if ask is not None:
            batch = batch._replace(ref_logps=ask(reference, batch))
        state, report = train_step(state, frozen, batch)
        loss = float(report.scalars["train/loss"])
        pause_for_memory(time.perf_counter() - began)
        if not index:
            drop_freed_memory()
        return loss

    return step


if __name__ == "__main__":
    serve(prepare(parse(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Options.of(sys.argv[4:])), device_facts)
