"""Models with adapters that do something, and the same models with explicit merged weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.convert import table
from mixtral_jax.convert.adapter import NativeAdapter
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import Mixtral, abstract_model
from tests.convert_files import read_leaf

FP32 = ComputeConfig(dtype="float32", moe=MoeConfig(matmul="blocked"))


def flat_params(model: nnx.Module) -> dict[str, jax.Array]:
    """Every leaf by its dotted path."""
    return {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}


def rebuilt(
    config: MixtralConfig, leaves: dict[str, jax.Array], lora: LoraConfig | None = None, compute: ComputeConfig = FP32
) -> Mixtral:
    """A model of these leaves."""
    abstract = abstract_model(config, compute, lora=lora)
    graphdef, state = nnx.split(abstract)
    flat = [jnp.asarray(leaves[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), flat))


def adapted(
    config: MixtralConfig, lora: LoraConfig, *, seed: int = 0, compute: ComputeConfig = FP32
) -> tuple[Mixtral, dict[str, np.ndarray]]:
    """A model whose B matrices are not 0 (so that every adapter speaks and every A has a gradient), and its leaves."""
    model = Mixtral(config, compute, key=jax.random.key(seed), lora=lora)
    rng = np.random.default_rng(seed + 1)
    leaves = {}
    for name, value in flat_params(model).items():
        noise = rng.standard_normal(value.shape).astype(np.float32)
        leaves[name] = 0.2 * noise if is_adapter(name) and name.endswith(".b") else np.asarray(value)
    return rebuilt(config, leaves, lora, compute), leaves


def merged(leaves: dict[str, np.ndarray], scale: float) -> dict[str, jax.Array]:
    """W + scale * A B for every adapted matrix, by one einsum each; the leaves of a model without adapters."""
    formulas = {
        "attention.query": "LDr,LrNH->LDNH", "attention.key": "LDr,LrNH->LDNH", "attention.value": "LDr,LrNH->LDNH",
        "attention.output": "LNHr,LrD->LNHD", "moe.w2": "LEFr,LErD->LEFD",
        "moe.router": "LDr,LrE->LDE", "moe.w1": "LEDr,LErF->LEDF", "moe.w3": "LEDr,LErF->LEDF",
    }  # fmt: skip
    out = {name: jnp.asarray(value) for name, value in leaves.items() if not is_adapter(name)}
    for target, letters in formulas.items():
        path = f"layers.{target}_lora"
        if f"{path}.a" not in leaves:
            continue
        change = scale * jnp.einsum(letters, leaves[f"{path}.a"], leaves[f"{path}.b"])
        if target in ("moe.w1", "moe.w3"):
            half = 0 if target == "moe.w1" else 1
            out["layers.moe.w13"] = out["layers.moe.w13"].at[:, :, :, half].add(change)
        else:
            out[f"layers.{target}"] = out[f"layers.{target}"] + change
    return out


def write_native(directory: Path, config: MixtralConfig, lora: LoraConfig, leaves: dict, base: str | None) -> Path:
    """An adapter directory of ours, by Orbax itself."""
    directory.mkdir()
    checkpoint.save(directory / "params", adapter_tree(leaves, lora.whole))
    note = {"format": 1, "base": base, "lora": lora.model_dump(mode="json"), "model": config.model_dump(mode="json")}
    (directory / "adapter.json").write_text(json.dumps(note))
    return directory


def stored_leaves(adapter: NativeAdapter) -> dict[str, np.ndarray]:
    """The leaves of an adapter of ours, by their dotted paths."""
    return {leaf.path: read_leaf(adapter, leaf) for leaf in table.leaves(adapter.config, adapter.lora)}


def adapter_tree(leaves: dict, whole: tuple[str, ...] = ()) -> dict:
    """The adapter leaves alone, nested; and those of `whole`."""
    kept = {name: value for name, value in leaves.items() if is_adapter(name) or name in whole}
    return unflatten_dict(kept, sep=".")
