"""Sampling against the distribution that it is defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.generation.sampling import first_maximum, make_sampler, sample, truncate


def kept_twin(logits: np.ndarray, top_k: int | None, top_p: float | None) -> set[int]:
    """The k likeliest; of these, in order, until their share of the mass of the k reaches p."""
    order = list(np.argsort(-logits, kind="stable"))[: top_k or len(logits)]
    p = np.exp(logits[order]) / np.exp(logits[order]).sum()
    kept: set[int] = set()
    mass = 0.0
    for token, share in zip(order, p, strict=True):
        kept.add(int(token))
        mass += share
        if top_p is not None and mass >= top_p:
            break
    return kept


def test_the_first_of_equal_maxima_and_rows_without_one() -> None:
    rows = [[1.0, 3.0, 3.0], [-np.inf] * 3, [np.nan, 2.0, 1.0], [np.inf, 0.0, np.inf]]
    np.testing.assert_array_equal(jax.jit(first_maximum)(jnp.array(rows)), [1, 0, 2, 0])
    x_BV = np.random.default_rng(0).normal(size=(64, 501)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(first_maximum)(x_BV), x_BV.argmax(axis=1))


@pytest.mark.parametrize("top_k", [None, 1, 5, 99])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9])
def test_what_may_be_drawn(top_k: int | None, top_p: float | None) -> None:
    logits_BV = np.random.default_rng(0).normal(size=(4, 23)).astype(np.float32) * 2
    got_BV = truncate(jnp.array(logits_BV), top_k, None if top_p is None else jnp.float32(top_p))
    for logits, got in zip(logits_BV, np.asarray(got_BV), strict=True):
        assert set(np.flatnonzero(np.isfinite(got)).tolist()) == kept_twin(logits, top_k, top_p)
        np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])


def test_frequencies_are_the_probabilities_at_the_temperature() -> None:
    logits_V, temperature, draws = np.array([1.0, 0.0, 2.0, -1.0], np.float32), 0.5, 20000
    sampler = make_sampler(temperature=temperature, seed=1)
    rows = jnp.tile(logits_V[None, :], (draws, 1))
    tokens = np.asarray(sample(rows, sampler, jnp.arange(draws), jnp.int32(0)))
    want = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / draws, want, atol=0.015)


def test_greedy_takes_the_first_of_equals() -> None:
    logits_BV = jnp.array([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    assert sample(logits_BV, make_sampler(), jnp.arange(2), jnp.int32(0)).tolist() == [1, 0]


def test_off_is_off() -> None:
    assert make_sampler(temperature=0.0, top_k=3, top_p=0.5).top_k is None
    sampler = make_sampler(temperature=1.0, top_k=0, top_p=1.0)
    assert (sampler.top_k, sampler.top_p) == (None, None)
    assert len(jax.tree.leaves(sampler)) == 2
