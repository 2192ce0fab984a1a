"""Where a run stands in its data: through checkpoints, phases, other batches, roll backs, and what was seen of it.

The twin reads the order row by row and keeps a count for each source, as the definition says.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.data.prepare import prepare
from mixtral_jax.train.checkpoints.checkpointer import Found
from mixtral_jax.train.config import read_config
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import Account, begin_at
from mixtral_jax.train.trainer import settle_steps
from tests.tiny import WORDS, write_run_file

PHASES = [
    {"from_step": 0, "weights": {"web": 3, "code": 1}},
    {"from_step": 4, "weights": {"code": 2, "chat": 1}, "learning_rate": {"final_fraction": 0.5}},
    {"from_step": 9, "weights": None},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three sources of a few rows each."""
    place = tmp_path_factory.mktemp("account")
    rng = np.random.default_rng(1)
    for name, count in (("web", 25), ("code", 12), ("chat", 5)):
        lines = [json.dumps({"text": f"{name} {i} " + " ".join(rng.choice(WORDS, 12))}) for i in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return place


def config_of(place, phases=PHASES, names=("web", "code", "chat"), weights=None, **changes):
    sources = [
        {"name": n, "path": str(place / f"{n}.jsonl"), **({"weight": weights[n]} if weights else {})} for n in names
    ]
    data = {"train": sources, "phases": phases, "validation": [], **changes.pop("data", {})}
    return load_config(write_run_file(place, data=data, **{"steps": 12, **changes})).config


def account_of(config, found=None, changed=()):
    """As a start with this configuration has it, and what it says."""
    prepared, said = prepare(config.data, config.seq_len, config.seed, progress=False), []
    start = begin_at(found, prepared, config, changed, said.append)
    seen = {} if found is None else found.dataset["seen"]
    return Account(prepared, start, config.global_batch_size, seen, said.append), said


def saved(account, step):
    """A checkpoint behind a step, as a later start finds it."""
    dataset = json.loads(json.dumps(account.note(step) | {"tokens": 0}))
    return Found(step, Path(), dataset, {"config": {}})


def rows_of(account, steps):
    """(source, row) of every row of these steps, each named by its position in the run."""
    names = list(account.order.rows)
    places = [account.order[r] for step in steps for r in range(account.row(step - 1), account.row(step))]
    return [(names[source], row) for source, row in places]


def test_a_resume_within_and_across_phases_reads_the_same_rows(place):
    config = config_of(place)
    whole, _ = account_of(config)
    expected = rows_of(whole, range(1, 13))
    for stops in ([1], [3], [4], [5], [9], [2, 4, 7, 9, 11]):
        account, rows, done = account_of(config)[0], [], 0
        for stop in [*stops, 12]:
            rows += rows_of(account, range(done + 1, stop + 1))
            account, done = account_of(config, saved(account, stop))[0], stop
        assert rows == expected, stops
        assert account.count(12) == whole.count(12)


def test_the_counts_of_the_sources_are_those_of_their_rows(place):
    """Over three starts with other batches: rows drawn, epochs, tokens and bytes, by a count row by row."""
    drawn, seen = Counter(), Counter()
    found = None
    for stop, batch in ((3, 8), (6, 4), (12, 16)):
        account, _ = account_of(config_of(place, global_batch_size=batch), found)
        first = 0 if found is None else found.step
        for name, row in rows_of(account, range(first + 1, stop + 1)):
            drawn[name] += 1
            seen[name] += np.array(sizes(account, name)[row], np.int64)
        metrics = account.metrics(stop)
        for source in account._prepared.train:
            name = source.name
            assert metrics[f"data/{name}/rows"] == drawn[name]
            assert metrics[f"data/{name}/epoch"] == drawn[name] / source.rows
            tokens = seen[name].tolist() if drawn[name] else [0, 0]
            assert [metrics[f"data/{name}/tokens"], metrics[f"data/{name}/bytes"]] == tokens
        found = saved(account, stop)
    assert account.last["chat"]["rows"] > 0 and metrics["data/phase"] == 3


def sizes(account, name):
    return next(source for source in account._prepared.train if source.name == name).sizes()


def test_a_roll_back_over_the_border_of_a_phase_passes_rows_over_and_does_not_see_them(place):
    """Back from step 6, of the second phase, to 3, of the first: with the rows behind those of step 6."""
    config = config_of(place)
    account, _ = account_of(config)
    earlier, found = saved(account, 2), saved(account, 3)
    account.count(5)
    row = account.row(6)
    back = account.back_to(found, row)
    assert back.start.row == row and back.row(3) == row and back.row(4) == row + 8
    mixtures = back._prepared.mixtures
    assert [leg.fingerprint for leg in back.order.legs] == [m.fingerprint for m in mixtures]
    assert [leg.first_row for leg in back.order.legs] == [row, row + 8, row + 6 * 8]
    assert back.order.drawn(row) == account.order.drawn(row)
    read, passed = rows_of(account, range(1, 4)) + rows_of(back, range(4, 9)), rows_of(account, range(4, 7))
    assert not {*passed} & {*rows_of(back, [4])}
    killed = saved(back, 5)
    metrics = back.metrics(8)
    for name in ("web", "code", "chat"):
        assert metrics[f"data/{name}/rows"] == sum(n == name for n, _ in read + passed)
        assert metrics[f"data/{name}/tokens"] == sum(int(sizes(back, name)[row][0]) for n, row in read if n == name)
    epoch = config_of(place, phases=None, steps=0, data={"epochs": 1})
    assert settle_steps(epoch, found=killed).steps == settle_steps(epoch).steps  # 15.4: whether it is killed or not
    twice = saved(back.back_to(killed, back.row(7)), 6)
    assert twice.dataset["lost"] == 24 + 16 and settle_steps(epoch, found=twice).steps == settle_steps(epoch).steps
    older = back.back_to(earlier, back.row(7))  # further back than what it began with
    assert older.start.lost == back.row(7) - 2 * 8
    again = account_of(config, killed)[0]  # behind the next checkpoint
    assert rows_of(again, range(6, 9)) == rows_of(back, range(6, 9)) and again.metrics(8) == metrics


def test_another_mixture_goes_on_where_each_source_stands(place):
    """Case Z: after data.restart with other weights the first rows had all been read before."""
    before = config_of(place, phases=None, weights={"web": 1, "code": 1, "chat": 1})
    account, _ = account_of(before)
    found, read = saved(account, 2), rows_of(account, range(1, 3))
    other = {"phases": None, "weights": {"web": 3, "code": 1, "chat": 1}}
    with pytest.raises(UserError, match=r"data now have .*Set data\.restart=true to go on"):
        account_of(config_of(place, **other), found)
    with pytest.raises(UserError, match=r"made with data\.x: 1 -> 2, which now is another order.*or set it back"):
        account_of(config_of(place, **other), found, ["data.x: 1 -> 2"])
    restarted, said = account_of(config_of(place, **other, data={"restart": True}), found)
    assert said == ["the data are read in another mixture from row 16 on: each source goes on where it stood"]
    following = rows_of(restarted, range(3, 5))
    assert restarted.row(2) == 16
    for name in ("web", "code"):
        ours = [row for n, row in read + following if n == name]
        assert len(ours) == len({*ours}), name  # nothing comes again before all came
    assert restarted.note(2)["drawn"] == found.dataset["drawn"]
    trunk = found._replace(trunk="runs/trunk")  # resume_from asks for no permission
    assert rows_of(account_of(config_of(place, **other), trunk)[0], range(3, 5)) == following
    once_more = saved(restarted, 4)  # data.restart, left in the file, restarts nothing
    assert account_of(config_of(place, **other, data={"restart": True}), once_more)[1] == []


def test_a_source_that_is_left_out_comes_back_where_it_stood_and_one_of_other_rows_at_its_first(place, tmp_path):
    account, _ = account_of(config_of(place))
    found, drawn = saved(account, 3), account.order.drawn(24)
    restart = {"data": {"restart": True}}
    without, _ = account_of(config_of(place, phases=None, names=["code", "chat"], **restart), found)
    found = saved(without, 4)
    back, _ = account_of(config_of(place, phases=None, **restart), found)
    assert back.start.drawn["web"] == drawn["web"] and back.order.drawn(back.start.row)["web"] == drawn["web"]
    assert back.last["web"]["tokens"] == account.last["web"]["tokens"] > 0
    for name in ("web", "chat"):
        (tmp_path / f"{name}.jsonl").write_text((place / f"{name}.jsonl").read_text())
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": "other words " * 30}))
    other, said = account_of(config_of(tmp_path, phases=None, **restart), found)
    assert "source code has other rows than those that were read of it: it begins at its first" in said
    assert other.order.drawn(other.start.row)["code"] == 0 < other.order.drawn(other.start.row)["web"]


def test_a_source_under_another_name_is_said_to_begin_again(place):
    """Where only a later phase reads it nothing is refused."""
    read, only = {"web": 1}, {"from_step": 2, "weights": {"code": 1}}
    found = saved(account_of(config_of(place, [{"from_step": 0, "weights": read}, only], ["web", "code"]))[0], 4)
    (place / "www.jsonl").write_text((place / "web.jsonl").read_text())
    phases = [{"from_step": 0}, only, {"from_step": 6}]
    account, said = account_of(config_of(place, phases, ["www", "code"]), found)
    assert account.start.row == 32 and len(said) == 1
    assert said[0].startswith("source www has the rows of source web, of which 16 were read, and begins at its first")
    found = saved(account, 5)
    assert account_of(config_of(place, phases, ["www", "code"]), found)[1] == said
    assert account_of(config_of(place, phases, ["web", "code"]), found)[1] == []


def test_later_phases_may_change_and_the_present_one_may_not(place):
    account, _ = account_of(config_of(place))
    border, found = saved(account, 4), saved(account, 5)
    later = [*PHASES[:2], {"from_step": 10, "weights": {"web": 1}}]
    ours, said = account_of(config_of(place, phases=later), found)
    assert said == [] and rows_of(ours, range(6, 10)) == rows_of(account, range(6, 10))
    present = [PHASES[0], {"from_step": 4, "weights": {"code": 1, "chat": 1}}, PHASES[2]]
    with pytest.raises(UserError, match=r"Set data\.restart=true"):
        account_of(config_of(place, phases=present), found)
    assert account_of(config_of(place, phases=present), border)[0].start.row == 32  # nothing of it was read yet


def test_epochs_count_rows_whatever_the_batch(place):
    """15.4: with the batch changed from 4 to 8 midway the run ended after 176 of 275 rows."""
    config = config_of(place, phases=None, steps=0, data={"epochs": 1}, global_batch_size=4)
    first = settle_steps(config)
    account, _ = account_of(first)
    total = sum(account.order.rows.values())
    found = saved(account, 5)
    assert first.steps == -(-total // 4)
    for batch in (8, 3):
        other = settle_steps(config.model_copy(update={"global_batch_size": batch}), found=found)
        assert other.steps == 5 + -(-(total - 20) // batch)
        resumed, _ = account_of(other, found)
        rows = rows_of(account, range(1, 6)) + rows_of(resumed, range(6, other.steps + 1))
        assert len({*rows[:total]}) == total and len(rows) - total < batch
    done = saved(account, first.steps)
    assert settle_steps(config, found=done).steps == first.steps  # nothing left to do, with any batch
    assert settle_steps(config.model_copy(update={"global_batch_size": 2}), found=done).steps == first.steps
    more = read_config(config, data={"epochs": 1.5})
    assert settle_steps(more, found=done).steps == first.steps + -(-(1.5 * total - 4 * first.steps) // 4)
    half = read_config(config, data={"epochs": 0.5})
    assert settle_steps(half, found=found).steps == 5 + max(0, -(-(0.5 * total - 20) // 4))
    assert settle_steps(half, found=done).steps == first.steps


OLD = json.loads(Path(__file__).with_name("checkpoint_of_0_1_0.json").read_text())


def test_a_checkpoint_of_0_1_0_is_refused_or_begins_at_row_0(place):
    found = Found(4, Path(), OLD["dataset"], OLD["meta"])
    for changes in ({}, {"resume_from": "runs/old"}):
        with pytest.raises(UserError) as error:
            account_of(config_of(place, **changes), found._replace(trunk=changes.get("resume_from", "")))
        said = str(error.value)
        assert "version 0.1.0" in said and "Set data.restart=true to begin at the first row" in said
        assert "\n" not in said
    config = config_of(place, data={"restart": True})
    prepared, said = prepare(config.data, config.seq_len, config.seed, progress=False), []
    start = begin_at(found, prepared, config, [], said.append)
    assert (start.step, start.row, start.drawn) == (4, 0, {}) and "every source begins at row 0" in said[0]
    account = Account(prepared, start, 8, {}, said.append)
    assert rows_of(account, [5]) == [
        (["web", "code", "chat"][s], r) for s, r in map(account.order.__getitem__, range(8))
    ]
    assert account.note(5)["order"] == 2 and account.note(5)["next_row"] == 8
