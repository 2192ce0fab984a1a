"""Mistral's own files (params.json, consolidated*.safetensors): other names, and rotary pairs that are adjacent."""

import json
import re
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.hf import HfSource
from mixtral_jax.convert.table import Layout, Place, Slot

_PARAMS = "params.json"
_FILE = re.compile(r"consolidated[\w.-]*\.safetensors")
_NAMES = {
    "embed.weight": "tok_embeddings.weight", "norm.scale": "norm.weight", "head.weight": "output.weight",
    "layers.attention_norm.scale": "attention_norm.weight", "layers.moe_norm.scale": "ffn_norm.weight",
    "layers.attention.query": "attention.wq.weight", "layers.attention.key": "attention.wk.weight",
    "layers.attention.value": "attention.wv.weight", "layers.attention.output": "attention.wo.weight",
}  # fmt: skip


def is_mistral(directory: Directory) -> bool:
    """Whether the directory has Mistral's layout and not (also) the hub's."""
    names = directory.names()
    return _PARAMS in names and "config.json" not in names


class MistralSource(HfSource):
    """A directory in Mistral's layout as slots: experts apart (feed_forward.experts) or merged (block_sparse_moe.w1).

    Mistral rotates adjacent pairs (2i, 2i + 1) of a head, the hub halves (i, i + H/2): rows of q and k are permuted.
    """

    def _read_config(self) -> dict[str, Any]:
        try:
            params = json.loads(self.directory.read_bytes(_PARAMS))
            return _hf_config(params)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.directory}/{_PARAMS} does not parse or lacks a key: {error}") from None

    def _files(self) -> tuple[list[str], dict[str, str]]:
        files = [n for n in self.directory.names() if _FILE.fullmatch(n)]
        if not files:
            raise ValueError(f"{self.directory} has {_PARAMS} but no consolidated*.safetensors (pickles are not read)")
        return files, {}

    def _layout_of(self) -> Layout:
        merged = next((n for n in self._tensors if n.endswith(".block_sparse_moe.w1")), None)
        apart = next((n for n in self._tensors if ".feed_forward.experts." in n), None)
        if merged and apart:
            raise ValueError(f"two expert layouts are mixed: {merged} and {apart}")
        return "mistral_merged" if merged else "mistral"

    def _place(self, slot: Slot) -> Place:
        leaf, c = slot.leaf.path, self.config
        layer = f"layers.{slot.layer}."
        if leaf in _NAMES:
            heads = {"layers.attention.query": c.num_attention_heads, "layers.attention.key": c.num_key_value_heads}
            prefix = layer if leaf.startswith("layers.") else ""
            return Place(prefix + _NAMES[leaf], slot.shape, interleaved_heads=heads.get(leaf, 0))
        if leaf == "layers.moe.router":
            block = "block_sparse_moe" if self.layout == "mistral_merged" else "feed_forward"
            return Place(f"{layer}{block}.gate.weight", slot.shape)
        which = "w2" if leaf == "layers.moe.w2" else ("w1", "w3")[slot.half]
        if self.layout == "mistral_merged":  # (E * F, D) for all three: w2 is stored as its transpose
            E, F, D = c.num_local_experts, c.intermediate_size, c.hidden_size
            name = f"{layer}block_sparse_moe.{which}"
            return Place(name, (E * F, D), slot.expert * F, flipped=which == "w2")
        expert = "" if c.is_dense else f"experts.{slot.expert}."
        return Place(f"{layer}feed_forward.{expert}{which}.weight", slot.shape)

    def band(self, slot: Slot) -> int | None:
        """Whole tensors where rows of the hub's matrix are columns on disk, or are permuted."""
        where = self._places[slot.name]
        return slot.rows if where.flipped or where.interleaved_heads else None

    def cost(self, slot: Slot) -> int:
        whole = slot.rows * slot.cols * self.dtype(slot).itemsize
        return super().cost(slot) if self.band(slot) is None else 2 * whole

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        where = self._places[slot.name]
        if where.flipped:
            last = where.first_row + slot.cols
            return self.read_rows(where.name, where.first_row, last, (slot.rows,))[:, start:stop].T
        if not where.interleaved_heads:
            return super().read(slot, start, stop)
        size = slot.rows // where.interleaved_heads
        assert start % size == 0 and stop % size == 0  # band() asks for whole tensors
        heads = super().read(slot, start, stop).reshape(-1, size // 2, 2, slot.cols)
        return heads.swapaxes(1, 2).reshape(stop - start, slot.cols)


def _hf_config(params: dict[str, Any]) -> dict[str, Any]:
    """params.json in the words of config.json. rope_theta as in mistral-inference: 1e6, and 1e4 with a window."""
    moe = params.get("moe")
    window = params.get("sliding_window")
    config = MixtralConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["hidden_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params.get("head_dim") or 0,
        num_local_experts=moe["num_experts"] if moe else 1,
        num_experts_per_tok=moe["num_experts_per_tok"] if moe else 1,
        max_position_embeddings=params.get("max_position_embeddings") or params.get("max_seq_len") or 32768,
        rope_theta=params.get("rope_theta") or (1e6 if window is None else 1e4),
        rms_norm_eps=params["norm_eps"],
        sliding_window=window,
        tie_word_embeddings=params.get("tied_embeddings", False),
        router_aux_loss_coef=0.02 if moe else 0.0,
    )
    return config.to_hf()
