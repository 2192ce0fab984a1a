"""The phases that docs/data.md shows are a configuration."""

import re

from mixtral_jax.data.config import DataConfig
from mixtral_jax.train.config.tree import tree_from_text
from tests.sources import ROOT


def test_the_phases_of_the_page_are_taken_as_they_stand() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.S)
    config = DataConfig.model_validate({"tokenizer": "tokenizer.model", **tree_from_text(shown).values["data"]})
    assert [phase.from_step for phase in config.mixed] == [0, 8000]
    assert list(config.phases_in(10_000, warmup_steps=100, decay_steps=None)) == []
