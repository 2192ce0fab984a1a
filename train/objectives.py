"""What each stage minimises."""

from collections.abc import Callable, Mapping
from typing import Any

from mixtral_jax.train.objective import Objective, next_token
from mixtral_jax.train.preference import preference

OBJECTIVES: Mapping[str, Callable[[Any], Objective]] = {
    "pretrain": lambda config: next_token(config.router, config.model),
    "sft": lambda config: next_token(config.router, config.model, config.neftune, entropy=True, skip_masked=True),
    "dpo": lambda config: preference(config.dpo, config.router, config.model, config.neftune),
}
