"""The global order of rows: exact shares, bounded deviation, no phase, and positions that outlive every change."""

import copy
import json
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from mixtral_jax.data.loader import shard_rows
from mixtral_jax.data.rows.order import GlobalOrder, Leg, permute, shares
from mixtral_jax.data.rows.position import Position, at_step
from tests.oracles import order as slow
from tests.unprepared import prepared

MIXES = [
    [1, 1], [3, 1], [15, 1], [63, 1], [1, 1, 1], [1] * 4, [1] * 8, [5, 3, 2, 1, 1], [0.6, 0.3, 0.1],
    [1, 1e-4], [1, 1e-6], [1, *[1e-4] * 50], [1.618**i for i in range(20)], [100, 30, 10, 3, 1, 0.3, 0.1, 0.01],
]  # fmt: skip


def mixed(weights, rows=1000, seed=0, first_row=0):
    names = [f"s{i}" for i in range(len(weights))]
    parts = shares(dict.fromkeys(names, rows), dict(zip(names, weights, strict=True)), None)
    return GlobalOrder(seed, dict.fromkeys(names, rows), [Leg(first_row, {}, parts)])


def by_size(rows, seed=0):
    rows = {f"s{i}": n for i, n in enumerate(rows)}
    return GlobalOrder(seed, rows, [Leg(0, {}, shares(rows, None, None))])


@pytest.mark.parametrize("n", [1, 2, 3, 17, 63, 64, 65, 256, 1000])
def test_permute_is_a_permutation(n):
    for seed in (0, 1, 1 << 63):
        assert sorted(permute(k, n, seed) for k in range(n)) == list(range(n))


def test_permute_mixes():
    n = 4096
    a = np.array([permute(k, n, 1) for k in range(n)])
    b = np.array([permute(k, n, 2) for k in range(n)])
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.06  # 4 standard deviations of independent numbers
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    assert np.count_nonzero(np.diff(a) == 1) < 10
    assert np.count_nonzero(a == b) < 10


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_few_rows_are_equally_likely(n):
    """Chi-square over the n! orders; the limit is passed once in 10^5 by chance."""
    draws = 400 * math.factorial(n)
    seen = Counter(tuple(permute(k, n, seed << 40) for k in range(n)) for seed in range(draws))
    excess = sum((count - 400) ** 2 / 400 for count in seen.values())
    assert len(seen) == math.factorial(n) and excess < {2: 20, 3: 31, 4: 67}[n]


@pytest.mark.parametrize("n", [9, 65, 100])
def test_a_row_may_come_at_any_place(n):
    draws = 200 * n
    for k in (0, n - 1):
        seen = np.bincount([permute(k, n, slow.bits(3, seed)) for seed in range(draws)], minlength=n)
        assert np.abs(seen - 200).max() < 5 * math.sqrt(200)


def test_by_size_every_row_comes_once_an_epoch_in_a_new_order():
    order = by_size([7, 1, 30], seed=3)
    everything = [(s, i) for s, n in enumerate([7, 1, 30]) for i in range(n)]
    epochs = [[order[r] for r in range(38 * e, 38 * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order[r] for r in range(38)] == epochs[0]
    assert order.drawn(38 * 10**12) == {"s0": 7 * 10**12, "s1": 10**12, "s2": 30 * 10**12}


def test_sources_repeat_only_when_exhausted():
    order = mixed([0.6, 0.3, 0.1], rows=50, seed=5)
    places = [order[r] for r in range(2000)]
    for source in range(3):
        rows = [i for s, i in places if s == source]
        for epoch in range(len(rows) // 50):
            assert sorted(rows[epoch * 50 : (epoch + 1) * 50]) == list(range(50))
        assert rows[:50] != rows[50:100]


@pytest.mark.parametrize("weights", MIXES, ids=str)
def test_no_prefix_deviates_by_more_than_the_stated_number(weights):
    """docs/data.md: less than 7 rows a source, less than 2 of two sources, and what is drawn is what was counted."""
    order, count = mixed(weights), np.zeros(len(weights))
    exact = np.array(weights, float) / sum(weights)
    bound = 2 if len(weights) == 2 else 7
    for r in range(4000):
        assert np.abs(count - r * exact).max() < bound
        count[order[r][0]] += 1
    assert list(order.drawn(4000).values()) == count.tolist()
    for far in (10**6 + 7, 10**12 + 1, 10**15 + 3):
        drawn = order.drawn(far)
        assert sum(drawn.values()) == far
        for name, share in order.legs[0].shares.items():
            assert abs(drawn[name] - far * share) < bound
        after = order.drawn(far + 1)
        assert order[far][0] == next(i for i, name in enumerate(drawn) if after[name] > drawn[name])


@pytest.mark.parametrize("weights", MIXES[:8], ids=str)
def test_every_device_reads_every_source_in_proportion(weights):
    """One row a device and step: what a device reads is a fair sample, within five standard deviations of one."""
    order, n = mixed(weights, first_row=3), 24_000
    sources = np.array([order[3 + r][0] for r in range(n)])
    exact = np.array(weights) / sum(weights)
    for devices in (2, 3, 4, 8, 16, 24, 64, 96):
        for device in range(devices):
            own = np.bincount(sources[device::devices], minlength=len(weights))
            steps = own.sum()
            assert np.all(np.abs(own - steps * exact) < 5 * np.sqrt(steps * exact * (1 - exact)) + 1)


def test_many_rows_at_once_are_those_rows():
    """Across epochs of each source, and across legs."""
    order = mixed([5, 3, 1], rows=70)
    shares_of = {"s0": Fraction(1, 2), "s2": Fraction(1, 2)}
    order = GlobalOrder(0, {"s0": 70, "s1": 30, "s2": 5000}, [*order.legs, Leg(1000, order.drawn(1000), shares_of)])
    for first, last in ((0, 0), (3, 5), (0, 400), (900, 2100)):
        one_by_one = {name: [] for name in order.rows}
        for s, i in (order[r] for r in range(first, last)):
            one_by_one[f"s{s}"].append(i)
        assert {name: rows.tolist() for name, rows in order.taken(first, last).items()} == one_by_one


def test_nothing_depends_on_how_sources_are_listed():
    parts = {"a": Fraction(1, 4), "b": Fraction(1, 2), "c": Fraction(1, 4)}
    rows = {"a": 10, "b": 20, "c": 30}
    names = []
    for listed in ("abc", "cba"):
        order = GlobalOrder(1, {n: rows[n] for n in listed}, [Leg(0, {}, {n: parts[n] for n in listed})])
        names.append([(listed[s], i) for s, i in (order[r] for r in range(300))])
    assert names[0] == names[1]
    without = GlobalOrder(1, rows, [Leg(0, {}, {"a": Fraction(1)})])
    assert [order[r][1] for r in range(30)] != [without[r][1] for r in range(30)]
    assert [i for n, i in names[0] if n == "a"][:30] == [without[r][1] for r in range(30)]


def test_the_seed_changes_the_order():
    first, second = (by_size([100], seed) for seed in (0, 1))
    assert [first[r] for r in range(100)] != [second[r] for r in range(100)]
    one, other = (mixed([1, 1], seed=seed) for seed in (0, 1))
    assert [one[r][0] for r in range(64)] != [other[r][0] for r in range(64)]


def test_shares_follow_their_formulas():
    rows = {"a": 800, "b": 100, "c": 100}
    assert shares(rows, None, None) == {"a": Fraction(4, 5), "b": Fraction(1, 10), "c": Fraction(1, 10)}
    assert shares(rows, {"a": 2.0, "c": 1e-9}, None) == {
        "a": 1 - (rest := Fraction("1e-9") / (2 + Fraction("1e-9"))),
        "c": rest,
    }
    assert shares(rows, None, 1.0) == shares(rows, None, None)
    roots = np.array([800, 100, 400]) ** 0.5
    found = shares(rows, {"a": 1.0, "b": 1.0, "c": 4.0}, 2.0)
    np.testing.assert_allclose([float(x) for x in found.values()], roots / roots.sum())
    with pytest.raises(ValueError, match=r"data\.temperature, or a phase.s, 0\.001 is too low"):
        shares(rows, None, 0.001)


def test_shares_are_those_of_the_decimal_numbers_in_the_file():
    """Binary 0.3 is not three tenths: of 10 n rows 3 n are exactly the source's."""
    order = mixed([0.6, 0.3, 0.1])
    assert list(order.legs[0].shares.values()) == [Fraction(n, 10) for n in (6, 3, 1)]
    assert all(list(order.drawn(10 * n).values()) == [6 * n, 3 * n, n] for n in (*range(300), 10**15 + 1))


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        GlobalOrder(0, {"a": 3, "b": 0}, [Leg(0, {}, {"a": Fraction(1)})])


# --- positions: through phases, kills, rollbacks, other batches, other sources ---


class Life:
    """A run that is killed, rolled back, and gone on with changed, beside its slow twin."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.seed, self.batch, self.step, self.rows = seed, 8, 0, 0
        self.sizes, self.contents, self.away, self.phases = {}, {}, {}, []
        for _ in range(self.random.choice([1, 2, 3, 5, 20])):
            self.add()
        self.plan()
        self.twin, self.position = slow.Reader(seed), Position()
        self.saved = (0, "", copy.deepcopy(self.twin))

    def add(self):
        """A source that is new, or was here before, perhaps with other rows."""
        name = self.random.choice([*self.away] * 9 + [f"s{i}" for i in range(24)])
        if name not in self.sizes and len(self.sizes) < 20:
            known = self.away.pop(name, None)
            size, content = known or (int(10 ** self.random.uniform(0, 6)), f"{name} at {self.rows}")
            self.sizes[name], self.contents[name] = size, content

    def plan(self):
        """Other phases: some are over, one is underway, some come."""
        starts = sorted(
            {0, *(max(0, self.step + self.random.randint(-9, 40)) for _ in range(self.random.choice([0, 1, 3])))}
        )
        self.phases = []
        for start in starts:
            names = self.random.sample(list(self.sizes), self.random.randint(1, len(self.sizes)))
            weights = {n: self.random.choice([1.0, 2.0, 10 ** self.random.uniform(-9, 3)]) for n in names}
            by_size, temperature = self.random.random() < 0.3, self.random.choice([None, None, 0.7, 3.0])
            self.phases.append(
                {"from_step": start, "weights": None if by_size else weights, "temperature": temperature}
            )
        self.phases.append({"from_step": starts[-1] + 10**6})  # so that every source is read in one

    def change(self):
        """What a person may change between two starts, most often nothing."""
        what = self.random.choice(["nothing", "nothing", "batch", "phases", "add", "remove", "content", "list"])
        if what == "batch":
            self.batch = self.random.choice([1, 4, 6, 8, 64])
        elif what == "list":
            self.sizes = dict(self.random.sample(list(self.sizes.items()), len(self.sizes)))
        elif what != "nothing":
            if what == "add":
                self.add()
            elif what == "remove" and len(self.sizes) > 1:
                name = self.random.choice(list(self.sizes))
                self.away[name] = self.sizes.pop(name), self.contents.pop(name)
            elif what == "content":
                self.contents[self.random.choice(list(self.sizes))] = f"new at {self.rows}"
            self.plan()

    def start(self):
        """Reads some steps, from the position on, as several processes do; saves sometimes; and is ended somehow."""
        found = prepared(self.seed, self.sizes, self.contents, self.phases)
        order = found.order_from(self.position, self.batch)
        now = at_step(found.mixtures, self.step)
        before = copy.deepcopy(self.twin.mixture)
        self.twin.mix(now.shares, self.sizes, self.contents)
        if before is not None and before == self.twin.mixture:
            assert self.position.goes_on(now, found.sources)
        elif before is not None and self.step != now.from_step:
            assert not self.position.goes_on(now, found.sources)
        hosts = self.random.choice([n for n in (1, 2, 4) if self.batch % n == 0])
        names = list(self.sizes)
        borders = {mixture.from_step for mixture in found.mixtures}
        for _ in range(int(10 ** self.random.uniform(0, 1.7))):
            self.twin.mix(at_step(found.mixtures, self.step).shares, self.sizes, self.contents)
            places = np.concatenate([shard_rows(self.batch, self.batch, (i, hosts)) for i in range(hosts)], axis=1)
            first = self.position.row + (self.step - self.position.step) * self.batch
            read = {int(p): order[first + int(p)] for p in places.ravel()}
            for place in range(self.batch):
                name, epoch, k = self.twin.next()
                source, row = read[place]
                key = slow.bits(slow.key(self.seed, name), epoch)
                assert (names[source], row) == (name, permute(k, self.sizes[name], key)), (self.rows, place)
            self.step, self.rows = self.step + 1, self.rows + self.batch
            if self.random.random() < 0.1 or self.step in borders:
                self.save(order, found)
                if self.random.random() < 0.2:
                    break
        self.end(order, found)

    def save(self, order, found):
        row = self.twin.row
        note = self.position.at(self.step, row, order, found.sources).note()
        assert {n: note["drawn"][n] for n in self.sizes} == {n: self.twin.read[n] for n in self.sizes}
        self.saved = (self.step, json.dumps(note), copy.deepcopy(self.twin))

    def end(self, order, found):
        how = self.random.choice(["stopped", "killed", "rolled back"])
        if how == "stopped":
            self.save(order, found)
        if how == "rolled back":  # the rows go on, the steps do not
            step = self.saved[0]
            self.position = self.position.at(step, self.twin.row, order, found.sources)
            self.step = step
            return
        self.step, note, self.twin = self.saved[0], self.saved[1], copy.deepcopy(self.saved[2])
        self.position = Position.read(self.step, json.loads(note)) if note else Position()
        self.change()


@pytest.mark.parametrize("rows", [40_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_rows_are_those_of_a_twin_that_counts_what_it_read(rows):
    seed = read = 0
    while read < rows:
        life, seed = Life(seed), seed + 1
        for _ in range(40):
            life.start()
        read += life.rows


SIZES, CONTENTS = {"web": 1000, "code": 1000}, {"web": "w", "code": "c"}
EVEN, MORE_WEB = {"web": 1.0, "code": 1.0}, {"web": 3.0, "code": 1.0}


def phases(*pairs):
    return [{"from_step": step, "weights": weights} for step, weights in pairs]


def saved(found, steps, batch=8, position=None):
    """The position of a checkpoint behind so many more steps, and the rows read till then."""
    position = position or Position()
    order, row = found.order_from(position, batch), position.row + steps * batch
    at = position.at(position.step + steps, row, order, found.sources)
    return Position.read(at.step, json.loads(json.dumps(at.note()))), [order[r] for r in range(position.row, row)]


def test_another_mixture_goes_on_where_each_source_stood():
    """shared/cases/jobs/expZ: with data.restart the first 20,000 rows came again."""
    first, second = (prepared(0, SIZES, CONTENTS, phases((0, weights))) for weights in (EVEN, MORE_WEB))
    position, before = saved(first, 100)
    assert position.goes_on(first.mixtures[0], first.sources)
    assert not position.goes_on(second.mixtures[0], second.sources)
    _, after = saved(second, 50, position=position)
    assert len({*before, *after}) == 1200


def test_a_batch_of_another_size_moves_no_row():
    found = prepared(0, SIZES, CONTENTS, [{"from_step": 0}])
    position, before = saved(found, 70, batch=4)
    position, after = saved(found, 215, batch=8, position=position)
    assert len({*before, *after}) == 2000 == position.row


def test_a_phase_with_the_same_mixture_begins_no_leg():
    """By size an epoch is a whole: no border of a step falls into it."""
    one, two = (
        prepared(0, {"a": 7, "b": 5}, {"a": "x", "b": "y"}, p)
        for p in ([{"from_step": 0}], [{"from_step": 0}, {"from_step": 5}])
    )
    orders = [found.order_from(Position(), 1) for found in (one, two)]
    assert [orders[0][r] for r in range(60)] == [orders[1][r] for r in range(60)]


def test_a_phase_that_was_to_begin_at_a_checkpoint_may_be_another_or_begin_later():
    planned = prepared(0, SIZES, CONTENTS, phases((0, EVEN), (10, MORE_WEB)))
    other = prepared(0, SIZES, CONTENTS, phases((0, EVEN), (10, {"web": 1.0, "code": 9.0})))
    later = prepared(0, SIZES, CONTENTS, phases((0, EVEN), (20, MORE_WEB)))
    position, _ = saved(planned, 10)
    for found in (planned, other, later):
        assert position.goes_on(at_step(found.mixtures, 10), found.sources)
    whole = later.order_from(Position(), 8)
    resumed = later.order_from(position, 8)
    assert [resumed[r] for r in range(80, 400)] == [whole[r] for r in range(80, 400)]
    position, _ = saved(planned, 11)
    assert not position.goes_on(at_step(other.mixtures, 11), other.sources)


def test_rows_that_are_others_now_are_named_and_begin_at_the_first():
    before = prepared(0, SIZES, CONTENTS, phases((0, EVEN), (10, EVEN | {"web": 2.0})))
    changed = prepared(0, SIZES, CONTENTS | {"code": "other"}, phases((0, EVEN), (10, EVEN | {"web": 2.0})))
    position, _ = saved(before, 10)
    assert position.others(changed.sources) == ["code"] and position.others(before.sources) == []
    assert not position.goes_on(at_step(changed.mixtures, 10), changed.sources)
    assert changed.order_from(position, 8).drawn(80) == {"web": 40, "code": 0}


def test_a_source_that_was_away_goes_on_where_it_stood():
    """Also within the leg in which it left, and which does not read it."""
    alone = prepared(0, {"web": 1000}, {"web": "w"}, [{"from_step": 0}, {"from_step": 10, "weights": {"web": 1.0}}])
    both = prepared(0, SIZES, CONTENTS, phases((0, EVEN), (10, {"web": 1.0}), (40, EVEN)))
    position, _ = saved(both, 20)
    position, _ = saved(alone, 5, position=position)
    assert both.order_from(position, 8).drawn(25 * 8) == {"web": 160, "code": 40}


def test_a_checkpoint_of_another_order_has_no_position():
    assert Position.read(5, {"next_row": 40, "fingerprint": "f", "tokens": 3}) is None
