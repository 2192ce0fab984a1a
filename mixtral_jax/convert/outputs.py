"""Logits and chosen experts of a checkpoint on given prompts, by our model and by transformers."""

import importlib.util
import os
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.attention import Rows
from mixtral_jax.config import ComputeConfig
from mixtral_jax.convert.api import load
from mixtral_jax.convert.files import Directory, is_remote
from mixtral_jax.convert.pipeline import open_source, write_hf
from mixtral_jax.model import Block, Mixtral, compute_dtype, fill_rows
from mixtral_jax.moe.router import route
from mixtral_jax.rope import rope_angles

_SHARD_BYTES = 5 * 10**9


class Outputs(NamedTuple):
    """Of all prompts one after another: M positions, L layers, C chosen experts (None for a dense model)."""

    logits_MV: np.ndarray
    experts_LMC: np.ndarray | None


def our_outputs(path: str | os.PathLike[str], prompts: list[list[int]]) -> Outputs:
    """By this package, in fp32. The prompts are padded to one length; padding is another segment."""
    model = load(path, compute=ComputeConfig(dtype="float32"))
    length = max(map(len, prompts))
    tokens_BT = jnp.array([row + [0] * (length - len(row)) for row in prompts], jnp.int32)
    real_BT = np.array([[i < len(row) for i in range(length)] for row in prompts])
    logits_BTV, experts_LMC = _run(model, tokens_BT, jnp.asarray(real_BT, jnp.int32))
    experts = None if experts_LMC is None else np.asarray(experts_LMC)[:, real_BT.ravel()]
    return Outputs(np.asarray(logits_BTV)[real_BT], experts)


@jax.jit
def _run(model: Mixtral, tokens_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    logits_BTV = model(tokens_BT, segment_ids=segments_BT)
    return logits_BTV, None if model.config.is_dense else chosen_experts(model, tokens_BT, segments_BT)


def chosen_experts(model: Mixtral, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Indices (L, M, C) of the experts that each token is sent to in each layer."""
    config = model.config
    _, positions_BT, _ = fill_rows(tokens_BT, None, segments_BT)
    rows = Rows(positions_BT, segments_BT, rope_angles(positions_BT, config.head_dim, config.rope_theta))

    def body(x_BTD: jax.Array, layer: Block) -> tuple[jax.Array, jax.Array]:
        attended = x_BTD + layer.attention(layer.attention_norm(x_BTD), rows, layer.backend)
        x_MD = layer.moe_norm(attended).reshape(-1, config.hidden_size)
        routing = route(x_MD, layer.moe.router[...].astype(jnp.float32), config.num_experts_per_tok)
        return layer(x_BTD, rows)[0], routing.expert_MC

    x_BTD = model.embed(tokens_BT, compute_dtype(model.compute.dtype))
    return jax.lax.scan(body, x_BTD, model.layers)[1]


def transformers_outputs(path: str | os.PathLike[str], prompts: list[list[int]]) -> tuple[Outputs | None, str]:
    """By transformers, in fp32, through files on disk; None and the reason where that cannot be done."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None, "transformers is not installed: logits were compared by this package alone"
    if is_remote(path):
        return None, f"{path} is remote: not read by transformers"
    if "config.json" in Directory(path).names() and not (Directory(path).local / "params").exists():
        return _run_transformers(os.fspath(path), prompts), ""
    with tempfile.TemporaryDirectory(prefix="mixtral-jax-verify-") as scratch:
        exported = f"{scratch}/hf"
        write_hf(open_source(path), exported, dtype=None, shard_bytes=_SHARD_BYTES, force=False, progress=False)
        return _run_transformers(exported, prompts), ""


def _run_transformers(path: str, prompts: list[list[int]]) -> Outputs:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    logits, experts = [], []
    for row in prompts:
        extra = {"output_router_logits": True} if top_k else {}
        with torch.no_grad():
            out = model(torch.tensor([row]), **extra)
        logits.append(out.logits[0].float().numpy())
        if top_k:
            experts.append(torch.stack([r.float().topk(top_k).indices for r in out.router_logits]).numpy())
    return Outputs(np.concatenate(logits), np.concatenate(experts, axis=1) if experts else None)
