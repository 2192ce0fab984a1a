"""Searching: what is tried, in which order it is ranked, and what a run that fits nowhere is told."""

import pytest

from mixtral_jax.config import MixtralConfig
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan import best_plans, plan, run
from mixtral_jax.train.plan.chips import larger, parse_topology
from mixtral_jax.train.plan.closed_form import Roofline
from mixtral_jax.train.plan.placement import Memory
from mixtral_jax.train.plan.search import candidates, describe, likely_rate, ranked, table, what_fits
from tests.tiny import write_run_file

BIG = MixtralConfig.preset("mixtral-8x7b").model_dump()
RUN = {"model": BIG, "seq_len": 4096, "compute": {"remat": "full", "dtype": "bfloat16"}}


@pytest.fixture(autouse=True)
def by_closed_form(monkeypatch):
    monkeypatch.setattr("mixtral_jax.train.plan.compile.has_libtpu", lambda: False)
    monkeypatch.setattr("mixtral_jax.train.plan.gpus.has_cuda_plugin", lambda: False)


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        return load_config(write_run_file(tmp_path, **RUN | changes)).config

    return make


@pytest.fixture
def report(make_config):
    """A closed-form report, whose roofline and memory the tests replace."""
    config = make_config(global_batch_size=64, mesh={"data": 1, "fsdp": 8, "expert": 8})
    return plan(config, topology="h100-64")


def too_large(report):
    """By 1 GB."""
    return report._replace(memory=report.memory._replace(limit=report.memory.peak - 1e9))


def test_what_fits_comes_first_then_the_fastest_with_half_of_the_traffic_hidden(report):
    def made(name, compute, network, too_much=0.0):
        limits = Roofline(compute, 0.1, network, "compute", 0.5, 0.5, 0.4)
        memory = Memory(1, 1, 1, 0, code=0, peak=4 + too_much, limit=4)
        config = report.config.model_copy(update={"run_name": name})
        return report._replace(config=config, roofline=limits, memory=memory)

    # seconds of a step: all hidden, none hidden, between: a 4, 7, 5.5; b 5, 5.2, 5.1; c 1, 1, 1 but too large
    runs = [made("a", 4.0, 3.0), made("b", 5.0, 0.2), made("c", 1.0, 0.0, too_much=1e9)]
    assert [r.config.run_name for r in ranked(runs)] == ["b", "a", "c"]
    assert likely_rate(runs[0]) == pytest.approx(64 * 4096 / 64 / 5.5)
    lines = table(ranked(runs))
    assert len(lines) == 4 and lines[0].split()[0] == "mesh"
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    assert all("fsdp 8 x expert 8" in line for line in lines[1:])
    assert "1.00 GB too much" in lines[3] and "too much" not in lines[1]


def test_candidates_fit_and_are_in_order_of_speed(make_config):
    config, there = make_config(global_batch_size=1024), parse_topology("v5p-64")
    found = candidates(config, there)
    meshes = {(c.config.mesh.fsdp, c.config.mesh.expert, c.config.mesh.context) for c in found}
    assert {(32, 1, 1), (4, 8, 1), (16, 1, 2)} <= meshes
    assert all(fsdp * expert * context == 32 for fsdp, expert, context in meshes)
    assert all(c.config.global_batch_size == 1024 and c.memory.peak <= there.chip.memory for c in found)
    rates = [likely_rate(c) for c in found]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_a_search_compiles_the_first_and_ranks_them(make_config, capsys):
    config = make_config(global_batch_size=1024)
    assert run(config, topology="v5p-64", search=True) == 0
    reports = best_plans(config, "v5p-64")
    assert len(reports) > 1
    rates = [likely_rate(r) for r in reports]
    assert rates == sorted(rates, reverse=True)
    printed = capsys.readouterr().out
    assert "\n".join(table(reports)) in printed


def test_larger_machines():
    assert [t.name for t in larger(parse_topology("v5p-64"))] == ["v5p-128", "v5p-256", "v5p-512", "v5p-1024"]
    assert [t.name for t in larger(parse_topology("2xv5e-128"))] == ["2xv5e-256"]
    assert larger(parse_topology("h100-512"))[0].name == "h100-1024"


def test_a_run_that_cannot_fit_is_told_what_does(make_config):
    config = make_config(global_batch_size=64)
    assert what_fits(config, parse_topology("v5p-64")).startswith("this would, by closed form: fsdp")
    # 16 bytes a parameter: 93 GB on each of v5p-16's 8 chips of 103 GB before anything is gathered, 47 GB on v5p-32's
    assert what_fits(config, parse_topology("v5p-8")).startswith("nothing fits v5p-8; on v5p-32 this would")
    huge = make_config(global_batch_size=64, model={**BIG, "num_hidden_layers": 3200})
    assert "take chips with more memory" in what_fits(huge, parse_topology("v5e-256"))
    too_small = make_config(global_batch_size=64, mesh={"data": 1, "fsdp": 8})
    with pytest.raises(UserError, match=r"does not fit h100-8: .*; nothing fits h100-8; on h100-16 this"):
        run(too_small, topology="h100-8")
    with pytest.raises(UserError, match="nothing fits v5e-4; on v5e-"):
        best_plans(config, "v5e-4")


def test_the_run_that_was_found_too_large_is_not_offered_again(make_config):
    """The compiler may refuse what the closed form lets through."""
    there = parse_topology("v5p-64")
    first = candidates(make_config(global_batch_size=64), there)[0]
    assert describe(first.config) not in what_fits(first.config, there)


def test_a_search_in_which_nothing_fits_does_not_advise_to_search(make_config, report, monkeypatch):
    refused = too_large(report)
    monkeypatch.setattr("mixtral_jax.train.plan.planner._report", lambda *_, **__: refused)
    with pytest.raises(UserError, match=r"1\.00 GB too much per chip in the best of 3 candidates") as error:
        run(make_config(global_batch_size=1024), topology="v5p-64", search=True)
    assert "--search" not in str(error.value)


def test_this_machine_is_told_in_its_own_words(make_config, report, monkeypatch):
    config = make_config(global_batch_size=64)
    refused = too_large(report)._replace(roofline=None)
    monkeypatch.setattr("mixtral_jax.train.plan.planner._report", lambda *_, **__: refused)
    with pytest.raises(UserError, match=r"1\.00 GB too much per device; take more --devices"):
        run(config, devices=2)
    with pytest.raises(UserError, match="--search ranks by published figures"):
        run(config, devices=2, search=True)
    with pytest.raises(UserError, match="--devices is 0"):
        run(config, devices=0)


@pytest.mark.parametrize("name", ["h100-0", "v5e:0x4", "0xv5e-8"])
def test_a_machine_without_chips_is_unknown(name):
    with pytest.raises(UserError, match="unknown topology"):
        parse_topology(name)
