"""Mixtral in JAX: the model, its parallelism, its kernels, and its checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
    from mixtral_jax.convert.load import load, save_hf
    from mixtral_jax.generation.generate import generate
    from mixtral_jax.model import Mixtral, abstract_model
    from mixtral_jax.train.trainer import Trainer

# Where each public name lives. Imported when first asked for: mixtral_jax.data must load without jax.
_PLACES = {
    "ComputeConfig": "config",
    "Mixtral": "model",
    "MixtralConfig": "config",
    "MoeConfig": "config",
    "Trainer": "train.trainer",
    "abstract_model": "model",
    "generate": "generation.generate",
    "load": "convert.load",
    "save_hf": "convert.load",
}
__all__ = [
    "ComputeConfig",
    "Mixtral",
    "MixtralConfig",
    "MoeConfig",
    "Trainer",
    "abstract_model",
    "generate",
    "load",
    "save_hf",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
