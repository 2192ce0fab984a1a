"""Hugging Face directories for the tests, written with the safetensors library, and checkpoints read slot by slot."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from mixtral_jax.convert import Leaf, Source, leaves, open_source
from mixtral_jax.convert.files import PathLike

BF16 = np.dtype(ml_dtypes.bfloat16)
TINY: dict[str, Any] = dict(
    model_type="mixtral", architectures=["MixtralForCausalLM"], vocab_size=37, hidden_size=24, intermediate_size=20,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=128, rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=None,
    tie_word_embeddings=False, torch_dtype="float32",
)  # fmt: skip
DENSE: dict[str, Any] = {
    **{k: v for k, v in TINY.items() if k not in ("num_local_experts", "num_experts_per_tok")},
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
}


def hub_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a hub directory."""
    D, F, V, H = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["head_dim"]
    N, K = c["num_attention_heads"] * H, c["num_key_value_heads"] * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        shapes |= {p + "self_attn.q_proj.weight": (N, D), p + "self_attn.k_proj.weight": (K, D)}
        shapes |= {p + "self_attn.v_proj.weight": (K, D), p + "self_attn.o_proj.weight": (D, N)}
        if c["model_type"] != "mixtral":
            shapes |= {p + "mlp.gate_proj.weight": (F, D), p + "mlp.up_proj.weight": (F, D)}
            shapes |= {p + "mlp.down_proj.weight": (D, F)}
            continue
        shapes[p + "block_sparse_moe.gate.weight"] = (c["num_local_experts"], D)
        for e in range(c["num_local_experts"]):
            q = f"{p}block_sparse_moe.experts.{e}."
            shapes |= {q + "w1.weight": (F, D), q + "w2.weight": (D, F), q + "w3.weight": (F, D)}
    shapes["model.norm.weight"] = (D,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def random_tensors(c: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Values of unit scale, different everywhere."""
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * s[-1] ** -0.5).astype(dtype) for n, s in hub_shapes(c).items()}


def fuse(tensors: dict[str, np.ndarray], c: dict[str, Any]) -> dict[str, np.ndarray]:
    """The layout that transformers 5 has in memory."""
    out = {n: t for n, t in tensors.items() if ".block_sparse_moe." not in n}
    for i in range(c["num_hidden_layers"]):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        w1, w2, w3 = (
            [tensors[f"{old}experts.{e}.{w}.weight"] for e in range(c["num_local_experts"])] for w in ("w1", "w2", "w3")
        )
        out[new + "gate.weight"] = tensors[old + "gate.weight"]
        out[new + "experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(w1, w3, strict=True)])
        out[new + "experts.down_proj"] = np.stack(w2)
    return out


def write_hub(
    directory: Path, c: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1, config: bool = True
) -> Path:
    """A hub directory of `shards` files."""
    directory.mkdir(parents=True)
    if config:
        (directory / "config.json").write_text(json.dumps(c))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        own = names[s::shards]
        weight_map |= dict.fromkeys(own, file)
        save_file({n: tensors[n] for n in own}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read_hub(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of every file, by the safetensors library."""
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file does not iterate
                assert name not in out
                out[name] = tensors.get_tensor(name)
    return out


def read_leaf(source: Source, leaf: Leaf) -> np.ndarray:
    """A native leaf of a source, filled slot by slot."""
    own = [slot for slot in source.slots if slot.leaf == leaf]
    out = np.empty(leaf.shape, source.dtype(own[0]))
    for slot in own:
        out[slot.box(0, slot.rows)] = slot.to_native(source.read(slot, 0, slot.rows))
    return out


def load_params(path: PathLike, dtype: Any = None) -> dict[str, Any]:
    """The native tree of any checkpoint in numpy, nested; with a `dtype` every leaf is cast."""
    source = open_source(path)
    flat = {leaf.path: read_leaf(source, leaf) for leaf in leaves(source.config)}
    return unflatten_dict({name: x if dtype is None else x.astype(dtype) for name, x in flat.items()}, sep=".")


def assert_same_bytes(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name
