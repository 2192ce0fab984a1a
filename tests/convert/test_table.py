"""The table between native leaves and hub tensors."""

import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.table import leaves, slots
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import abstract_model
from tests.convert_files import DENSE, TINY, hub_shapes

ODD = {
    "mixtral": TINY,
    "one_kv_head_tied": {**TINY, "num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 41},
    "dense": DENSE,
    "many_experts": {**TINY, "num_local_experts": 16, "num_experts_per_tok": 4, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD.keys())
def test_slots_are_the_hub_tensors_with_their_shapes(shape):
    config = MixtralConfig.from_hf(shape)
    assert {s.name: s.shape for s in slots(config)} == hub_shapes(shape)


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD.keys())
def test_every_element_of_every_leaf_belongs_to_one_slot(shape):
    config = MixtralConfig.from_hf(shape)
    seen = {leaf.path: np.zeros(leaf.shape, int) for leaf in leaves(config)}
    for slot in slots(config):
        step = slot.leaf.row_step
        for start in range(0, slot.rows, step):
            seen[slot.leaf.path][slot.box(start, start + step)] += 1
    assert all((count == 1).all() for count in seen.values())
    assert sum(count.size for count in seen.values()) == config.num_params()


def test_leaves_are_the_parameters_of_the_model():
    for shape in ODD.values():
        config = MixtralConfig.from_hf(shape)
        model = nnx.to_pure_dict(nnx.state(abstract_model(config)))
        table = unflatten_dict({leaf.path: leaf.shape for leaf in leaves(config)}, sep=".")

        def shapes(tree):
            return {k: shapes(v) if isinstance(v, dict) else v.shape for k, v in tree.items()}

        assert shapes(model) == table


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("targets", [("attention.*", "moe.w*"), ("attention.value", "moe.w3")], ids=["all", "two"])
def test_leaves_of_adapters_are_those_of_an_adapted_model(shape, targets):
    config, lora = MixtralConfig.from_hf(shape), LoraConfig(rank=3, targets=targets)
    model = nnx.to_flat_state(nnx.state(abstract_model(config, lora=lora)))
    want = {".".join(map(str, path)): value.shape for path, value in model}
    table = {leaf.path: leaf.shape for leaf in leaves(config, lora)}
    assert table == {name: shape for name, shape in want.items() if is_adapter(name)}
    seen = {path: np.zeros(shape, int) for path, shape in table.items()}
    for slot in slots(config, lora):
        assert slot.rows == 3 if slot.name.endswith(".lora_A.weight") else slot.cols == 3
        seen[slot.leaf.path][slot.box(0, slot.rows)] += 1
    assert all((count == 1).all() for count in seen.values())


def test_projections_compute_what_the_hub_matrices_compute():
    """y = W x with the hub's W; ours contracts the same x with the native box."""
    rng = np.random.default_rng(0)
    by_leaf = {s.leaf.path: s for s in slots(MixtralConfig.from_hf(TINY))}
    equations = {
        "layers.attention.query": "D,DNH->NH", "layers.attention.key": "D,DNH->NH",
        "layers.attention.output": "NH,NHD->D",
        "layers.moe.router": "D,DE->E", "layers.moe.w13": "D,DF->F", "layers.moe.w2": "F,FD->D",
        "head.weight": "D,DV->V",
    }  # fmt: skip
    for path, equation in equations.items():
        slot = by_leaf[path]
        weight = rng.standard_normal(slot.shape)
        box = slot.to_native(weight)
        x = rng.standard_normal(slot.cols)
        shaped = x.reshape(box.shape[:2]) if path.endswith("output") else x
        np.testing.assert_allclose(np.einsum(equation, shaped, box).ravel(), weight @ x, rtol=1e-12)
        np.testing.assert_array_equal(slot.to_hub(box), weight)
