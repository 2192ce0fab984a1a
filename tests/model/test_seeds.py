"""Any integer is a seed, and all of its bits count: weights, adapters, noise, drawing, data order, upcycling."""

import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest

from mixtral_jax.data.rows.order import GlobalOrder, Leg, hash64
from mixtral_jax.generation.sampling import make_sampler
from mixtral_jax.seeds import random_key

SEEDS = [5, 5 + 2**32, 5 + 2**64, 17982163893102248868, -5, 2**64 - 5, -5 - 2**64, 2**32 - 5, 3 * 2**200 + 5]


def of_keys(seed):
    return jax.random.key_data(random_key(seed)).tolist()


def of_drawing(seed):
    return jax.random.key_data(make_sampler(temperature=1.0, seed=seed).key).tolist()


def of_rows(seed):
    order = GlobalOrder(seed, {"a": 1000}, [Leg(0, {}, {"a": Fraction(1)})])
    return [order[r] for r in range(8)]


def of_mixture(seed):
    half = Fraction(1, 2)
    order = GlobalOrder(seed, {"a": 1000, "b": 1000}, [Leg(0, {}, {"a": half, "b": half})])
    return [order[r][0] for r in range(32)]


def of_documents(seed):
    return hash64(np.arange(4, dtype=np.uint64), seed).tolist()


@pytest.mark.parametrize("made", [of_keys, of_drawing, of_rows, of_mixture, of_documents])
def test_no_two_seeds_are_one(made):
    values = [made(seed) for seed in SEEDS]
    assert all(a != b for a, b in itertools.combinations(values, 2))
    assert values == [made(seed) for seed in SEEDS]


def test_small_seeds_are_as_jax_has_them():
    for seed in (0, 1, 2**31, 2**32 - 1):
        assert of_keys(seed) == jax.random.key_data(jax.random.key(np.uint32(seed))).tolist() == [0, seed]


def test_a_seed_that_is_no_integer_is_a_sentence():
    with pytest.raises(ValueError, match=r"seed is 1\.5: it must be a whole number"):
        make_sampler(seed=1.5)


def test_a_run_file_takes_any(make_config):
    assert [make_config(seed=seed).seed for seed in SEEDS] == SEEDS


def test_nobody_else_makes_random_keys(root):
    """What draws by a user's seed asks `random_key`."""
    rooms = [root / "mixtral_jax", root / "train", root / "data"]
    files = {file.resolve() for room in rooms for file in room.rglob("*.py")}
    made = {
        f"{file.name}: {line.strip()}"
        for file in files
        for line in file.read_text().splitlines()
        if "random.key(" in line
    }
    assert made == {
        "seeds.py: return jax.random.key(np.uint32(seed))",
        "seeds.py: return jax.random.fold_in(jax.random.key(np.uint32(low)), np.uint32(high))",
        "model.py: return nnx.eval_shape(lambda: make(key=jax.random.key(0)))",
    }
