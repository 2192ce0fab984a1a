"""Validation of the data part of a configuration."""

from typing import Any

import pytest
from pydantic import ValidationError

from mixtral_jax.data.config import DataConfig, PhaseConfig, SourceConfig

WEB_AND_CODE = [{"name": "web", "path": "x"}, {"name": "code", "path": "y"}]
CONSTANT = {"schedule": "constant"}


def _config(**changes: Any) -> DataConfig:
    return DataConfig(**{"tokenizer": "t", "train": [{"name": "a", "path": "a.jsonl"}], **changes})


def test_defaults() -> None:
    config = _config()
    assert (config.packing, config.examples, config.on_error, config.temperature) == ("concat", "text", "fail", None)
    assert config.train[0].paths == ("a.jsonl",)
    assert SourceConfig(name="a", path=("b", "c")).paths == ("b", "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": [{"name": "a", "path": []}]}, r"path.*\n.*at least 1 item"),
        ({"pakcing": "concat"}, "Extra inputs are not permitted"),
        ({"packing": "tight"}, "'concat' or 'best_fit'"),
        ({"temperature": 0}, "greater than 0"),
        ({"epochs": float("inf")}, "finite number"),
        ({"train": [{"name": "a", "path": "x"}] * 2}, "two sources are named 'a'"),
        ({"validation": [{"name": "a", "path": "x"}] * 2}, "two sources are named 'a'"),
        ({"train": [{"name": "a/b", "path": "x"}]}, "match pattern"),
        ({"train": [{"name": "a", "path": "x", "weight": 0}]}, "greater than 0"),
        (
            {"train": [{"name": "a", "path": "x", "weight": 1}, {"name": "b", "path": "y"}]},
            "source 'b' has no weight while 'a' has one: give every source a weight, or none",
        ),
        ({"phases": []}, "at least 1 item"),
        ({"phases": [{"from_step": 0, "weights": {}}]}, "at least 1 item"),
        ({"phases": [{"from_step": 0, "weights": {"a": 0}}]}, "greater than 0"),
        ({"phases": [{"from_step": 0, "weights": {"a": float("inf")}}]}, "finite number"),
        ({"phases": [{"from_step": 2}]}, r"phases\.0\.from_step \(2\) must lie at step 0"),
        (
            {"phases": [{"from_step": 0}, {"from_step": 8}, {"from_step": 8}]},
            r"phases\.2\.from_step \(8\) must lie behind phases\.1\.from_step \(8\)",
        ),
        (
            {"phases": [{"from_step": 0, "weights": {"wep": 1}}], "train": WEB_AND_CODE},
            r"phases\.0\.weights names 'wep', which is no source of train: the nearest is 'web'",
        ),
        (
            {"phases": [{"from_step": 0, "weights": {"web": 1}}], "train": WEB_AND_CODE},
            "phases read no code: give each source a weight in one, or remove it from train",
        ),
        (
            {"phases": [{"from_step": 0}], "train": [{"name": "a", "path": "x", "weight": 2}]},
            r"train\.0\.weight \(2\) beside phases: write it as phases\.0\.weights",
        ),
        ({"phases": [{"from_step": 0}], "temperature": 2}, r"temperature \(2\) beside phases: write it as phases\.0\."),
        ({"phases": [{"from_step": 0}], "epochs": 2}, r"epochs \(2\) beside phases: .* by steps"),
        ({"phases": [{"from_step": 0, "learning_rate": {}}]}, r"phases\.0\.learning_rate: the first phase has the"),
        (
            {"phases": [{"from_step": 0}, {"from_step": 1, "learning_rate": CONSTANT | {"final_fraction": 0.1}}]},
            r"final_fraction \(0\.1\) means nothing with schedule: constant",
        ),
        ({"phases": [{"from_step": 0}, {"from_step": 1, "learning_rate": {"schedule": "wsd"}}]}, "'linear', 'cosine'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(**changes)


def test_with_a_temperature_some_weights_are_enough() -> None:
    train = [{"name": "a", "path": "x", "weight": 2}, {"name": "b", "path": "y"}]
    assert _config(train=train, temperature=2.0).train[1].weight is None


def test_what_phases_need_of_the_run() -> None:
    phases = [{"from_step": 0}, {"from_step": 8, "learning_rate": {}}]
    config = _config(phases=phases)
    assert [*config.phases_in(9, 8, None)] == []
    assert [*config.phases_in(8, 0, None)] == ["data.phases.1.from_step (8) is not smaller than steps (8)"]
    (told,) = config.phases_in(20, 10, None)
    assert told == "data.phases.1.from_step (8) begins a part of the schedule within optimizer.warmup_steps (10)"
    (told,) = config.phases_in(20, 0, 5)
    assert told.startswith(
        "optimizer.decay_steps (5) is wsd's own decay, and data.phases.1.learning_rate stands in its"
    )


def test_without_phases_the_sources_weights_are_one() -> None:
    assert _config().mixed == (PhaseConfig(from_step=0),)
    train = [{"name": "a", "path": "x", "weight": 2}, {"name": "b", "path": "y"}]
    (phase,) = _config(train=train, temperature=2.0).mixed
    assert (phase.weights, phase.temperature) == ({"a": 2.0, "b": 1.0}, 2.0)
    phases = [{"from_step": 0}, {"from_step": 5, "weights": {"a": 1}}]
    assert [phase.from_step for phase in _config(phases=phases).mixed] == [0, 5]


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _config().packing = "best_fit"  # type: ignore[misc]  # that is what is tested
