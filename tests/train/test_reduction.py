"""Gradients of several micro-batches cross `data` once a step, in the dtype asked for; they are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from mixtral_jax.config import ComputeConfig
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.parallel import MeshConfig, batch_sharding, make_mesh, param_shardings
from mixtral_jax.train.objective import RouterConfig, next_token
from mixtral_jax.train.step import loss_and_gradients
from mixtral_jax.train.weights import join, keep
from tests.programs import REDUCTIONS, equations
from tests.tiny import random_batch, tiny_config

CONFIG = tiny_config()
LORA = LoraConfig(rank=4)


def make(compute, lora=None):
    """(loss_and_gradients of (params, frozen, batch), params, frozen, the model's shapes)."""
    abstract = abstract_model(CONFIG, compute, lora=lora)
    graphdef, _ = nnx.split(abstract)
    params = nnx.to_pure_dict(nnx.state(Mixtral(CONFIG, compute, key=jax.random.key(0), lora=lora)))
    trained, frozen = params, None
    if lora is not None:
        trained, frozen = keep(params, is_adapter), keep(params, lambda path: not is_adapter(path))
        trained = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape) / 10, trained)
    objective = next_token(RouterConfig(), CONFIG)
    merge = lambda params, frozen: nnx.merge(graphdef, join(params, frozen))  # noqa: E731 - short
    return lambda p, f, b: loss_and_gradients(objective, merge, p, f, b), trained, frozen, abstract


def on_mesh(compute, batch, lora=None, **sizes):
    """(result, the program's reductions)."""
    run, params, frozen, abstract = make(compute, lora)
    mesh = make_mesh(MeshConfig(**sizes))
    by_path = flatten_dict(param_shardings(abstract, mesh))
    place = lambda tree: tree and jax.device_put(tree, _like(tree, by_path))  # noqa: E731 - short
    with jax.set_mesh(mesh):
        args = place(params), place(frozen), jax.device_put(batch, batch_sharding(mesh))
        found = [e for e in equations(jax.make_jaxpr(run)(*args).jaxpr) if e.name in REDUCTIONS]
        return jax.device_get(jax.jit(run)(*args)), found


def _like(tree, by_path):
    return jax.tree.map_with_path(lambda path, _: by_path[tuple(k.key for k in path)], tree)


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.slow)], ids=["all weights", "adapters"])
def test_the_sum_over_data_comes_once_behind_the_micro_batches(lora):
    batch = random_batch((3, 8, 16))
    run, params, frozen, _ = make(ComputeConfig(dtype="float32"), lora)
    loss, _, want = jax.device_get(jax.jit(run)(params, frozen, batch))
    (got_loss, _, got), found = on_mesh(ComputeConfig(dtype="float32"), batch, lora, data=2, fsdp=2, expert=2)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))
    over_data = [e for e in found if "data" in e.axes and e.size >= CONFIG.hidden_size]
    assert len([e for e in over_data if e.axes == ("data",) and not e.loops]) == len(jax.tree.leaves(want))
    inside = [e for e in over_data if e.loops]  # the statistics of a micro-batch's router, which its losses need
    assert {e.shape for e in inside} <= {(CONFIG.num_hidden_layers, 2 * CONFIG.num_local_experts + 6)}


def test_one_micro_batch_reduces_within_its_backward_pass():
    _, found = on_mesh(ComputeConfig(dtype="float32"), random_batch((1, 8, 16)), data=4, fsdp=2)
    assert [e for e in found if "data" in e.axes and CONFIG.num_hidden_layers in e.loops]


@pytest.mark.parametrize("reduce_dtype", ["bfloat16", "float32"])
def test_it_has_the_dtype_asked_for(reduce_dtype):
    compute = ComputeConfig(dtype="bfloat16", reduce_dtype=reduce_dtype)
    (_, _, grads), found = on_mesh(compute, random_batch((2, 8, 16)), data=8)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    sums = [e for e in found if e.axes == ("data",) and not e.loops and e.size >= CONFIG.hidden_size]
    router = CONFIG.hidden_size * CONFIG.num_local_experts * CONFIG.num_hidden_layers  # in fp32 throughout
    assert {e.dtype for e in sums if e.size != router} == {reduce_dtype}
    assert {e.dtype for e in sums if e.size == router} == {"float32"}
