"""The global order of rows: a pure function of the row number, each row once an epoch, shares as asked for."""

import numpy as np
import pytest

from mixtral_jax.data.rows.order import GlobalOrder, permute, shares


@pytest.mark.parametrize("n", [1, 2, 3, 17, 256, 1000])
def test_permute_is_a_permutation(n: int) -> None:
    for seed in (0, 1, 1 << 63):
        assert sorted(permute(k, n, seed) for k in range(n)) == list(range(n))


def test_permute_mixes() -> None:
    n = 4096
    a = np.array([permute(k, n, 1) for k in range(n)])
    b = np.array([permute(k, n, 2) for k in range(n)])
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.06  # 4 standard deviations of independent numbers
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    assert np.count_nonzero(np.diff(a) == 1) < 10
    assert np.count_nonzero(a == b) < 10


def test_by_size_every_row_comes_once_an_epoch_in_a_new_order() -> None:
    order = GlobalOrder([7, 1, 30], None, seed=3)
    everything = [(s, i) for s, n in enumerate([7, 1, 30]) for i in range(n)]
    epochs = [[order[r] for r in range(38 * e, 38 * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order[r] for r in range(38)] == epochs[0]


def test_shares_are_kept_in_every_stretch_and_sources_repeat_only_when_exhausted() -> None:
    parts = [0.6, 0.3, 0.1]
    order = GlobalOrder([50, 40, 1000], parts, seed=5)
    places = [order[r] for r in range(2000)]
    for start in range(0, 2000, 100):
        counts = np.bincount([s for s, _ in places[start : start + 100]], minlength=3)
        assert np.abs(counts - 100 * np.array(parts)).max() <= 2
    for source, n in ((0, 50), (1, 40)):
        rows = [i for s, i in places if s == source]
        for epoch in range(len(rows) // n):
            assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert rows[:n] != rows[n : 2 * n]


def test_a_tiny_share_is_still_drawn_and_far_rows_are_cheap() -> None:
    order = GlobalOrder([5, 5], [1 - 1e-9, 1e-9], seed=0)
    assert np.bincount([order[r][0] for r in range(1 << 16)]).tolist() == [65535, 1]
    assert order[10**15][1] < 5


def test_the_seed_changes_the_order() -> None:
    first, second = ([GlobalOrder([100], None, seed)[r] for r in range(100)] for seed in (0, 1))
    assert first != second


def test_shares_follow_their_formulas() -> None:
    rows = [800, 100, 100]
    assert shares(rows, [None, None, None], None) is None
    assert shares(rows, [2.0, 1.0, 1.0], None) == [0.5, 0.25, 0.25]
    np.testing.assert_allclose(shares(rows, [None] * 3, 1.0), [0.8, 0.1, 0.1])
    roots = np.array([800, 100, 400]) ** 0.5
    np.testing.assert_allclose(shares(rows, [None, None, 4.0], 2.0), roots / roots.sum())


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        GlobalOrder([3, 0], None, seed=0)
