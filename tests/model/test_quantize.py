"""Weights in blocks of 8 and 4 bits: the levels, the error, models whose base is held so, on one device and a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from mixtral_jax.config import ComputeConfig, MoeConfig
from mixtral_jax.generation.cache import decode, prefill
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import Mixtral, abstract_model, next_token_sums
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import param_shardings
from mixtral_jax.quantize import NF4, dequantize, quantize
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from tests.lora_models import FP32, adapted, flat_params, rebuilt
from tests.tiny import random_batch, tiny_config
from tests.tuning import write_tuning_file

CONFIG = tiny_config(vocab_size=62, num_key_value_heads=2)
DEEP = tiny_config(vocab_size=62, num_hidden_layers=3, intermediate_size=512, hidden_size=64)
BATCH = [jnp.asarray(x[0]) for x in random_batch((1, 4, 12), 62)]
# path -> the contracted axis of the weights
CONTRACTED = {
    "layers.attention.query": 1, "layers.attention.key": 1, "layers.attention.value": 1, "layers.attention.output": 2,
    "layers.moe.w13": 2, "layers.moe.w2": 2,
}  # fmt: skip


def lora(kind, **changes):
    return LoraConfig(rank=3, alpha=5.0, base_dtype=kind, base_block=4, **changes)


def loss(model, batch=BATCH):
    tokens, targets, weights, segments, positions = batch
    sums, stats = next_token_sums(model, tokens, targets, weights, positions, segments)
    return sums.loss_sum / jnp.sum(weights) + 1e-3 * jnp.sum(stats.z_L)


def table_lookup(codes, scales, axis, kind):
    """The definition, in numpy: unpack, look up, multiply, join the blocks."""
    codes, scales = np.asarray(codes), np.expand_dims(np.asarray(scales), axis + 1)
    if kind == "nf4":
        codes = np.concatenate([codes % 16, codes // 16], axis=axis + 1)
        unit = np.array(NF4, np.float32)[codes]
    else:
        unit = codes.astype(np.float32) / 127
    w = unit * scales
    return w.reshape(*w.shape[:axis], -1, *w.shape[axis + 2 :])


def test_the_levels_are_those_of_the_paper():
    """2305.14314, equation 4 and appendix E: midpoints of quantiles of N(0, 1), 8 below and 7 above an exact 0."""
    offset = 0.5 * (1 - 1 / 30 + 1 - 1 / 32)
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_every_weight_becomes_its_nearest_level(kind):
    w = np.random.default_rng(0).standard_normal((3, 128, 2, 5)).astype(np.float32)
    w[0, :64, 0, 0] = 0
    codes, scales = jax.jit(quantize, static_argnums=(1, 2, 3))(w, 1, 64, kind)
    assert scales.shape == (3, 2, 2, 5) and codes.shape == (3, 2, {"int8": 64, "nf4": 32}[kind], 2, 5)
    got = table_lookup(codes, scales, 1, kind)
    back = jax.jit(dequantize, static_argnums=(2, 3, 4))(codes, scales, 1, kind, "float32")
    np.testing.assert_allclose(back, got, rtol=3e-7)
    units = np.array(NF4) if kind == "nf4" else np.arange(-127, 128) / 127
    scale = np.repeat(np.abs(w.reshape(3, 2, 64, 2, 5)).max(2), 64, axis=1)
    nearest = np.abs(w[..., None] - scale[..., None] * units).min(-1)
    np.testing.assert_allclose(np.abs(w - got), nearest, atol=1e-6)
    assert (got[0, :64, 0, 0] == 0).all()


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("bfloat16", 0.0015, 0.0018), ("int8", 0.0055, 0.0063), ("nf4", 0.088, 0.096)]
)
def test_relative_error_of_normal_weights(kind, least, most):
    """What docs/lora.md states; in blocks of 64."""
    w = jax.random.normal(jax.random.key(0), (1024, 256))
    held = w.astype(kind) if kind == "bfloat16" else dequantize(*quantize(w, 0, 64, kind), 0, kind, jnp.float32)
    assert least < jnp.linalg.norm(held - w) / jnp.linalg.norm(w) < most


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "nf4"])
def test_a_held_base_is_the_model_of_its_dequantised_weights(kind):
    """Loss and the gradient of every adapter, against a plain fp32 base with the values that the codes stand for."""
    _, leaves = adapted(CONFIG, lora(kind))
    plain = {name: np.asarray(value, np.float32) for name, value in leaves.items() if ".codes" not in name}
    for path, axis in CONTRACTED.items() if kind != "bfloat16" else ():
        plain[path] = table_lookup(leaves[f"{path}.codes"], plain.pop(f"{path}.scales"), axis, kind)
    trained = {name: leaves[name] for name in leaves if is_adapter(name)}

    def held(trained):
        return loss(rebuilt(CONFIG, leaves | trained, lora(kind)))

    def dequantised(trained):
        return loss(rebuilt(CONFIG, plain | trained, lora("float32")))

    got, got_grads = jax.jit(jax.value_and_grad(held))(trained)
    want, want_grads = jax.jit(jax.value_and_grad(dequantised))(trained)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name, value in want_grads.items():
        assert jnp.linalg.norm(value) > 0
        assert jnp.linalg.norm(got_grads[name] - value) <= 1e-6 * jnp.linalg.norm(value), name


MESHES = [dict(expert=2, tensor=2, fsdp=2), dict(data=2, context=2, expert=2), dict(fsdp=4, tensor=2)]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " x ".join(f"{k} {v}" for k, v in sizes.items()))
def test_a_mesh_equals_one_device(sizes):
    model, leaves = adapted(CONFIG, lora("nf4"))
    graphdef, _ = nnx.split(model)
    trained = {name: leaves[name] for name in leaves if is_adapter(name)}
    want, want_grads = jax.jit(jax.value_and_grad(lambda t: loss(rebuilt(CONFIG, leaves | t, lora("nf4")))))(trained)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    placed = jax.device_put(nnx.to_pure_dict(nnx.state(model)), param_shardings(model, mesh))
    codes = placed["layers"]["moe"]["w2"]["codes"]
    shards = [sizes.get(axis, 1) for axis in ("expert", "tensor", "fsdp")]
    assert codes.sharding.shard_shape(codes.shape) == (2, 4 // shards[0], 6 // shards[1], 2, 16 // shards[2])
    flat = {name: leaf for (name, _), leaf in zip(flat_params(model).items(), jax.tree.leaves(placed), strict=True)}

    def on_mesh(trained):
        params = jax.tree.unflatten(jax.tree.structure(placed), list((flat | trained).values()))
        return loss(nnx.merge(graphdef, params))

    with jax.set_mesh(mesh):
        got, got_grads = jax.jit(jax.value_and_grad(on_mesh))({name: flat[name] for name in trained})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name, value in want_grads.items():
        assert jnp.linalg.norm(got_grads[name] - value) <= 1e-5 * jnp.linalg.norm(value), name


def values_made(jaxpr):
    """The type of every value that a jaxpr, or one inside it, makes."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(part, "eqns"):
                yield from values_made(getattr(part, "jaxpr", part))


def largest_float(kind, remat):
    """Of all values that a step makes, forward and backward, in elements."""
    compute = ComputeConfig(dtype="float32", remat=remat, moe=MoeConfig(matmul="blocked"))
    _, leaves = adapted(DEEP, lora(kind), compute=compute)
    trained = {name: leaves[name] for name in leaves if is_adapter(name)}
    frozen = {name: leaves[name] for name in leaves if not is_adapter(name)}
    few = [x[:1, :6] for x in BATCH]  # so that activations are small beside weights
    step = jax.value_and_grad(lambda t, f: loss(rebuilt(DEEP, f | t, lora(kind), compute), few))
    made = values_made(jax.make_jaxpr(step)(trained, frozen).jaxpr)
    return max(a.size for a in made if hasattr(a, "size") and jnp.issubdtype(a.dtype, jnp.floating))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_no_stack_of_layers_is_ever_dequantised(kind):
    """Nor has the base a gradient, which would be as large; with remat none the backward pass would keep a stack."""
    stack = 3 * 4 * 64 * 512  # of w2, and half of that of w13
    assert max(largest_float(kind, "full"), largest_float(kind, "minimal")) < stack <= largest_float(kind, "none")


def test_remat_none_would_keep_every_layer_dequantised_and_is_refused(tmp_path):
    changes = {"lora": {"rank": 2, "base_dtype": "nf4"}, "compute": {"remat": "none"}}
    with pytest.raises(UserError, match=r"lora\.base_dtype is nf4, but compute\.remat is none"):
        load_config(write_tuning_file(tmp_path, "sft", **changes))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_cached_decoding_equals_the_full_forward_pass(kind):
    model, _ = adapted(CONFIG, lora(kind))
    tokens_BT = np.random.default_rng(0).integers(0, 62, (2, 12)).astype(np.int32)
    want_BTV = np.asarray(jax.jit(lambda m, t: m(t))(model, tokens_BT))
    pad_B = np.zeros(2, np.int32)
    logits_BV, cache = jax.jit(prefill, static_argnums=3)(model, tokens_BT[:, :6], pad_B, 12)
    np.testing.assert_allclose(logits_BV, want_BTV[:, 5], atol=1e-5)
    step = jax.jit(decode)
    for t in range(6, 12):
        logits_BV, cache = step(model, cache, tokens_BT[:, t], jnp.int32(t), pad_B, np.ones(2, bool))
        np.testing.assert_allclose(logits_BV, want_BTV[:, t], atol=1e-5)


def test_the_least_bits_lose_the_most():
    """Difference of logits from those of an fp32 base: the more bits, the less, and all small beside the logits."""
    tokens = np.random.default_rng(0).integers(0, 62, (4, 32)).astype(np.int32)
    logits = {}
    for kind in ("float32", "bfloat16", "int8", "nf4"):
        model = Mixtral(CONFIG, FP32, key=jax.random.key(0), lora=lora(kind))
        logits[kind] = np.asarray(jax.jit(lambda m: m(tokens))(model))
    error = {k: np.linalg.norm(v - logits["float32"]) / np.linalg.norm(logits["float32"]) for k, v in logits.items()}
    assert error["bfloat16"] < 0.02 and error["int8"] < 0.03 and error["nf4"] < 0.3
    assert error["bfloat16"] < error["int8"] < error["nf4"]


def test_what_cannot_be_packed_is_refused():
    odd = tiny_config(vocab_size=62, intermediate_size=25)
    with pytest.raises(ValueError, match=r"packs two weights to a byte: ffn \(25\) has no even divisor"):
        Mixtral(odd, key=jax.random.key(0), lora=lora("nf4"))
    for size, block in itertools.product((25, 24), (4, 64)):
        held = LoraConfig(rank=1, base_dtype="int8", base_block=block)
        Mixtral(tiny_config(vocab_size=62, intermediate_size=size), key=jax.random.key(0), lora=held)


def test_blocks_that_a_mesh_does_not_divide_are_named_with_the_setting_that_makes_more():
    model, mesh = abstract_model(CONFIG, lora=lora("nf4")), make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(ValueError, match=r"codes: its embed dimension 4 .*smaller mesh\.fsdp or lora\.base_block"):
        param_shardings(model, mesh)
