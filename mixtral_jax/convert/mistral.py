"""Mistral's own files (params.json, consolidated*.safetensors): other names, and rotary pairs that are adjacent."""

import re
from typing import Any

from pydantic import ValidationError

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory, PathLike
from mixtral_jax.convert.hf import has_weights, one_line, read_shape
from mixtral_jax.convert.safetensors import TensorSource, read_tensors
from mixtral_jax.convert.table import ROUTER, Place, Slot, slots

_PARAMS = "params.json"
_FILE = re.compile(r"consolidated[\w.-]*\.safetensors")
# Of later models: each changes what is computed, or what is stored.
_ALTERS = ("yarn", "rope_scaling", "llama_4_scaling", "quantization", "use_biases", "vision_encoder", "lora")
_NAMES = {
    "embed.weight": "tok_embeddings.weight", "norm.scale": "norm.weight", "head.weight": "output.weight",
    "layers.attention_norm.scale": "attention_norm.weight", "layers.moe_norm.scale": "ffn_norm.weight",
    "layers.attention.query": "attention.wq.weight", "layers.attention.key": "attention.wk.weight",
    "layers.attention.value": "attention.wv.weight", "layers.attention.output": "attention.wo.weight",
}  # fmt: skip


def is_mistral(directory: Directory) -> bool:
    """Whether the directory has Mistral's layout and not also the hub's: by its weights, a config.json may be there."""
    names = directory.names()
    whole = any(map(_FILE.fullmatch, names)) and not has_weights(directory)
    return _PARAMS in names and (whole or "config.json" not in names)


class MistralSource(TensorSource):
    """A directory in Mistral's layout as slots: experts apart (feed_forward.experts) or merged (block_sparse_moe.w1).

    Mistral rotates adjacent pairs (2i, 2i + 1) of a head, the hub halves (i, i + H/2): rows of q and k are permuted.
    """

    def __init__(self, path: PathLike) -> None:
        directory = Directory(path)
        params = directory.read_json(_PARAMS, "model directory")
        try:
            hf_config = _hf_config(params)
        except (ValueError, KeyError, TypeError) as error:
            told = one_line(error) if isinstance(error, ValidationError) else error
            raise ValueError(f"{directory}/{_PARAMS} does not parse or lacks a key: {told}") from None
        files = [n for n in directory.names() if _FILE.fullmatch(n)]
        if not files:
            raise ValueError(f"{directory} has {_PARAMS} but no consolidated*.safetensors (pickles are not read)")
        super().__init__(directory, hf_config, read_shape(hf_config, directory), read_tensors(directory, files))
        self._merged = self.fused(".block_sparse_moe.w1", ".feed_forward.experts.")
        self.put_in_place({slot: self._place(slot) for slot in slots(self.config)})

    def _place(self, slot: Slot) -> Place:
        leaf, c = slot.leaf.path, self.config
        layer = f"layers.{slot.layer}."
        block = layer + ("block_sparse_moe" if self._merged else "feed_forward")
        if leaf in _NAMES:
            heads = {"layers.attention.query": c.num_attention_heads, "layers.attention.key": c.num_key_value_heads}
            prefix = layer if leaf.startswith("layers.") else ""
            return Place(prefix + _NAMES[leaf], slot.shape, interleaved_heads=heads.get(leaf, 0))
        if leaf == ROUTER:
            return Place(f"{block}.gate.weight", slot.shape)
        which = "w2" if leaf == "layers.moe.w2" else ("w1", "w3")[slot.half]
        if self._merged:  # (E * F, D) for all three: w2 is stored as its transpose
            E, F, D = c.num_local_experts, c.intermediate_size, c.hidden_size
            return Place(f"{block}.{which}", (E * F, D), slot.expert * F, flipped=which == "w2")
        expert = "" if c.is_dense else f"experts.{slot.expert}."
        return Place(f"{block}.{expert}{which}.weight", slot.shape)


def _hf_config(params: dict[str, Any]) -> dict[str, Any]:
    """params.json in the words of config.json. rope_theta as in mistral-inference: 1e6, and 1e4 with a window."""
    params = {key: value for key, value in params.items() if value is not None}
    if odd := sorted(key for key in _ALTERS if params.get(key)):
        raise ValueError(f"{odd[0]} is {params[odd[0]]!r}, which is not supported")
    moe, window = params.get("moe", {}), params.get("sliding_window")
    config: dict[str, Any] = dict(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["hidden_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params.get("head_dim", 0),
        num_local_experts=moe["num_experts"] if moe else 1,
        num_experts_per_tok=moe["num_experts_per_tok"] if moe else 1,
        max_position_embeddings=params.get("max_position_embeddings", params.get("max_seq_len", 32768)),
        rope_theta=params.get("rope_theta", 1e6 if window is None else 1e4),
        rms_norm_eps=params["norm_eps"],
        sliding_window=window,
        tie_word_embeddings=params.get("tied_embeddings", False),
        router_aux_loss_coef=0.02 if moe else 0.0,
    )
    return MixtralConfig.model_validate(config, strict=True).to_hf()
