"""Checkpoints to and from Hugging Face: streamed, exact, proved."""

from mixtral_jax.convert.edits import merge_lora, resize_vocab, upcycle
from mixtral_jax.convert.load import load, load_config, load_params, save_hf
from mixtral_jax.convert.peft import lora2peft, peft2lora
from mixtral_jax.convert.pipeline import hf2orbax, orbax2hf
from mixtral_jax.convert.verify import verify

__all__ = [
    "hf2orbax",
    "load",
    "load_config",
    "load_params",
    "lora2peft",
    "merge_lora",
    "orbax2hf",
    "peft2lora",
    "resize_vocab",
    "save_hf",
    "upcycle",
    "verify",
]
