"""Checkpoints to and from Hugging Face: streamed, exact, proved."""

from mixtral_jax.convert.api import load_params
from mixtral_jax.convert.pipeline import hf2orbax, orbax2hf

__all__ = ["hf2orbax", "load_params", "orbax2hf"]
