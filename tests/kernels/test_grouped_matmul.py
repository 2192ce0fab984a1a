"""Every grouped-matmul back-end that runs here against a loop over rows, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.grouped import grouped_matmul
from tests.oracles.moe import grouped_matmul as oracle

BACKENDS = ("dense", "blocked", "ragged_dot")
D, F = 12, 20
SIZES = {
    300: (  # no multiple of any block
        (0, 130, 0, 7, 128, 0),  # empty groups, one block exactly, one block and a bit, 35 rows behind the groups
        (300, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 300),
        (50, 50, 50, 50, 50, 50),
        (0, 0, 0, 0, 0, 0),
        (1, 0, 297, 0, 1, 1),
    ),
    5: ((2, 0, 1, 0, 1, 0), (5, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1)),  # fewer rows than a block
    128: ((128, 0, 0, 0, 0, 0), (1, 127, 0, 0, 0, 0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """(backend, rows, dtype) -> value and gradients, jitted once."""

    def run(backend, x, w, sizes, g):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        return y, *pull(g)

    return jax.jit(run, static_argnums=0)


def draw(rows):
    rng = np.random.default_rng(rows)
    return tuple(rng.normal(0, 1, s).astype(np.float32) for s in ((rows, D), (6, D, F), (rows, F)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "sizes"), [(r, s) for r, group in SIZES.items() for s in group])
def test_value_and_gradients(compiled, backend, rows, sizes):
    x, w, g = draw(rows)
    used = sum(sizes)
    inside = (np.arange(rows) < used)[:, None]
    want_y, want_dx, want_dw = oracle(x, w, sizes, g)
    # What lies behind the groups is garbage and must not reach a weight's gradient; nor does dx leak from there.
    y, dx, dw = compiled(backend, np.where(inside, x, 1e6), w, np.array(sizes, np.int32), np.where(inside, g, 0))
    np.testing.assert_allclose(y[:used], want_y[:used], atol=5e-6)
    np.testing.assert_allclose(dx, want_dx, atol=5e-6)
    np.testing.assert_allclose(dw, want_dw, atol=5e-6 * np.sqrt(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_the_groups_stays_there(compiled, backend):
    x, w, g = draw(300)
    sizes = SIZES[300][0]
    inside = (np.arange(300) < sum(sizes))[:, None]
    y, dx, dw = compiled(
        backend, np.where(inside, x, np.nan), w, np.array(sizes, np.int32), np.where(inside, g, np.nan)
    )
    want_y, want_dx, want_dw = oracle(x, w, sizes, g)
    np.testing.assert_allclose(y[: sum(sizes)], want_y[: sum(sizes)], atol=5e-6)
    np.testing.assert_allclose(dx, want_dx, atol=5e-6)
    np.testing.assert_allclose(dw, want_dw, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_accumulated_in_fp32(compiled, backend):
    """One rounding, at the end: 512 products that a bf16 sum would lose."""
    x, w, g = (jnp.asarray(a, jnp.bfloat16) for a in (np.ones((300, D)), np.ones((6, D, F)), np.ones((300, F))))
    sizes = np.array([290, 0, 0, 0, 10, 0], np.int32)
    y, dx, dw = compiled(backend, x, w, sizes, g)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    assert float(y[0, 0]) == D and float(dx[0, 0]) == F
    assert float(dw[0, 0, 0]) == float(jnp.bfloat16(290)) and float(dw[4, 0, 0]) == 10 and float(dw[1, 0, 0]) == 0
