"""One optimizer step and one evaluation step: pure functions of pytrees, jitted once, state donated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mixtral_jax.parallel import replicas, sum_replicas
from mixtral_jax.seeds import random_key
from mixtral_jax.train.objective import Objective
from mixtral_jax.train.optimizer import Optimizer, Params, apply_gradients
from mixtral_jax.train.state import TrainState

Merge = Callable[[Params, Any], nnx.Module]  # (params, frozen) -> model
Frozen = Any  # arrays that the model needs and the optimizer does not touch: the base under LoRA, else None


class StepReport(NamedTuple):
    """What a step says; it stays on the device until a hook asks."""

    scalars: dict[str, Float[Array, ""]]
    counts_LE: Float[Array, "L E"] | None  # choices per layer and expert over the whole step
    healthy: Bool[Array, ""]  # loss and gradient norm were finite in this step and all before it

    def metrics(self) -> dict[str, Any]:
        """The scalars as numbers, in one transfer off the device; waits for the step."""
        return {name: float(value) for name, value in jax.device_get(self.scalars).items()}


TrainStep = Callable[[TrainState, Frozen, Any], tuple[TrainState, StepReport]]


def make_train_step(
    objective: Objective, optimizer: Optimizer, merge: Merge, state_shardings: Any = None, noise_seed: int | None = None
) -> TrainStep:
    """(state, frozen, batch) -> (state, report), jitted; the state is donated.

    With a `noise_seed` every micro-batch gets its own random key, a function of the seed and of the updates done.

    Batch leaves are (A, b, ...). The divisor of the loss is counted over all of them before any forward pass, so the
    loss is sum(w * nll) / sum(w) over the whole global batch, however it is cut into A micro-batches (NUMERICS D1).
    """

    def train_step(state: TrainState, frozen: Frozen, batch: Any) -> tuple[TrainState, StepReport]:
        key = None if noise_seed is None else jax.random.fold_in(random_key(noise_seed), state.step)
        loss, parts, grads = loss_and_gradients(objective, merge, state.params, frozen, batch, key)
        n = state.step + 1
        applied = apply_gradients(optimizer, state.params, state.optimizer, grads, loss, n)
        healthy = applied.state.healthy
        report = objective.report(parts)
        scalars = {
            "train/loss": loss,
            **report.scalars,
            "train/grad_norm": applied.grad_norm,
            "train/learning_rate": applied.learning_rate,
            "train/skipped": applied.skipped.astype(jnp.float32),
        }
        step = jnp.where(healthy, n, state.step)
        return TrainState(step, applied.params, applied.state), StepReport(scalars, report.counts_LE, healthy)

    shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def loss_and_gradients(
    objective: Objective, merge: Merge, params: Params, frozen: Frozen, batch: Any, key: jax.Array | None = None
) -> tuple[Float[Array, ""], Any, Params]:
    """Loss, the objective's additive parts, and gradients, summed over the A micro-batches in fp32.

    Of several micro-batches the gradients are summed over `data` once, behind them all; of one the sum belongs to the
    backward pass, which hides it.
    """
    divisor = objective.weight(batch)

    def loss_of(params: Params, rows: Any, key: jax.Array | None) -> tuple[Float[Array, ""], Any]:
        return objective.loss(merge(params, frozen), rows, divisor, key)

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    keys = None if key is None else jax.random.split(key, micro_batches)
    first = jax.tree.map(lambda x: x[0], (batch, keys))
    if micro_batches == 1:  # no scan, and no second buffer of gradients
        (loss, parts), grads = differentiate(params, *first)
        return loss, parts, grads

    model: Any = merge(params, frozen)
    shared = dict(jax.sharding.get_abstract_mesh().shape).get("data", 1) > 1
    if shared:
        params = replicas(model, params)

    def accumulate(carry: Any, rows_and_key: Any) -> tuple[Any, None]:
        (loss, parts), grads = differentiate(params, *rows_and_key)
        return jax.tree.map(jnp.add, carry, (loss, parts, grads)), None

    (loss, parts), grads = jax.eval_shape(differentiate, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, parts, grads))
    loss, parts, grads = jax.lax.scan(accumulate, zeros, (batch, keys))[0]
    return loss, parts, sum_replicas(model, grads) if shared else grads


def make_eval_step(objective: Objective, merge: Merge) -> Callable[[Params, Frozen, Any], Any]:
    """(params, frozen, batch) -> the objective's evaluation sums over the rows of the batch, jitted."""

    def eval_step(params: Params, frozen: Frozen, batch: Any) -> Any:
        model = merge(params, frozen)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        return objective.evaluate(model, rows)

    return jax.jit(eval_step)
