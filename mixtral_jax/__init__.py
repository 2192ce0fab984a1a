"""Mixtral in JAX: the model, its parallelism, its kernels, and its checkpoints."""

from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.convert import load, save_hf
from mixtral_jax.generate import generate
from mixtral_jax.model import Mixtral, abstract_model

__all__ = ["ComputeConfig", "Mixtral", "MixtralConfig", "MoeConfig", "abstract_model", "generate", "load", "save_hf"]
