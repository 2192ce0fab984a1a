"""The cache extended piece by piece, against the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.generation.cache import Cache, cache_slots, extend
from mixtral_jax.model import Mixtral
from tests.optional import often
from tests.tiny import tiny_config

COLUMNS, PADS = 24, (0, 9, 20)
SHAPES = {
    "plain": tiny_config(vocab_size=97),
    "window": tiny_config(vocab_size=97, sliding_window=5),
    "dense": tiny_config(vocab_size=97, num_local_experts=1, num_experts_per_tok=1),
}
forward = jax.jit(lambda model, *rows: model(*rows))
step = jax.jit(extend)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pieces", often([(8, 8, 8), (7, 1, 5, 11), (24,)], lambda p: len(p) == 4), ids=str)
def test_hidden_states_are_those_of_the_whole_row(name: str, pieces: tuple[int, ...]) -> None:
    model, rows = Mixtral(SHAPES[name], key=jax.random.key(0)), len(PADS)
    tokens_BT = np.random.default_rng(0).integers(1, 97, (rows, COLUMNS)).astype(np.int32)
    pad_B, config, at = np.array(PADS, np.int32), model.config, 0
    positions_BT = np.arange(COLUMNS, dtype=np.int32)[None] - pad_B[:, None]
    real_BT = positions_BT >= 0
    want = forward(model, tokens_BT, np.maximum(positions_BT, 0), real_BT.astype(np.int32))
    slots = cache_slots(config.sliding_window, COLUMNS, max(pieces))
    empty = jnp.zeros((config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim))
    cache, got = Cache(empty, empty), []
    for size in pieces:
        piece = tokens_BT[:, at : at + size]
        x_BTD, cache = step(model, cache, piece, jnp.int32(at), pad_B, np.ones_like(piece, bool))
        got.append(x_BTD @ model.head_weight())
        at += size
    np.testing.assert_allclose(np.concatenate(got, 1)[real_BT], np.asarray(want)[real_BT], atol=1e-5)
