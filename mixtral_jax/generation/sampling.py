"""From logits to the next token: greedy, temperature, top-k, top-p; a stream of random numbers per row."""

import numbers
from dataclasses import dataclass, field
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.seeds import random_key


class Drawing(TypedDict, total=False):
    """How tokens are drawn, as users say it. `temperature`: 0 (the default) takes the likeliest token.

    `top_k`: draw from the k likeliest only; None or 0: from all. `top_p`: of these, from the likeliest that together
    have this probability; None or 1: from all. `seed`, any integer: the same gives the same tokens; what row b draws
    does not depend on the other rows.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn. What is None is off, and known so when the step is compiled."""

    key: jax.Array
    temperature: jax.Array | None  # None: greedy
    top_p: jax.Array | None
    top_k: int | None = field(metadata={"static": True})


def make_sampler(
    *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
) -> Sampler:
    """A sampler from what users say: temperature 0 is greedy; top_k 0 or None and top_p 1 or None are off.

    A temperature below the normal numbers of fp32 (1.2e-38) is greedy too.

    Raises:
        ValueError: a temperature or top_k that is negative or not finite, a top_p outside (0, 1], or no numbers;
            a seed that is no integer.
    """
    tiny, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if not (_is(numbers.Real, temperature) and 0 <= temperature <= largest):
        raise ValueError(f"temperature is {temperature}: it must be a finite number, 0 (greedy) or larger")
    if top_k is not None and not (is_whole(top_k) and top_k >= 0):
        raise ValueError(f"top_k is {top_k}: it must be a whole number, 0 (all tokens) or larger")
    if top_p is not None and not (_is(numbers.Real, top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p}: it must be a number in (0, 1]")
    if not is_whole(seed):
        raise ValueError(f"seed is {seed}: it must be a whole number")
    key = random_key(int(seed))
    if temperature < tiny:
        return Sampler(key, None, None, None)
    mass = None if top_p is None or top_p == 1 else jnp.float32(max(top_p, tiny))
    return Sampler(key, jnp.float32(temperature), mass, top_k or None)


def is_whole(value: Any) -> bool:
    """Whether it is an integer, of Python or numpy; True and False are none."""
    return _is(numbers.Integral, value)


def _is(kind: type, value: Any) -> bool:
    value = value.item() if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 else value
    return isinstance(value, kind) and not isinstance(value, bool)


def sample(
    logits_BV: Float[Array, "B V"], sampler: Sampler, row_B: Int[Array, " B"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """The next token of each row.

    Randomness depends on (seed, row, step) alone, so a row's text does not change with its neighbours' lengths, and
    Gumbel noise belongs to a token id, so that rounding in the logits rarely changes what is drawn. V, which is no
    token, where a logit is NaN.
    """
    if sampler.temperature is None:
        return first_maximum(logits_BV)
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)  # stays 0 at any temperature, while the others go to -inf
    scaled_BV = jnp.where(logits_BV == top_B1, 0, (logits_BV - top_B1) / sampler.temperature)
    logits_BV = truncate(scaled_BV, sampler.top_k, sampler.top_p)

    def gumbel(row: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(sampler.key, row), step)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    return first_maximum(logits_BV + jax.vmap(gumbel)(row_B))


def first_maximum(x_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Index of each row's maximum, the first of equals, and V for a row with NaN, which has none.

    An argmax as two plain reductions, thrice as fast on a CPU.
    """
    top_B1, V = jnp.max(x_BV, axis=-1, keepdims=True), x_BV.shape[-1]
    return jnp.min(jnp.where(x_BV == top_B1, jnp.arange(V, dtype=jnp.int32), V), axis=-1)


def truncate(logits_BV: Float[Array, "B V"], top_k: int | None, top_p: Float[Array, ""] | None) -> Float[Array, "B V"]:
    """-inf for what may not be drawn: first all but the k likeliest, then all but the fewest of these with mass top_p.

    The nucleus (1904.09751, section 3.1) includes the token that crosses the mass, hence at least one. Tokens as likely
    as the last one kept stay too, and so does NaN.
    """
    if top_k is None and top_p is None:
        return logits_BV
    best_BK = jax.lax.top_k(logits_BV, min(top_k or logits_BV.shape[1], logits_BV.shape[1]))[0]
    last_B1 = best_BK[:, -1:]
    if top_p is not None:
        p_BK = jax.nn.softmax(best_BK, axis=-1)
        inside_BK = jnp.cumsum(p_BK, axis=-1) - p_BK < top_p
        last_B1 = jnp.min(jnp.where(inside_BK, best_BK, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < last_B1, -jnp.inf, logits_BV)
