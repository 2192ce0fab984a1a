"""The model with a key/value cache: one forward pass over the prompts, then one token per row and step.

Rows are right-aligned: prompt b begins at column pad_B[b], so that all rows write the same column at each step. The
cache has S slots; column c lives in slot c mod S. With a sliding window S is at most the window, and the newest column
takes the slot of the one that has just left the window. Nothing is dropped: `capacity_factor` is for training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from mixtral_jax.generation.few_rows import MAX_TOKENS, Apart, few_rows_apart, few_rows_swiglu
from mixtral_jax.kernels import Tokens, attend, bits, from_bits, product
from mixtral_jax.model import Block, Mixtral
from mixtral_jax.moe import ApplyExperts, ExpertWeights
from mixtral_jax.parallel import MESH_AXES, assemble, axis_size, drop_padding

# (what is held, new (B, T, K, H), their slots) -> (what is kept, what this layer reads)
Write = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Cache(NamedTuple):
    """Keys and values of the last S columns, by layer, as `bits`; in the order in which a step reads them."""

    k_LBKSH: Shaped[Array, "*L B K S H"]  # of layers taken apart each has a cache of its own
    v_LBKSH: Shaped[Array, "*L B K S H"]


Held = Cache | tuple[Cache, ...]  # of all layers, or of each one


def cache_slots(window: int | None, columns: int, piece: int = 1) -> int:
    """Slots that `columns` columns need, where up to `piece` of them are written at once."""
    return columns if window is None else min(window + piece - 1, columns)


def prefill(
    model: Mixtral, tokens_BT: Int[Array, "B T"], pad_B: Int[Array, " B"], slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the last column, fp32, and the cache after all columns of the prompts."""
    x_BTD, cache = prompt_states(model, tokens_BT, pad_B, slots)
    return _logits(model, x_BTD[:, -1]), cache


def prompt_states(
    model: Mixtral, tokens_BT: Int[Array, "B T"], pad_B: Int[Array, " B"], slots: int
) -> tuple[Float[Array, "B T D"], Cache]:
    """The last hidden states of prompts, after the final norm, and the cache after all their columns."""
    positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :] - pad_B[:, None]
    tokens = Tokens(jnp.maximum(positions_BT, 0), (positions_BT >= 0).astype(jnp.int32))
    angles_BTh, window = model.angles(tokens.positions), model.config.sliding_window

    def attend_prompt(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
        y = attend(q, k, v, queries=tokens, keys=tokens, window=window, backend=model.compute.attention)
        return y, Cache(*(bits(_into_slots(new, slots).swapaxes(1, 2)) for new in (k, v)))

    def layer(block: Block, x_BTD: jax.Array, _: None, __: None) -> tuple[jax.Array, None, Cache]:
        kept, out = block(x_BTD, angles_BTh, tokens.segments, attend_prompt)
        return out.y_BTD, None, kept

    x_BTD, _, cache = model.dropless().run(model.embedded(tokens_BT), layer)
    return model.norm(x_BTD), cache


def extend(
    model: Mixtral,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    column: Int[Array, ""],
    pad_B: Int[Array, " B"],
    live_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Cache]:
    """The last hidden states of tokens in the columns from `column` on, after the final norm, and the cache with them.

    The cache may be empty (zeros, `column` 0). It needs `cache_slots(window, columns, T)` slots. What is not live costs
    no experts; it takes its columns all the same, so that nothing may follow it in its row.
    Attention is what "auto" chooses, whatever `compute.attention` says: kernels for whole rows do not read a cache.
    """
    run, stack = _layer(model, cache, tokens_BT, column, pad_B, live_BT), model.layers.moe
    few = axis_size(MESH_AXES) == 1 and tokens_BT.size <= MAX_TOKENS

    def layer(block: Block, x_BTD: jax.Array, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache, None]:
        # What of the layer is not used here, the experts above all where tokens are few, is never sliced.
        def apply_few(x_MD: jax.Array, expert_MC: jax.Array, gate_MC: jax.Array) -> jax.Array:
            def read(expert: jax.Array) -> ExpertWeights:
                return stack.one_expert(index, expert, x_MD.dtype)

            return few_rows_swiglu(x_MD, expert_MC, gate_MC, model.config.num_local_experts, read)

        return *run(block, x_BTD, cache, partial(_write_stack, index), apply_few if few else None), None

    layers = jnp.arange(model.config.num_hidden_layers)
    x_BTD, cache, _ = model.dropless().run(model.embedded(tokens_BT), layer, cache, layers)
    return model.norm(x_BTD), cache


def extend_apart(
    model: Mixtral,
    apart: Apart,
    caches: tuple[Cache, ...],
    tokens_BT: Int[Array, "B T"],
    column: Int[Array, ""],
    pad_B: Int[Array, " B"],
    live_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
    """The same of up to MAX_TOKENS tokens, by layers taken apart."""
    run, tree = _layer(model, caches[0], tokens_BT, column, pad_B, live_BT), jax.tree.structure(model.dropless().layers)
    x_BTD, kept = model.embedded(tokens_BT), []
    for own, weights_E, cache in zip(*apart, caches, strict=True):
        block = jax.tree.unflatten(tree, own)
        x_BTD, cache = run(block, x_BTD, cache, _write, partial(few_rows_apart, weights_E=weights_E))
        kept.append(cache)
    return model.norm(x_BTD), tuple(kept)


def _layer(
    model: Mixtral, cache: Cache, tokens_BT: jax.Array, column: jax.Array, pad_B: jax.Array, live_BT: jax.Array
) -> Callable[..., tuple[jax.Array, Cache]]:
    """A layer's way of x past its cache: (block, x, cache, a Write, an ApplyExperts or None) to (x, cache)."""
    slots, window = cache.k_LBKSH.shape[-2], model.config.sliding_window
    columns_T = column + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    # the newest column that a slot can hold by now; a slot that holds none yet gets a negative one
    held_S = columns_T[-1] - (columns_T[-1] - jnp.arange(slots, dtype=jnp.int32)) % slots
    positions_BS, positions_BT = (columns[None, :] - pad_B[:, None] for columns in (held_S, columns_T))
    keys = Tokens(positions_BS, ((held_S >= 0)[None, :] & (positions_BS >= 0)).astype(jnp.int32))
    queries = Tokens(jnp.maximum(positions_BT, 0), (positions_BT >= 0).astype(jnp.int32))
    angles_BTh, live_BT = model.angles(queries.positions), live_BT * queries.segments

    def run(
        block: Block, x_BTD: jax.Array, cache: Cache, write: Write, apply_experts: ApplyExperts | None
    ) -> tuple[jax.Array, Cache]:
        def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
            pairs = [write(held, bits(new), columns_T % slots) for held, new in zip(cache, (k, v), strict=True)]
            written, read = zip(*pairs, strict=True)
            k, v = (from_bits(held, q.dtype).swapaxes(1, 2) for held in read)
            return attend(q, k, v, queries=queries, keys=keys, window=window, ordered=False), Cache(*written)

        kept, out = block(x_BTD, angles_BTh, live_BT, attend_cache, apply_experts=apply_experts)
        return out.y_BTD, kept

    return run


def _write(held_BKSH: jax.Array, new_BTKH: jax.Array, places_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A layer's slots with new columns: to keep, and to read."""
    new_BKTH = new_BTKH.swapaxes(1, 2)
    held_BKSH = held_BKSH.at[:, :, places_T].set(new_BKTH, unique_indices=True, mode="promise_in_bounds")
    return held_BKSH, held_BKSH


def _write_stack(
    index: jax.Array, held_LBKSH: jax.Array, new_BTKH: jax.Array, places_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same of one layer of a stack."""
    new_TBKH = new_BTKH.swapaxes(0, 1)
    held_LBKSH = held_LBKSH.at[index, :, :, places_T].set(new_TBKH, unique_indices=True, mode="promise_in_bounds")
    return held_LBKSH, jax.lax.dynamic_index_in_dim(held_LBKSH, index, keepdims=False)


def inherit(cache: Cache, parent_B: Int[Array, " B"], shift_B: Int[Array, " B"], column: int, slots: int) -> Cache:
    """The cache of new rows before `column`, of which each begins as row `parent` of one that holds all its columns.

    Column c of row b is column c + shift_b of its parent's; what that has not is of no position that a query sees.
    """
    newest = column - 1
    held_S = newest - (newest - jnp.arange(slots, dtype=jnp.int32)) % slots
    from_BS = held_S[None, :] + shift_B[:, None]

    def rows(held: jax.Array) -> jax.Array:
        take = jax.vmap(lambda parent, from_S: held[:, parent].at[:, :, from_S].get(mode="clip"), out_axes=1)
        return take(parent_B, from_BS)

    return Cache(*map(rows, cache))


def decode(
    model: Mixtral,
    cache: Held,
    token_B: Int[Array, " B"],
    column: Int[Array, ""],
    pad_B: Int[Array, " B"],
    live_B: Bool[Array, " B"],
    apart: Apart | None = None,
) -> tuple[Float[Array, "B V"], Held]:
    """Logits after `token_B`, which stands in `column`, and the cache that holds it. Rows not live cost no experts.

    `apart`: the layers, where the cache is one for each.
    """
    rows: Any = (cache, token_B[:, None], column, pad_B, live_B[:, None])
    x_B1D, cache = extend(model, *rows) if apart is None else extend_apart(model, apart, *rows)
    return _logits(model, x_B1D[:, 0]), cache


def _into_slots(k_BTKH: jax.Array, slots: int) -> jax.Array:
    """The last `slots` columns, column c at slot c mod `slots`; slots that nothing fills are 0."""
    columns = k_BTKH.shape[1]
    if columns <= slots:
        return jnp.pad(k_BTKH, ((0, 0), (0, slots - columns), (0, 0), (0, 0)))
    return jnp.roll(k_BTKH[:, columns - slots :], columns % max(slots, 1), axis=1)


def _logits(model: Mixtral, x_BD: jax.Array) -> Float[Array, "B V"]:
    logits_BV = product(x_BD, model.head_weight())
    return drop_padding(assemble(logits_BV, 1, ("tensor",)), model.config.vocab_size)
