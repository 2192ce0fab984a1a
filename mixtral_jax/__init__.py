"""Mixtral in JAX: the model, its parallelism, its kernels, and its checkpoints."""

from typing import Any

from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.generate import generate
from mixtral_jax.model import Mixtral, abstract_model

__all__ = ["ComputeConfig", "Mixtral", "MixtralConfig", "MoeConfig", "abstract_model", "generate", "load", "save_hf"]


def __getattr__(name: str) -> Any:
    """`load` and `save_hf` bring Orbax and safetensors with them: imported when first asked for."""
    if name in ("load", "save_hf"):
        from mixtral_jax import convert

        return getattr(convert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
