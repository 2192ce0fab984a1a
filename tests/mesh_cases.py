"""A Mixtral small enough to compile on every mesh, batches of every kind, and one step of it as a compiled function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.config import MixtralConfig
from mixtral_jax.model import Mixtral, abstract_model, next_token_sums
from mixtral_jax.moe.balance import balance_loss, z_loss
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import batch_sharding, param_shardings
from mixtral_jax.train.optimizer import OptimizerConfig, apply_gradients, init_optimizer, make_optimizer

B, T = 8, 16
CONFIG = MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    rope_theta=1e4, initializer_range=0.3,
)  # fmt: skip
# eps so large that a gradient which is nearly 0 does not become a full step in the direction of its rounding error
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ADAMW = make_optimizer(OptimizerConfig(learning_rate=0.01, eps=1e-3, max_grad_norm=None, schedule="constant"), 10)


def make_params(seed=0):
    make = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(Mixtral(CONFIG, key=key))), compiler_options=FAST_TO_COMPILE)
    return jax.device_get(make(jax.random.key(seed)))


def one_expert_params(params):
    """Every token has expert 0 first and expert 1 second, in every layer: all other experts get nothing."""
    params = jax.tree.map(np.array, params)
    params["embed"]["weight"][:, 0] = 5.0  # a component that all tokens share, which the residual stream keeps
    for name in ("attention", "moe"):  # nothing else is written into it
        params["layers"][name][{"attention": "output", "moe": "w2"}[name]][..., 0] = 0.0
    params["layers"]["moe"]["router"][:, 0, :] = 0.0
    params["layers"]["moe"]["router"][:, 0, :2] = (2.5, 1.5)  # larger, and the rounding of z alone is more than 1e-5
    return params


def make_batches(seed=0):
    """tokens, targets, weights, positions, segments of each kind of batch; all of one shape."""
    rng = np.random.default_rng(seed)

    def rows(lengths_of_row):
        """Rows of documents of these lengths; what is left of a row is padding."""
        segments, positions = np.zeros((2, B, T), np.int32)
        for b, lengths in enumerate(lengths_of_row):
            start = 0
            for number, length in enumerate(lengths, 1):
                segments[b, start : start + length] = number
                positions[b, start : start + length] = np.arange(length)
                start += length
        weights = (rng.random((B, T)) * (segments > 0)).astype(np.float32)
        tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, B, T)).astype(np.int32)
        return tokens, targets, weights, positions, segments

    cuts = [sorted(rng.integers(1, T, 2)) for _ in range(B)]
    return {
        "packed": rows([(a, b - a, T - b) for a, b in cuts]),
        "padded": rows([(rng.integers(1, T),) for _ in range(B)]),
        "whole": rows([(T,)] * B),
        "empty rows": rows([(T,) if b in (2, 5) else () for b in range(B)]),  # whole devices without a token
    }


def make_step(compute, mesh_config=None):
    """(params, rows) -> losses, loads, gradients, and parameters after one AdamW step; on a mesh if one is given."""
    mesh = None if mesh_config is None else make_mesh(mesh_config)
    abstract = abstract_model(CONFIG, compute)
    graphdef, _ = nnx.split(abstract)

    def loss_of(params, tokens, targets, weights, positions, segments):
        model = nnx.merge(graphdef, params)
        sums, stats = next_token_sums(model, tokens, targets, weights, positions, segments)
        parts = {
            "ce": sums.loss_sum / jnp.sum(weights),
            "correct": sums.correct_sum,
            "per_layer": balance_loss(stats, "per_layer", CONFIG.num_experts_per_tok),
            "hf_pooled": balance_loss(stats, "hf_pooled", CONFIG.num_experts_per_tok),
            "z": z_loss(stats),
        }
        loss = parts["ce"] + 0.1 * parts["per_layer"] + 0.1 * parts["hf_pooled"] + 0.01 * parts["z"]
        return loss, (parts, stats.counts_LE, stats.dropped_L)

    def step(params, rows):
        (loss, (parts, counts, dropped)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, *rows)
        n = jnp.ones((), jnp.int32)
        after = apply_gradients(ADAMW, params, init_optimizer(ADAMW, params), grads, loss, n).params
        return {"loss": loss, "parts": parts, "counts": counts, "dropped": dropped, "grads": grads, "after": after}

    if mesh is None:
        return jax.jit(step, compiler_options=FAST_TO_COMPILE)
    shardings = param_shardings(abstract, mesh)
    places = (shardings, (batch_sharding(mesh, leading=0),) * 5)
    compiled = jax.jit(step, in_shardings=places, compiler_options=FAST_TO_COMPILE)

    def run(params, rows):
        with jax.set_mesh(mesh):
            return compiled(params, rows)

    run.jitted = compiled
    run.mesh, run.shardings = mesh, shardings
    return run


@partial(jax.jit, compiler_options=FAST_TO_COMPILE)
def smallest_routing_gap(params, rows):
    """The smallest difference, over all tokens and layers, between the router's k-th and (k+1)-th probability."""
    graphdef, _ = nnx.split(abstract_model(CONFIG))
    model, k = nnx.merge(graphdef, params), CONFIG.num_experts_per_tok
    tokens, _, _, positions, segments = rows
    ranked = jnp.sort(model.routing(tokens, positions, segments).probs_ME, axis=-1, descending=True)
    return jnp.min(jnp.where(segments[..., None] > 0, ranked[..., k - 1] - ranked[..., k], 1.0))


def mesh_config(**sizes):
    return MeshConfig(**{"data": -1, **sizes})
