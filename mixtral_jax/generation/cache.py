"""The model with a key/value cache: one forward pass over the prompts, then one token per row and step.

Rows are right-aligned: prompt b begins at column pad_B[b], so that all rows write the same column at each step. The
cache has S slots; column c lives in slot c mod S. With a sliding window S is at most the window, and the newest column
takes the slot of the one that has just left the window. Nothing is dropped: `capacity_factor` is for training.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.attention import Rows
from mixtral_jax.generation.few_rows import MAX_TOKENS, few_rows_swiglu
from mixtral_jax.kernels.attention import attend
from mixtral_jax.layers import rope_angles
from mixtral_jax.model import Block, Mixtral, compute_dtype
from mixtral_jax.moe.block import SparseMoe
from mixtral_jax.moe.experts import ExpertWeights
from mixtral_jax.moe.router import route
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.parallel.sharding import _devices, assemble, drop_padding


class Cache(NamedTuple):
    """Keys and values of the last S columns, by layer; in the order in which a step reads them."""

    k_LBKSH: Float[Array, "L B K S H"]
    v_LBKSH: Float[Array, "L B K S H"]


def cache_slots(window: int | None, columns: int) -> int:
    """Slots that `columns` columns need."""
    return columns if window is None else min(window, columns)


def prefill(
    model: Mixtral, tokens_BT: Int[Array, "B T"], pad_B: Int[Array, " B"], slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the last column, fp32, and the cache after all columns of the prompts."""
    config, (_, T) = model.config, tokens_BT.shape
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None, :] - pad_B[:, None]
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    positions_BT = jnp.maximum(positions_BT, 0)
    rows = Rows(positions_BT, segments_BT, rope_angles(positions_BT, config.head_dim, config.rope_theta))

    def body(x_BTD: jax.Array, layer: Block) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v = layer.attention.project(layer.attention_norm(x_BTD), rows.angles_BTh)
        y_BTNH = attend(
            q, k, v,
            q_positions_BT=positions_BT, kv_positions_BS=positions_BT,
            q_segments_BT=segments_BT, kv_segments_BS=segments_BT,
            window=config.sliding_window, backend=layer.backend,
        )  # fmt: skip
        x_BTD = x_BTD + layer.attention.merge(y_BTNH)
        x_BTD = x_BTD + _dropless(layer.moe)(layer.moe_norm(x_BTD), segments_BT > 0)[0]
        return x_BTD, (_into_slots(k, slots).swapaxes(1, 2), _into_slots(v, slots).swapaxes(1, 2))

    x_BTD = model.embed(tokens_BT, compute_dtype(model.compute.dtype))
    x_BTD, (k_LBKSH, v_LBKSH) = jax.lax.scan(body, x_BTD, model.layers)
    return _logits(model, x_BTD[:, -1]), Cache(k_LBKSH, v_LBKSH)


def decode(
    model: Mixtral,
    cache: Cache,
    token_B: Int[Array, " B"],
    column: Int[Array, ""],
    pad_B: Int[Array, " B"],
    live_B: Bool[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after `token_B`, which stands in `column`, and the cache that holds it. Rows not live cost no experts."""
    config, slots = model.config, cache.k_LBKSH.shape[3]
    slot = column % slots
    # the newest column that a slot can hold by now; a slot that holds none yet gets a negative one
    held_S = column - (column - jnp.arange(slots, dtype=jnp.int32)) % slots
    kv_positions_BS = held_S[None, :] - pad_B[:, None]
    seen_BS = ((held_S >= 0)[None, :] & (kv_positions_BS >= 0)).astype(jnp.int32)
    position_B1 = jnp.maximum(column - pad_B, 0)[:, None]
    angles_B1h = rope_angles(position_B1, config.head_dim, config.rope_theta)

    def body(index: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        x_B1D, (k_LBKSH, v_LBKSH) = carry
        # What of the layer is not used here, the experts above all, is never sliced.
        layer = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), model.layers)
        q, k, v = layer.attention.project(layer.attention_norm(x_B1D), angles_B1h)
        k_LBKSH, v_LBKSH = (
            jax.lax.dynamic_update_slice(cached, new_B1KH.swapaxes(1, 2)[None], (index, 0, 0, slot, 0))
            for cached, new_B1KH in ((k_LBKSH, k), (v_LBKSH, v))
        )
        y_B1NH = attend(
            q,
            jax.lax.dynamic_index_in_dim(k_LBKSH, index, keepdims=False).swapaxes(1, 2),
            jax.lax.dynamic_index_in_dim(v_LBKSH, index, keepdims=False).swapaxes(1, 2),
            q_positions_BT=position_B1, kv_positions_BS=kv_positions_BS,
            q_segments_BT=jnp.ones_like(position_B1), kv_segments_BS=seen_BS,
            window=config.sliding_window, backend="reference", ordered=False,
        )  # fmt: skip
        x_B1D = x_B1D + layer.attention.merge(y_B1NH)
        return x_B1D + _experts(model.layers.moe, layer, index, x_B1D, live_B), Cache(k_LBKSH, v_LBKSH)

    x_B1D = model.embed(token_B[:, None], compute_dtype(model.compute.dtype))
    x_B1D, cache = jax.lax.fori_loop(0, config.num_hidden_layers, body, (x_B1D, cache))
    return _logits(model, x_B1D[:, 0]), cache


def _into_slots(k_BTKH: jax.Array, slots: int) -> jax.Array:
    """The last `slots` columns, column c at slot c mod `slots`; slots that nothing fills are 0."""
    columns = k_BTKH.shape[1]
    if columns <= slots:
        return jnp.pad(k_BTKH, ((0, 0), (0, slots - columns), (0, 0), (0, 0)))
    return jnp.roll(k_BTKH[:, columns - slots :], columns % slots, axis=1)


def _dropless(moe: SparseMoe) -> SparseMoe:
    """The block without capacity and chunks. `moe` must be a copy of ours: it is a slice of the stack here."""
    moe.options = moe.options.model_copy(update={"capacity_factor": None, "chunk_tokens": None})
    return moe


def _experts(
    stacked: SparseMoe, layer: Block, index: jax.Array, x_B1D: jax.Array, live_B: jax.Array
) -> Float[Array, "B 1 D"]:
    """The expert block of one layer on one token a row."""
    h_B1D, config = layer.moe_norm(x_B1D), layer.moe.config
    if _devices(MESH_AXES) > 1 or h_B1D.shape[0] > MAX_TOKENS:
        return _dropless(layer.moe)(h_B1D, live_B[:, None])[0]
    h_MD = h_B1D[:, 0]
    if config.is_dense:
        expert_MC = jnp.zeros((h_MD.shape[0], 1), jnp.int32)
        gate_MC = jnp.ones((h_MD.shape[0], 1), jnp.float32)
    else:
        dtype = jnp.float32 if layer.moe.options.router_dtype == "float32" else h_MD.dtype
        routing = route(h_MD, layer.moe.router[...].astype(jnp.float32), config.num_experts_per_tok, dtype)
        expert_MC, gate_MC = routing.expert_MC, routing.gate_MC
    expert_MC = jnp.where(live_B[:, None], expert_MC, config.num_local_experts)

    def read(expert: jax.Array) -> ExpertWeights:
        return stacked.one_expert(index, expert, h_MD.dtype)

    y_MD = few_rows_swiglu(h_MD, expert_MC, gate_MC, config.num_local_experts, read)
    return y_MD.astype(x_B1D.dtype)[:, None]


def _logits(model: Mixtral, x_BD: jax.Array) -> Float[Array, "B V"]:
    logits_BV = jnp.dot(model.norm(x_BD), model.head_weight(), preferred_element_type=jnp.float32)
    return drop_padding(assemble(logits_BV, 1, ("tensor",)), model.config.vocab_size)
