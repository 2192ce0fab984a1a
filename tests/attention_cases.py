"""Inputs of attention to compare its back-ends on, and the comparison."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels.attention_tiled import Tokens
from tests.oracles.attention import mask_matrix


class Case(NamedTuple):
    """Shapes of one comparison; `lengths` are the segments of each row, the rest is padding."""

    B: int = 2
    T: int = 40
    N: int = 4
    K: int = 2
    H: int = 8
    window: int | None = None
    lengths: tuple[int, ...] = (1000,)
    S: int | None = None  # keys, of which the queries are the last T
    shuffled: bool = False  # keys and queries out of order


CASES = {
    "causal": Case(),
    "one_kv_head": Case(K=1, T=33),
    "equal_heads": Case(K=4, T=17),
    "odd_head_size": Case(H=5, N=6, K=3),
    "window": Case(window=7),
    "window_1": Case(window=1, T=24),
    "packed_and_padded": Case(lengths=(13, 1, 19)),
    "packed_window": Case(lengths=(17, 20), window=5, T=45),
    "only_padding": Case(lengths=()),
    "several_tiles": Case(B=1, T=150, N=2, K=1),
    "several_tiles_window": Case(B=1, T=150, N=2, K=1, window=20, lengths=(100, 30)),
    "shuffled": Case(B=1, T=70, shuffled=True, lengths=(30, 33), window=11),
    "more_keys": Case(T=20, S=75),
    "more_keys_shuffled_window": Case(T=30, S=77, shuffled=True, window=9, lengths=(50, 20)),
    "decode": Case(T=1, S=37, lengths=(37,), window=20),
}


class Inputs(NamedTuple):
    """Numpy arrays of one case."""

    arrays: tuple[np.ndarray, ...]  # q, k, v, g
    tokens: dict[str, Tokens]  # queries and keys, as `attend` takes them
    mask: np.ndarray


def make(case: Case, seed: int = 0) -> Inputs:
    """Random arrays; the second row of a batch has its segments in the opposite order."""
    rng = np.random.default_rng(seed)
    B, T, S = case.B, case.T, case.S or case.T
    segments, positions = np.zeros((2, B, S), np.int32)
    for b in range(B):
        start = 0
        for number, length in enumerate(case.lengths[:: -1 if b % 2 else 1], 1):
            end = min(start + length, S)
            segments[b, start:end] = number
            positions[b, start:end] = np.arange(end - start)
            start = end
    order = rng.permutation(S) if case.shuffled else np.arange(S)
    mine = rng.permutation(S)[:T] if case.shuffled else np.arange(S - T, S)
    queries, keys = (Tokens(positions[:, at], segments[:, at]) for at in (mine, order))
    mask = np.stack([mask_between(queries, keys, b, case.window) for b in range(B)])
    shapes = (B, T, case.N, case.H), (B, S, case.K, case.H), (B, S, case.K, case.H), (B, T, case.N, case.H)
    arrays = tuple(rng.standard_normal(s, dtype=np.float32) for s in shapes)
    return Inputs(arrays, dict(queries=queries, keys=keys), mask)


def mask_between(queries: Tokens, keys: Tokens, row: int, window: int | None) -> np.ndarray:
    return mask_matrix(queries[0][row], keys[0][row], queries[1][row], keys[1][row], window)


def out_and_gradients(f, arrays: tuple) -> list[np.ndarray]:
    """f(q, k, v) and the gradients of sum(f * g)."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        out, pull_back = jax.vjp(f, q, k, v)
        return out, *pull_back(g)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(*map(jnp.asarray, arrays))]


def compare(got: list[np.ndarray], want: tuple[np.ndarray, ...], tolerance: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)
