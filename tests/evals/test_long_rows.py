"""Long rows piece by piece, against the whole forward pass."""

import jax
import numpy as np
import pytest

from mixtral_jax.config import ComputeConfig
from mixtral_jax.generation import generate
from mixtral_jax.model import Mixtral
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import param_shardings
from mixtral_jax.train.errors import ExitCode, failure_of
from mixtral_jax.train.evals.long_rows import score_long
from mixtral_jax.train.evals.scoring import Score
from tests.tiny import tiny_config

SHAPES = {"plain": tiny_config(vocab_size=97), "window": tiny_config(vocab_size=97, sliding_window=5)}
LENGTHS, FIRST, NEW = (2, 17, 18, 44, 33), (1, 16, 3, 30, 1), 4
forward = jax.jit(lambda model, *rows: model(*rows))


def rows_of(model: Mixtral) -> list[list[int]]:
    """Random tokens, behind them a few that the model itself finds likeliest."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 97, n).tolist() for n in LENGTHS]
    return [row + new for row, new in zip(rows, generate(model, rows, max_new_tokens=NEW), strict=True)]


def assert_scored(model: Mixtral, rows: list[list[int]], found: list[Score], atol: float) -> None:
    assert sum(scored.best_T[-NEW:].sum() for scored in found) >= len(rows) * NEW - 1  # bf16 has ties
    for row, first, scored in zip(rows, FIRST, found, strict=True):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(row)] = row
        logits_TV = np.asarray(forward(model, padded))[0, first - 1 : len(row) - 1]
        logps_TV, places = jax.nn.log_softmax(logits_TV), np.arange(len(logits_TV))
        np.testing.assert_allclose(scored.logps_T, logps_TV[places, row[first:]], atol=atol)
        others_TV = np.where(np.arange(97)[None] == np.array(row[first:])[:, None], -np.inf, logits_TV)
        lead_T = logits_TV[places, row[first:]] - others_TV.max(axis=1)
        sure_T = abs(lead_T) > 2 * atol
        np.testing.assert_array_equal(scored.best_T[sure_T], lead_T[sure_T] > 0)


@pytest.mark.parametrize(
    ("name", "dtype", "atol"),
    [("plain", "float32", 1e-5), ("window", "float32", 1e-5), ("window", "bfloat16", 0.03)],
)
def test_rows_are_scored_as_by_the_whole_forward_pass(name: str, dtype: str, atol: float) -> None:
    model = Mixtral(SHAPES[name], ComputeConfig(dtype=dtype), key=jax.random.key(0))
    rows = rows_of(model)
    assert_scored(model, rows, score_long(model, rows, first=FIRST, piece=16), atol)


def test_rows_are_scored_on_a_mesh() -> None:
    model = Mixtral(SHAPES["window"], key=jax.random.key(0))
    rows, mesh = rows_of(model), make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    shardings = jax.tree.leaves(param_shardings(model, mesh))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, model, jax.tree.unflatten(jax.tree.structure(model), shardings))
        found = score_long(placed, rows, first=FIRST, piece=16)
    assert_scored(model, rows, found, 1e-5)


def test_nan_is_told() -> None:
    model = Mixtral(SHAPES["plain"], key=jax.random.key(0))
    model.norm.scale[...] = np.nan
    with pytest.raises(FloatingPointError, match="log-probabilities are NaN") as caught:
        score_long(model, [[1, 2, 3]])
    assert failure_of(caught.value).exit_code == ExitCode.NOT_FINITE
