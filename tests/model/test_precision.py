"""Every sum of many small numbers is in fp32 whatever the compute dtype (NUMERICS H1): each sum of the traced step, and
by number where bf16 was seen to go wrong.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.layers import look_up, rms_norm
from mixtral_jax.lora import LoraConfig
from mixtral_jax.model import Mixtral, Noise, abstract_model, next_token_sums, target_logps
from mixtral_jax.moe.balance import balance_loss, z_loss
from mixtral_jax.parallel import MeshConfig, make_mesh
from tests.optional import often
from tests.programs import REDUCTIONS, SUMS, equations

CONFIG = MixtralConfig(
    vocab_size=512, hidden_size=72, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
B, T = 8, 256
MESHES = {
    "one device": {},
    "data fsdp expert": {"data": 2, "fsdp": 2, "expert": 2},
    "tensor context": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
}


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def program(mesh, objective="cross entropy", lora=None, **options):
    """The equations of loss and gradients in bf16."""
    model = abstract_model(CONFIG, ComputeConfig(dtype="bfloat16", **options), lora=lora)
    ids, numbers = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.float32))

    def loss(model, tokens, targets, weights, positions, segments):
        noise = None if lora is None else Noise(jax.random.key(0), 5.0)
        if objective == "cross entropy":
            sums, stats = next_token_sums(model, tokens, targets, weights, positions, segments, noise)
            total = sums.loss_sum
        else:
            logps, stats = target_logps(model, tokens, targets, weights > 0, positions, segments, noise)
            total = jnp.sum(logps)
        return total + balance_loss(stats, "per_layer", 2) + z_loss(stats)

    def trace():
        return list(equations(jax.make_jaxpr(jax.grad(loss))(model, ids, ids, numbers, ids, ids).jaxpr))

    if not mesh:
        return trace()
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        return trace()


LORA = LoraConfig(rank=4, dropout=0.1)
VARIANTS = {
    "as it is": {},
    "ring": {"moe": MoeConfig(transport="ring")},
    "chunks": {"moe": MoeConfig(chunk_tokens=64)},
    "capacity": {"moe": MoeConfig(capacity_factor=1.0)},
    "rounds": {"moe": MoeConfig(buffer_factor=0.5)},
    "rounds of a ring": {"moe": MoeConfig(buffer_factor=0.5, transport="ring", matmul="ragged_dot")},
    "products as on accelerators": {"moe": MoeConfig(matmul="ragged_dot"), "attention": "reference"},
    "all saved": {"remat": "none"},
    "nothing saved": {"remat": "full"},
    "log-probabilities": {"objective": "logps"},
    "adapters": {"lora": LORA},
    "adapters in chunks": {"lora": LORA, "moe": MoeConfig(chunk_tokens=64)},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_sum_of_the_step_is_in_bf16(mesh, variant):
    sums = [e for e in program(MESHES[mesh], **VARIANTS[variant]) if e.name in (*SUMS, "carried_sum")]
    assert len(sums) > 10
    assert not [e for e in sums if e.dtype == "bfloat16"]


@pytest.mark.parametrize("attention", ["chunked", "reference"])
def test_what_layers_save_on_a_cpu_are_stacks_of_bits(attention):
    model = abstract_model(CONFIG, ComputeConfig(dtype="bfloat16", attention=attention))
    ids, numbers = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.float32))
    loss = jax.grad(lambda model, *rows: next_token_sums(model, *rows)[0].loss_sum)
    text = str(jax.make_jaxpr(loss)(model, ids, ids, numbers, ids, ids))
    stacks = set(re.findall(rf"bf16\[{CONFIG.num_hidden_layers},[\d,]+\]", text))
    assert stacks == {f"bf16[3,{B},{T},72]"}  # the residual stream, which the scan itself keeps
    kinds = re.findall(rf"\w+:(\w+)\[3,{B},{T},72\]", text)  # beside it the output of attention
    assert kinds.count("bf16") == kinds.count("u16") > 0


def test_gradients_of_experts_on_a_cpu_are_not_rounded_to_bf16():
    model = Mixtral(CONFIG, ComputeConfig(dtype="bfloat16"), key=jax.random.key(0))
    rows = jnp.ones((1, 64), jnp.int32)

    @jax.jit
    def gradients(model):
        return nnx.grad(lambda model: next_token_sums(model, rows, rows, rows.astype(jnp.float32), rows, rows)[0][0])(
            model
        )

    moe = gradients(model).layers.moe
    for g in (moe.w13[...], moe.w2[...]):
        assert g.dtype == jnp.float32 and (g != g.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
@pytest.mark.parametrize("reduce_dtype", ["bfloat16", "float32"])
def test_gradients_are_summed_over_devices_in_the_dtype_asked_for(mesh, reduce_dtype):
    """All sums over the axes that parameters are replicated on, and all reduce-scatters into their shards."""
    found = [e for e in program(MESHES[mesh], reduce_dtype=reduce_dtype) if e.name in REDUCTIONS]
    assert found
    L, D, E = CONFIG.num_hidden_layers, CONFIG.hidden_size, CONFIG.num_local_experts
    weights = [e for e in found if set(e.axes) & {"data", "fsdp"} and e.size >= D and e.shape != (L, 2 * E + 6)]
    router = {D * E // n for n in (1, 2, 4)}  # whose maths is in fp32 throughout
    assert {len(e.loops) for e in weights} >= {0, 1}  # embedding, head and last norm; those of layers
    for e in weights:
        assert e.dtype == ("float32" if e.size in router else reduce_dtype), e


@pytest.mark.parametrize("transport", ["ring", "alltoall"])
@pytest.mark.parametrize("sizes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "tensor": 4}])
def test_activations_travel_in_the_compute_dtype(transport, sizes):
    """The experts' outputs too, at two bytes a number: over `expert` and over `tensor`."""
    found = program({"data": 1, **sizes}, moe=MoeConfig(transport=transport))
    wide = ("all_gather", "all_gather_invariant", "ragged_all_to_all", "all_to_all", *REDUCTIONS)
    rows = [e for e in found if e.name in wide and e.shape and e.shape[-1] == CONFIG.hidden_size and e.loops]
    assert rows and {e.dtype for e in rows} == {"bfloat16"}


def test_router_statistics_are_summed_once_behind_the_layers():
    """One all-reduce of all layers' numbers, none inside the loop over layers."""
    mesh, E, L = MESHES["data fsdp expert"], CONFIG.num_local_experts, CONFIG.num_hidden_layers
    found = [e for e in program(mesh) if e.name in REDUCTIONS and "fsdp" in e.axes and e.dtype == "float32"]
    assert [e.shape for e in found if not e.loops and e.size > 1] == [(L, 2 * E + 6)]
    assert not [e for e in found if e.loops and e.size <= 2 * E]


# ---- by number -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_frequent_token_keeps_growing():
    V, D, M = 64, 32, 16384
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(np.where(rng.random(M) < 0.5, 5, rng.integers(0, V, M)), jnp.int32)[None]
    g = jnp.asarray(rng.normal(1, 1, (1, M, D)), jnp.bfloat16)

    def gradient(dtype):
        w = jnp.zeros((V, D), jnp.float32)
        return jax.grad(lambda w: jnp.sum(look_up(w.astype(dtype), tokens).astype(jnp.float32) * g))(w)

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    assert relative(rounded[5], exact[5]) < 0.004 and relative(rounded, exact) < 0.004


def test_the_gradient_of_a_norm_scale_is_added_in_fp32_and_its_value_rounds_as_before():
    x, scale, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((16384, 48), (48,), (16384, 48))))
    x, g = x.astype(jnp.bfloat16), (g + 1).astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda s: rms_norm(x, s, 1e-5), scale)
    _, pull_want = jax.vjp(lambda s: rms_norm(x.astype(jnp.float32), s, 1e-5), scale)
    unit = rms_norm(x, jnp.ones_like(scale), 1e-5)
    np.testing.assert_array_equal(y, unit * scale.astype(jnp.bfloat16)[None])
    assert relative(pull(g)[0], pull_want(g.astype(jnp.float32))[0]) < 0.006


@pytest.mark.parametrize("chunk", often([None, 256, 32], lambda chunk: chunk == 32))
def test_the_experts_gradients_do_not_get_worse_with_more_chunks(chunk):
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.3, (B, T)) % 512).astype(np.int32)
    rows = (tokens, np.roll(tokens, -1, 1), np.ones((B, T), np.float32))
    routing = Mixtral(CONFIG, ComputeConfig(dtype="float32"), key=jax.random.key(0)).routing(tokens)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), np.ones((B, T), np.int32)

    def gradients(dtype, chunk):
        compute = ComputeConfig(dtype=dtype, remat="full", moe=MoeConfig(chunk_tokens=chunk))
        model = Mixtral(CONFIG, compute, key=jax.random.key(0))
        loss = lambda m: next_token_sums(m, *rows, *places, routing=routing)[0].loss_sum / (B * T)  # noqa: E731 - short
        return nnx.to_pure_dict(nnx.state(jax.jit(jax.grad(loss))(model)))["layers"]["moe"]

    exact, rounded = gradients("float32", None), gradients("bfloat16", chunk)
    for name in ("w13", "w2", "router"):
        assert relative(rounded[name], exact[name]) < 0.02, name
