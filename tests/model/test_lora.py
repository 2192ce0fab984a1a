"""Adapters against explicit merged weights, alone and together, on one device and on a mesh, and in cached decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.generation.cache import decode, prefill
from mixtral_jax.lora import TARGETS, LoraConfig, LowRank, is_adapter, low_rank
from mixtral_jax.model import Mixtral, Noise, abstract_model, next_token_sums
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import param_shardings
from tests.lora_models import FP32, adapted, flat_params, merged, rebuilt
from tests.optional import often
from tests.tiny import random_batch, tiny_config

VOCAB = 62
SHAPE = dict(vocab_size=VOCAB, num_key_value_heads=2)
SPARSE = tiny_config(**SHAPE)
DENSE = tiny_config(**SHAPE, num_local_experts=1, num_experts_per_tok=1, sliding_window=5)
ALL = LoraConfig(rank=3, alpha=5.0)
LINEAR = LoraConfig(rank=3, alpha=5.0, dropout=0.5, targets=("all-linear",))  # with the router; no rng, no dropout
SOME = LoraConfig(rank=3, alpha=5.0, targets=("attention.output", "moe.w3"))
BATCH = [jnp.asarray(x[0]) for x in random_batch((1, 4, 12), VOCAB)]


def loss(model: Mixtral, noise: Noise | None = None) -> jax.Array:
    """Mean cross-entropy plus a router sum, so that every output has a gradient."""
    tokens, targets, weights, segments, positions = BATCH
    sums, stats = next_token_sums(model, tokens, targets, weights, positions, segments, noise)
    return sums.loss_sum / jnp.sum(weights) + 1e-3 * jnp.sum(stats.z_L)


@functools.cache
def loss_and_gradients(config: MixtralConfig, lora: LoraConfig | None):
    """A function of leaves by name, compiled once."""
    return jax.jit(jax.value_and_grad(lambda leaves: loss(rebuilt(config, leaves, lora))))


def assert_equals_merged(config: MixtralConfig, lora: LoraConfig, leaves: dict) -> None:
    """Value, and the gradient of every leaf by the chain rule through W + s A B."""
    got, got_grads = loss_and_gradients(config, lora)(leaves)
    whole, pull_back = jax.vjp(lambda p: merged(p, lora.scale), {k: jnp.asarray(v) for k, v in leaves.items()})
    want, whole_grads = loss_and_gradients(config, None)(whole)
    (want_grads,) = pull_back(whole_grads)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    base, _ = loss_and_gradients(config, None)({k: v for k, v in leaves.items() if not is_adapter(k)})
    assert abs(got - base) > 1e-5  # the adapters do something
    assert got_grads.keys() == want_grads.keys()
    for name, want_grad in want_grads.items():
        difference = np.linalg.norm(got_grads[name] - want_grad)
        assert difference <= 1e-5 * np.linalg.norm(want_grad), name


@pytest.mark.parametrize("target", often(TARGETS, lambda target: target in ("attention.output", "moe.w3")))
def test_one_adapter_equals_its_merged_weights(target: str) -> None:
    _, leaves = adapted(SPARSE, ALL)
    silent = {k: v * (k.startswith(f"layers.{target}_lora")) if k.endswith("_lora.b") else v for k, v in leaves.items()}
    assert_equals_merged(SPARSE, ALL, silent)


@pytest.mark.parametrize("lora", [ALL, SOME, LINEAR], ids=["all", "some", "router"])
def test_adapters_equal_their_merged_weights(lora: LoraConfig) -> None:
    assert_equals_merged(SPARSE, lora, adapted(SPARSE, lora)[1])


def test_adapters_of_a_dense_model_equal_their_merged_weights() -> None:
    assert_equals_merged(DENSE, ALL, adapted(DENSE, ALL)[1])


def test_scale() -> None:
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_a_new_adapter_changes_nothing_and_starts_as_in_peft() -> None:
    leaves = flat_params(Mixtral(SPARSE, FP32, key=jax.random.key(0), lora=ALL))
    plain = flat_params(Mixtral(SPARSE, FP32, key=jax.random.key(0)))
    assert {k for k in leaves if not is_adapter(k)} == plain.keys()
    got, want = loss_and_gradients(SPARSE, ALL)(leaves), loss_and_gradients(SPARSE, None)(plain)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for name, value in leaves.items():
        if is_adapter(name) and name.endswith(".a"):  # uniform within 1 / sqrt(inputs)
            inputs = SPARSE.intermediate_size if "w2" in name else 16  # hidden size = heads * head_dim = 16
            assert 0.9 / inputs**0.5 < jnp.max(jnp.abs(value)) <= 1 / inputs**0.5, name


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        (("attention.*",), TARGETS[:4]),
        (("moe.w[13]", "attention.value"), ("attention.value", "moe.w1", "moe.w3")),
        (("*",), TARGETS),
    ],
)
def test_patterns_choose_the_targets(patterns, want) -> None:
    lora = LoraConfig(rank=2, targets=patterns)
    assert tuple(filter(lora.adapts, TARGETS)) == want
    model = nnx.eval_shape(lambda: Mixtral(SPARSE, key=jax.random.key(0), lora=lora))
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert {p for p in paths if is_adapter(p)} == {f"layers.{t}_lora.{m}" for t in want for m in "ab"}
    assert not any("router_lora" in p for p in paths)


def test_names_of_peft_become_ours() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2", "gate"]
    for given in (names, "all-linear", ["all-linear"], ["moe.w1", "all-linear"]):
        lora = LoraConfig(rank=2, targets=given)
        assert {*lora.targets} == {*TARGETS, "gate"}
        assert LoraConfig.model_validate_json(lora.model_dump_json(), strict=True) == lora
    assert LoraConfig(targets=["gate_up_proj", "up_proj", "w1"]).targets == ("moe.w1", "moe.w3")
    assert not LoraConfig().adapts("moe.router") and LoraConfig(targets=("gate",)).adapts("moe.router")
    model = nnx.eval_shape(lambda: Mixtral(DENSE, key=jax.random.key(0), lora=LINEAR))
    assert "router_lora" not in str(nnx.state(model))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'moe\.router' matches none of attention\.query"):
        LoraConfig(targets=("attention.*", "moe.router"))


def test_dropout_keeps_the_mean_and_needs_a_key() -> None:
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 40), (40, 3), (3, 5)))
    plain = low_rank(x, LowRank(a, b, 0.5, 0.3, None))
    np.testing.assert_allclose(plain, 0.5 * x @ a @ b, rtol=2e-5, atol=1e-5)
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.vmap(lambda key: low_rank(x, LowRank(a, b, 0.5, 0.3, key)))(keys)
    error = jnp.std(drawn, axis=0) / np.sqrt(len(keys))
    assert jnp.all(jnp.abs(drawn.mean(0) - plain) < 5 * error)
    # variance of a sum over the inputs of x_i w_i keep_i / (1 - p): p / (1 - p) * sum (x_i w_i)^2
    variance = 0.3 / 0.7 * jnp.einsum("MI,IO->MO", x**2, (0.5 * a @ b) ** 2)
    np.testing.assert_allclose(drawn.var(0), variance, rtol=0.15)


def test_dropout_is_off_without_noise_and_of_the_key_with_it() -> None:
    lora = ALL.model_copy(update={"dropout": 0.5})
    _, leaves = adapted(SPARSE, ALL)
    calm, _ = loss_and_gradients(SPARSE, ALL)(leaves)
    np.testing.assert_allclose(jax.jit(loss)(rebuilt(SPARSE, leaves, lora)), calm, rtol=1e-6)
    noisy = jax.jit(lambda model, key: loss(model, Noise(key)))
    first, again, other = (noisy(rebuilt(SPARSE, leaves, lora), jax.random.key(i)) for i in (0, 0, 1))
    assert first == again
    assert len({float(calm), float(first), float(other)}) == 3


def test_a_mesh_equals_one_device() -> None:
    model, leaves = adapted(SPARSE, ALL)
    want, want_grads = loss_and_gradients(SPARSE, ALL)(leaves)
    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2, fsdp=2))
    graphdef, _ = nnx.split(model)
    placed = jax.device_put(nnx.to_pure_dict(nnx.state(model)), param_shardings(model, mesh))
    with jax.set_mesh(mesh):
        got, got_grads = jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p))))(placed)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    got_flat = flat_params(nnx.merge(graphdef, got_grads))
    assert got_flat.keys() == want_grads.keys()
    for name, value in want_grads.items():
        np.testing.assert_allclose(got_flat[name], value, atol=1e-5, err_msg=name)
        if is_adapter(name):
            assert jnp.linalg.norm(got_flat[name] - value) <= 1e-5 * jnp.linalg.norm(value), name


@pytest.mark.parametrize(
    ("config", "targets"),
    [(SPARSE, ("*",)), (SPARSE, ("moe.w2",)), (DENSE, ("*",))],
    ids=["sparse", "only w2", "dense, window"],
)
def test_cached_decoding_equals_the_full_forward_pass(config, targets) -> None:
    model, _ = adapted(config, LoraConfig(rank=3, alpha=5.0, targets=targets))
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)
    want_BTV = np.asarray(jax.jit(lambda m, t: m(t))(model, tokens_BT))
    pad_B, slots = np.zeros(2, np.int32), config.sliding_window or 12
    logits_BV, cache = jax.jit(prefill, static_argnums=3)(model, tokens_BT[:, :6], pad_B, slots)
    np.testing.assert_allclose(logits_BV, want_BTV[:, 5], atol=1e-5)
    step = jax.jit(decode)
    for t in range(6, 12):
        logits_BV, cache = step(model, cache, tokens_BT[:, t], jnp.int32(t), pad_B, np.ones(2, bool))
        np.testing.assert_allclose(logits_BV, want_BTV[:, t], atol=1e-5)


def test_gradients_of_the_routers_adapter_are_summed_as_those_of_the_router():
    """In fp32, whatever the dtype of the others: on accelerators a sum over `data` would be in bfloat16."""
    compute, lora = ComputeConfig(dtype="bfloat16", reduce_dtype="bfloat16"), LoraConfig(targets=("gate", "q_proj"))
    state = nnx.to_flat_state(nnx.state(abstract_model(SPARSE, compute, lora=lora)))
    wide = {".".join(map(str, path)) for path, v in state if v.get_metadata()["reduce_dtype"] == "float32"}
    assert wide == {"layers.moe.router", "layers.moe.router_lora.a", "layers.moe.router_lora.b"}
