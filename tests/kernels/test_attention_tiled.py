"""Attention in tiles: any size gives the same, and only tiles that the mask fills are visited."""

import jax
import numpy as np
import pytest

from mixtral_jax.kernels.attention import attend
from mixtral_jax.kernels.attention_tiled import (
    Tokens,
    block_sizes,
    chunked_attention,
    seen_bounds,
    segment_bounds,
    tile,
)
from tests.attention_cases import CASES, Case, compare, make, out_and_gradients
from tests.oracles.attention import attention, mask_matrix


@pytest.mark.parametrize("blocks", [(8, 8), (16, 24), (24, 8), (128, 128)])
@pytest.mark.parametrize("name", ["several_tiles_window", "packed_window", "more_keys_shuffled_window"])
def test_tiles_of_any_size_give_the_same(name: str, blocks: tuple[int, int]) -> None:
    case = CASES[name]
    inputs = make(case, seed=1)
    ordered = not case.shuffled and case.S is None
    tiling = tile(case.T, case.S or case.T, *blocks, window=case.window, ordered=ordered)
    got = out_and_gradients(
        lambda q, k, v: chunked_attention(
            q, k, v, *inputs.tokens.values(), window=case.window, tiling=tiling,
            bounds=segment_bounds(tiling, inputs.tokens["keys"].segments)
            if ordered else seen_bounds(tiling, *inputs.tokens.values(), case.window),
        ),
        inputs.arrays,
    )  # fmt: skip
    compare(got, attention(*inputs.arrays[:3], inputs.mask, inputs.arrays[3]), 1e-5)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("blocks", [(16, 16), (8, 24), (32, 8)])
def test_no_tile_before_its_oldest_segment_is_visited(window: int | None, blocks: tuple[int, int]) -> None:
    inputs = make(Case(T=77, lengths=(30, 5, 34), window=window))
    tiling = tile(77, 77, *blocks, window=window, ordered=True)
    bounds = jax.jit(lambda segments: segment_bounds(tiling, segments))(inputs.tokens["queries"].segments)
    visited = 0
    for i, (first, stop) in enumerate(zip(*map(np.asarray, bounds), strict=True)):
        rows = inputs.mask[:, i * blocks[0] : (i + 1) * blocks[0]]
        filled = [j for j in range(-(-77 // blocks[1])) if rows[..., j * blocks[1] : (j + 1) * blocks[1]].any()]
        # padding sees nothing, yet its own tiles are visited
        assert not filled or (first == min(filled) and max(filled) < stop)
        visited += stop - first
    static = sum(tiling.stop) - sum(tiling.first)
    assert visited < static if window is None else visited <= static


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("column", "slots"), [(0, 64), (40, 64), (70, 24)])  # empty, half full, gone round
def test_of_a_cache_only_tiles_that_hold_something_seen_are_visited(
    window: int | None, column: int, slots: int
) -> None:
    T, blocks = 16, (8, 8)
    held_S = column + T - 1 - (column + T - 1 - np.arange(slots)) % slots
    queries = Tokens(column + np.arange(T)[None], np.ones((1, T), int))
    keys = Tokens(held_S[None], (held_S >= 0)[None].astype(int))
    mask = mask_matrix(queries.positions[0], held_S, queries.segments[0], keys.segments[0], window)
    tiling = tile(T, slots, *blocks, window=window, ordered=False)
    bounds = jax.jit(lambda *tokens: seen_bounds(tiling, *tokens, window))(queries, keys)
    for i, (first, stop) in enumerate(zip(*map(np.asarray, bounds), strict=True)):
        rows = mask[i * blocks[0] : (i + 1) * blocks[0]]
        filled = [j for j in range(slots // blocks[1]) if rows[:, j * blocks[1] : (j + 1) * blocks[1]].any()]
        assert (first, stop) == (min(filled), max(filled) + 1)


def test_padding_inside_a_document_ends_nothing() -> None:
    """A row as an attention mask with holes makes it: positions count what is there."""
    inputs = make(Case(T=150, N=2, K=1, lengths=(90, 50)))
    segments = inputs.tokens["queries"].segments.copy()
    segments[:, [0, 1, 60, 61, 62, 100]] = 0
    positions = np.cumsum(segments != 0, axis=1).astype(np.int32)
    tokens = Tokens(positions, segments)
    mask = np.stack([mask_matrix(p, p, s, s, None) for p, s in zip(positions, segments, strict=True)])
    got = out_and_gradients(
        lambda q, k, v: attend(q, k, v, queries=tokens, keys=tokens, window=None, backend="chunked"), inputs.arrays
    )
    compare(got, attention(*inputs.arrays[:3], mask, inputs.arrays[3]), 1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 8), (8, 32)])
def test_tiles_visited_are_those_that_the_mask_fills(window: int | None, blocks: tuple[int, int]) -> None:
    T = 70
    ones = np.ones(T, int)
    mask = mask_matrix(np.arange(T), np.arange(T), ones, ones, window)
    tiling = tile(T, T, *blocks, window=window, ordered=True)
    for i, (first, stop) in enumerate(zip(tiling.first, tiling.stop, strict=True)):
        rows = mask[i * blocks[0] : (i + 1) * blocks[0]]
        filled = [j for j in range(-(-T // blocks[1])) if rows[:, j * blocks[1] : (j + 1) * blocks[1]].any()]
        assert list(range(first, stop)) == filled
    everything = tile(T, T, *blocks, window=window, ordered=False)
    assert set(everything.first) == {0} and set(everything.stop) == {-(-T // blocks[1])}


def test_blocks_fit_the_shape() -> None:
    for T, S, heads in ((5, 5, 8), (256, 256, 64), (512, 512, 64), (2048, 2048, 8), (32768, 32768, 8), (64, 1, 1)):
        for on_cpu in (True, False):
            block_T, block_S = block_sizes(T, S, heads, on_cpu=on_cpu)
            assert 0 < block_T <= T + 7 and 0 < block_S <= S + 7 and block_T % 8 == block_S % 8 == 0
    assert block_sizes(256, 256, 64, on_cpu=True) == (64, 64)
    assert block_sizes(2048, 2048, 8, on_cpu=True) == (256, 128)
