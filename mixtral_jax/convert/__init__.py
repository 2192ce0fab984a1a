"""Checkpoints to and from Hugging Face: streamed, exact, proved."""

from mixtral_jax.convert.adapter import check_same_model
from mixtral_jax.convert.compare import verify
from mixtral_jax.convert.edits import merge_lora, resize_vocab, upcycle
from mixtral_jax.convert.export import lora2peft
from mixtral_jax.convert.files import Directory, is_remote
from mixtral_jax.convert.identity import arrays_identity, can_be_compared, check_identity, weights_identity
from mixtral_jax.convert.models import load, load_config, place_leaf, save_hf
from mixtral_jax.convert.orbax import KEPT, is_training_checkpoint, kept_tokenizer, newest_step, sibling
from mixtral_jax.convert.parts import edges, place
from mixtral_jax.convert.peft import open_adapter, peft2lora
from mixtral_jax.convert.pipeline import hf2orbax, open_source, orbax2hf
from mixtral_jax.convert.stream import Source
from mixtral_jax.convert.table import Leaf, leaves
