"""AdamW by optax: schedules, decay mask, clipping, spike detection, and the guard around the update.

The guard is a `lax.cond` around the whole update, not a `where` on its results: XLA on the CPU then updates parameters
and moments in place, in about one pass over memory (62 M parameters, 2 cores: 0.08 s; 0.21 s with `where`). On a GPU a
cond copies the whole state (seen in compiled programs): there, and on TPU, it is a loop of one turn or none.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, model_validator

from mixtral_jax.config import FrozenConfig
from mixtral_jax.seeds import random_key
from mixtral_jax.train import moments as held


class OptimizerConfig(FrozenConfig):
    """How parameters move. Weight decay is decoupled: times the learning rate, no part of the gradient."""

    name: Literal["adamw"] = Field("adamw", description="the optimizer")
    learning_rate: float = Field(3e-4, gt=0, description="the highest learning rate, reached after warm-up")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="after warm-up: cosine or linear decay, warmup-stable-decay, or constant"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise from 0")
    decay_steps: int | None = Field(
        None, gt=0, description="wsd: length of the final decay; null: a tenth of all steps"
    )
    final_learning_rate_fraction: float = Field(
        0.1, ge=0, le=1, description="learning rate at the last step, as a fraction of learning_rate"
    )
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the square root of the second moment")
    state_dtype: held.StateDtype = Field(
        "float32",
        description="how both moments are held: bfloat16 halves them, int8 (blocks with scales) quarters them; "
        "docs/precision.md",
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of all matrices; norms have none")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the global norm; null: never")
    skip_spikes: float | None = Field(
        None, gt=1, description="skip an update whose gradient norm is above this many times its running mean"
    )
    max_skips: int = Field(20, gt=0, description="so many skipped updates in a row end the run: exit 3")

    @model_validator(mode="after")
    def _decay_steps_belongs_to_wsd(self) -> Self:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps ({self.decay_steps}) belongs to schedule wsd, not to {self.schedule}")
        return self


Params = Any  # nested dict of fp32 arrays
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

Move = Callable[..., tuple[Params, Any, Any]]  # (key, grads, params, mu, nu) -> (params, mu, nu)

LAYERS = "layers"  # the branch of stacked layers
SPIKE_MEMORY = 0.98  # the running mean of gradient norms looks back over about 50 updates
SPIKE_WARMUP = 20  # updates before a spike can be told from a beginning
SPIKE_WEIGHT = 3.0  # a norm counts as at most so many times the mean, so that one spike moves it by 4 %


class Optimizer(NamedTuple):
    """What the step needs: the optax transformation without learning rate and clipping, and what says of those.

    The factor on the router's updates is no transformation: a run may resume with another one, or with none.
    """

    transformation: optax.GradientTransformation
    schedule: Schedule
    config: OptimizerConfig
    router_factor: float


class OptimizerState(NamedTuple):
    """Moments as they are held, the sum that the running mean of gradient norms is made of, whether all was finite."""

    moments: optax.OptState
    norm_mean: Float[Array, ""]
    norm_count: Int[Array, ""]
    healthy: Bool[Array, ""]


class Applied(NamedTuple):
    """The result of one update."""

    params: Params
    state: OptimizerState
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Bool[Array, ""]


class RatePart(NamedTuple):
    """A phase's part of the schedule: what it is from the phase's first update on, up to the next part or the end."""

    from_step: int  # updates done before it
    schedule: str  # linear, cosine or sqrt, from the rate that it finds to the fraction below; constant: that rate
    final_fraction: float  # of the highest learning rate


def make_optimizer(
    config: OptimizerConfig, steps: int, router_factor: float = 1.0, parts: Sequence[RatePart] = ()
) -> Optimizer:
    """AdamW (1711.05101) for a run of `steps` updates; the router's updates are multiplied with `router_factor`."""
    transformation = optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
    )
    return Optimizer(transformation, make_schedule(config, steps, parts), config, router_factor)


def init_optimizer(optimizer: Optimizer, params: Params) -> OptimizerState:
    """Zero moments, one of each for every parameter."""
    adam, *others = optimizer.transformation.init(params)
    mu, nu = held.zeros(params, optimizer.config.state_dtype)
    moments = (adam._replace(mu=mu, nu=nu), *others)
    return OptimizerState(moments, jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.array(True))


def decay_mask(params: Params) -> Any:
    """True for matrices (and stacks of them), False for norm scales, told by the name of the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def router_mask(params: Params) -> Any:
    """True for the router."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "router", params)


def make_schedule(config: OptimizerConfig, steps: int, parts: Sequence[RatePart] = ()) -> Schedule:
    """Learning rate of update n = 1 ... steps: linear warm-up, then the schedule, at its last value when n = steps.

    From the first of the `parts` on, which lies behind the warm-up, they alone say it, each from the rate that it finds
    to its own at the beginning of the next one or at the last step. Before it cosine and linear are those of the whole
    run, and wsd has no decay of its own.

    Raises:
        ValueError: warm-up (and the decay of wsd) do not fit into `steps`.
    """
    warmup = config.warmup_steps
    if warmup > steps:
        raise ValueError(f"optimizer.warmup_steps ({warmup}) is larger than steps ({steps})")
    decay = steps - warmup
    if config.schedule == "wsd":
        decay = config.decay_steps or min(max(steps // 10, 1), decay)
        if warmup + decay > steps:
            raise ValueError(
                f"optimizer.warmup_steps ({warmup}) + optimizer.decay_steps ({decay}) is larger than steps ({steps})"
            )
    peak, final = config.learning_rate, config.final_learning_rate_fraction

    def schedule(n: Int[Array, ""]) -> Float[Array, ""]:
        rise = jnp.minimum(n / warmup, 1.0) if warmup else jnp.ones(())
        fraction, found = own_fraction(n), own_fraction(parts[0].from_step) if parts else None
        for part, end in zip(parts, [*(part.from_step for part in parts[1:]), steps], strict=False):
            left = _falling(part.schedule, part.from_step, end - part.from_step, n)
            own = found * left + part.final_fraction * (1 - left)
            fraction = jnp.where(n > part.from_step, own, fraction)
            found = own if part.schedule == "constant" else part.final_fraction
        return jnp.asarray(peak * rise * fraction, jnp.float32)

    def own_fraction(n: Any) -> Any:
        if config.schedule == "constant" or (config.schedule == "wsd" and parts):
            return jnp.ones(())
        return final + (1 - final) * _falling(config.schedule, steps - decay, max(decay, 1), n)

    return schedule


def _falling(kind: str, begin: int, length: int, n: Any) -> Any:
    """From 1 at update `begin` to 0 so many updates later."""
    if kind == "constant":
        return jnp.ones(())
    done = jnp.clip((n - begin) / length, 0.0, 1.0)
    if kind == "cosine":
        return 0.5 * (1 + jnp.cos(jnp.pi * done))
    return 1 - (jnp.sqrt(done) if kind == "sqrt" else done)  # 2405.18392, section 3


def apply_gradients(
    optimizer: Optimizer,
    params: Params,
    state: OptimizerState,
    grads: Params,
    loss: Float[Array, ""],
    n: Int[Array, ""],
) -> Applied:
    """Update number `n`: clip by the global norm, then AdamW; left out where loss or norm is not finite, or spikes.

    After a loss or a norm that is not finite `state.healthy` stays False and no later update is applied, so that the
    host may read the flag late and still find the last good state.
    """
    grad_norm = optax.tree.norm(grads)
    healthy = state.healthy & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = _is_spike(optimizer, state, grad_norm)
    scale = jnp.ones(())
    if optimizer.config.max_grad_norm is not None:
        scale = jnp.minimum(1.0, optimizer.config.max_grad_norm / jnp.maximum(grad_norm, 1e-30))
    learning_rate = optimizer.schedule(n)

    adam, *others = state.moments
    applies = (healthy & ~spike).astype(jnp.int32)
    key = jax.random.fold_in(random_key(0), adam.count)

    def move(key: jax.Array, grads: Params, params: Params, mu: Any, nu: Any) -> tuple[Params, Any, Any]:
        clipped = jax.tree.map(lambda g: g * scale, grads)
        before = (adam._replace(mu=held.read(mu), nu=held.read(nu)), *others)
        direction, (after, *_) = optimizer.transformation.update(clipped, before, params)
        factors = jax.tree.map(lambda is_router: optimizer.router_factor if is_router else 1.0, router_mask(params))
        direction = jax.tree.map(lambda d, factor: d if factor == 1 else factor * d, direction, factors)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)
        return params, *held.write(after.mu, after.nu, (mu, nu), key)

    in_layers = optimizer.config.state_dtype != "float32" and LAYERS in params
    change = _by_layer if in_layers else _at_once
    params, mu, nu = change(move, applies, key, grads, params, adam.mu, adam.nu)
    moments = (adam._replace(count=adam.count + applies, mu=mu, nu=nu), *others)
    mean, counts = _norm_mean(state), healthy & (grad_norm > 0)  # a batch without targets tells nothing
    counted = jnp.where(state.norm_count > 0, jnp.minimum(grad_norm, SPIKE_WEIGHT * mean), grad_norm)
    norm_mean = jnp.where(counts, SPIKE_MEMORY * state.norm_mean + (1 - SPIKE_MEMORY) * counted, state.norm_mean)
    state = OptimizerState(moments, norm_mean, state.norm_count + counts, healthy)
    return Applied(params, state, grad_norm, learning_rate, healthy & spike)


def _at_once(move: Move, times: Int[Array, ""], key: jax.Array, grads: Params, *trees: Any) -> Any:
    """`move` of the trees, or where `times` is 0 as they are; in place."""

    def branch(*trees: Any) -> Any:
        return jax.lax.cond(times > 0, lambda *trees: move(key, grads, *trees), lambda *trees: trees, *trees)

    def loop(*trees: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, trees: move(key, grads, *trees), trees)

    return jax.lax.platform_dependent(*trees, cpu=branch, default=loop)


def _by_layer(move: Move, times: Int[Array, ""], key: jax.Array, grads: Params, *trees: Any) -> Any:
    """The same, layer by layer, and then what is no layer: no whole stack of moments is ever in fp32."""
    key, rest_key = jax.random.split(key)

    def body(i: Int[Array, ""], layers: Any) -> Any:
        slices = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (grads[LAYERS], *layers))
        moved = move(jax.random.fold_in(key, i), *({LAYERS: tree} for tree in slices))
        return tuple(
            jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), old, new[LAYERS])
            for old, new in zip(layers, moved, strict=True)
        )

    layers = tuple(tree[LAYERS] for tree in trees)
    layers = jax.lax.fori_loop(0, times * jax.tree.leaves(layers)[0].shape[0], body, layers)
    rest = [{name: leaf for name, leaf in tree.items() if name != LAYERS} for tree in (grads, *trees)]
    moved = _at_once(move, times, rest_key, *rest)
    return tuple(new | {LAYERS: layer} for new, layer in zip(moved, layers, strict=True))


def _norm_mean(state: OptimizerState) -> Float[Array, ""]:
    """The running mean of gradient norms, skipped ones too; 0 before there was one."""
    return state.norm_mean / jnp.maximum(1 - SPIKE_MEMORY**state.norm_count, 1e-6)


def _is_spike(optimizer: Optimizer, state: OptimizerState, grad_norm: Float[Array, ""]) -> Bool[Array, ""]:
    if optimizer.config.skip_spikes is None:
        return jnp.array(False)
    return (state.norm_count >= SPIKE_WARMUP) & (grad_norm > optimizer.config.skip_spikes * _norm_mean(state))
