"""Weights that start a run: read from a Hugging Face directory onto the devices, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mixtral_jax as mj
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import param_shardings
from mixtral_jax.train.base import read_weights
from mixtral_jax.train.errors import UserError

CONFIG = mj.MixtralConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = mj.Mixtral(CONFIG, key=jax.random.key(0), param_dtype=jnp.bfloat16)
    directory = tmp_path_factory.mktemp("hf") / "model"
    mj.save_hf(model, directory)
    return str(directory), nnx.to_pure_dict(nnx.state(model))


def abstract(config, mesh=None):
    model = mj.abstract_model(config)
    shapes = nnx.to_pure_dict(nnx.state(model))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = param_shardings(model, mesh) or jax.tree.map(lambda _: here, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), shapes, places)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)])
def test_a_hugging_face_directory_becomes_fp32_masters_where_they_belong(saved, mesh):
    directory, want = saved
    asked = abstract(CONFIG, mesh and make_mesh(mesh))
    got = read_weights(directory, asked)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), got, want)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), got, asked)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 60}, r"init_from: embed\.weight has shape \(48, 16\) .* with shape \(60, 16\)"),
        ({"tie_word_embeddings": True}, r"has head\.weight, which the model does not have"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_leaf(saved, change, message):
    with pytest.raises(UserError, match=message):
        read_weights(saved[0], abstract(CONFIG.model_copy(update=change)))


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint"):
        read_weights(str(tmp_path), abstract(CONFIG))
