"""Validation of the data part of a configuration."""

from typing import Any

import pytest
from pydantic import ValidationError

from mixtral_jax.data.config import DataConfig, SourceConfig


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
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(**changes)


def test_with_a_temperature_some_weights_are_enough() -> None:
    train = [{"name": "a", "path": "x", "weight": 2}, {"name": "b", "path": "y"}]
    assert _config(train=train, temperature=2.0).train[1].weight is None


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _config().packing = "best_fit"  # type: ignore[misc]  # that is what is tested
