"""Sampling against the distribution that it is defined by."""

import re

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
    rows = [[1.0, 3.0, 3.0], [-np.inf] * 3, [np.nan, 2.0, 1.0], [np.inf, 0.0, np.inf], [np.nan] * 3]
    np.testing.assert_array_equal(jax.jit(first_maximum)(jnp.array(rows)), [1, 0, 3, 0, 3])
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


LOGITS_BV = np.array([[4.0, 5.0, 9.0, 8.0], [-5.0, -6.0, -10.0, -9.0], [3e38, -3e38, 0.0, 1.0], [0, np.inf, 9.0, 8.0]])
TINIEST = float(np.finfo(np.float32).tiny)


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-45, 1e-40, TINIEST, 1e-38, 1e-30, np.float32(1e-3)])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_p": 1e-50}, {"top_k": 2}, {"top_k": 99, "top_p": 1e-9}])
def test_towards_temperature_0_the_likeliest_is_drawn(temperature: float, options: dict) -> None:
    sampler = make_sampler(temperature=temperature, **options)
    for step in range(3):
        drawn = sample(jnp.array(LOGITS_BV, jnp.float32), sampler, jnp.arange(4), jnp.int32(step))
        assert drawn.tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize("top_p", [1e-9, 1e-40, 1e-50, 5e-324])
def test_the_smallest_mass_keeps_the_likeliest(top_p: float) -> None:
    sampler = make_sampler(temperature=50.0, top_p=top_p)
    for step in range(5):
        assert sample(jnp.array([[4.0, 5.0, 9.0, 8.0]]), sampler, jnp.arange(1), jnp.int32(step)).tolist() == [2]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_a_row_with_nan_draws_no_token_and_changes_no_other(options: dict) -> None:
    """Not one that could be taken for a choice: the number behind the last."""
    logits_BV = jnp.array([[4.0, np.nan, 9.0, 8.0], [4.0, 5.0, 9.0, 8.0], [np.nan] * 4])
    for temperature in (0.0, 1.0):
        sampler = make_sampler(temperature=temperature, **options)
        got = sample(logits_BV, sampler, jnp.arange(3), jnp.int32(0)).tolist()
        alone = sample(logits_BV[1:2], sampler, jnp.array([1]), jnp.int32(0)).tolist()
        assert got == [4, *alone, 4]
        assert alone[0] < 4


def test_the_largest_temperature_draws_evenly() -> None:
    sampler = make_sampler(temperature=3e38)
    tokens = sample(jnp.tile(jnp.array([[4.0, 5.0, 9.0, 8.0]]), (4000, 1)), sampler, jnp.arange(4000), jnp.int32(0))
    np.testing.assert_allclose(np.bincount(np.asarray(tokens), minlength=4) / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("temperature", [float("nan"), float("inf"), -1, -1e-50, 1e39, True, "1", None], "a finite number, 0"),
        ("top_k", [-1, 2.5, 2.0, True, "2", float("nan")], "a whole number, 0"),
        ("top_p", [0, 0.0, -0.1, 1.1, float("nan"), True, "0.5"], r"a number in \(0, 1\]"),
    ],
)
def test_what_no_sampler_is_made_of(name: str, values: list, message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is {re.escape(str(value))}: it must be {message}"):
            make_sampler(**{"temperature": 1.0, name: value})
