"""Checkpoints to and from Hugging Face: streamed, exact, proved."""

from mixtral_jax.convert.api import load_params

__all__ = ["load_params"]
