"""Small random transformers models, saved to disk and read back by our converter's table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from flax import nnx

from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.convert.hf import HfSource
from mixtral_jax.model import Mixtral, abstract_model
from tests.convert_files import load_params


@dataclass(frozen=True)
class Pair:
    """The same weights in both libraries."""

    hf: Any
    config: MixtralConfig
    params: dict[str, Any]


def build(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Pair:
    """A transformers model of this shape with unit-scale activations and logits, and ours read from its files."""
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=97, max_position_embeddings=128) | shape  # fmt: skip
    dense = shape.get("num_local_experts", 8) == 1
    kind = "Mistral" if dense else "Mixtral"
    if dense:
        shape = {k: v for k, v in shape.items() if k not in ("num_local_experts", "num_experts_per_tok")}
    theta = shape.pop("rope_theta", 1e6)
    config = getattr(transformers, f"{kind}Config")(
        **{"sliding_window": None} | shape,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise * (1.0 if "embed" in name and not config.tie_word_embeddings else p.shape[-1] ** -0.5))
            p.copy_(p.to(dtype))
    return Pair(model, *_read(model, directory))


def gradients(hf: Any, directory: Path) -> dict[str, Any]:
    """The gradients that a transformers model holds, as our parameter tree, through the same files and table."""
    kept = {name: p.detach().clone() for name, p in hf.named_parameters()}
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(p.grad)
        tree = _read(hf, directory)[1]
        for name, p in hf.named_parameters():
            p.copy_(kept[name])
    return tree


def ours(pair: Pair, compute: ComputeConfig | None = None) -> Mixtral:
    """Our model with the pair's weights."""
    compute = compute or ComputeConfig(dtype="float32", moe=MoeConfig(matmul="blocked"))
    graphdef, _ = nnx.split(abstract_model(pair.config, compute))
    return nnx.merge(graphdef, pair.params)


def _read(model: Any, directory: Path) -> tuple[MixtralConfig, dict[str, Any]]:
    model.save_pretrained(directory)
    return HfSource(directory).config, load_params(directory, np.float32)
