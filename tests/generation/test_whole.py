"""Generation on a mesh gathers the weights once per call, and gives the tokens of one device."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import ComputeConfig
from mixtral_jax.generation import engine
from mixtral_jax.generation.cache import decode
from mixtral_jax.generation.engine import generate, stream
from mixtral_jax.generation.few_rows import take_apart
from mixtral_jax.generation.sampling import make_sampler
from mixtral_jax.lora import LoraConfig
from mixtral_jax.model import Mixtral
from mixtral_jax.parallel import whole
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import param_shardings
from tests.tiny import tiny_config

PROMPTS = [[1, 5, 9], [1, *range(20, 31)], [3]]
MESHES = {
    "fsdp8": dict(data=1, fsdp=8),
    "fsdp2-expert2-tensor2": dict(data=1, fsdp=2, expert=2, tensor=2),
    "data2-fsdp4": dict(data=2, fsdp=4),
}


def model_for(name: str) -> Mixtral:
    """Of each kind of weights one: a tied head, blocks of 4 bits with adapters and an odd vocabulary, bf16 maths."""
    key = jax.random.key(1)
    if name == "fsdp8":
        return Mixtral(tiny_config(tie_word_embeddings=True), key=key)
    if name == "data2-fsdp4":
        return Mixtral(tiny_config(), ComputeConfig(dtype="bfloat16"), key=key)
    model = Mixtral(tiny_config(vocab_size=97), key=key, lora=LoraConfig(base_dtype="nf4", base_block=4, rank=2))
    for adapter in (model.layers.attention.query_lora, model.layers.moe.w1_lora):
        adapter.b[...] = 0.1 * jax.random.normal(key, adapter.b.shape)
    return model


def placed(model: Mixtral, mesh: jax.sharding.Mesh) -> Mixtral:
    shardings = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(param_shardings(model, mesh)))
    return jax.tree.map(jax.device_put, model, shardings)


def gathers_in_loop(model: Mixtral, rows: engine.Aligned, slots: int) -> list[tuple[int, ...]]:
    """Shapes of what is gathered inside the loop over tokens."""
    run = partial(engine._run, slots=slots, columns=16)
    program = jax.make_jaxpr(run)(model, None, rows, make_sampler(), jnp.int32(4)).jaxpr
    loops = [e for e in equations(program) if e.primitive.name == "while"]
    inside = [e for loop in loops for e in equations(loop.params["body_jaxpr"].jaxpr)]
    return [e.outvars[0].aval.shape for e in inside if e.primitive.name.startswith("all_gather")]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of it, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    "name", ["fsdp8", "fsdp2-expert2-tensor2", pytest.param("data2-fsdp4", marks=pytest.mark.slow)]
)
def test_weights_are_gathered_once_and_tokens_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = model_for(name), make_mesh(MeshConfig(**MESHES[name]))
    options = dict(max_new_tokens=4, eos_id=5)
    monkeypatch.setattr(
        engine, "wants_apart", lambda *_: not jax.sharding.get_abstract_mesh().empty
    )  # but on a mesh never
    want, drawn = generate(model, PROMPTS, **options), generate(model, PROMPTS, temperature=1.0, **options)
    with jax.set_mesh(mesh):
        own = placed(model, mesh)
        assert generate(own, PROMPTS, **options) == want
        assert generate(own, PROMPTS, temperature=1.0, **options) == drawn
        if name == "fsdp8":
            steps = [
                [t for t in column if t is not None] for column in zip(*stream(own, PROMPTS, **options), strict=True)
            ]
            assert steps == want

        rows, slots = engine._right_align(engine._read_prompts(own, PROMPTS, None, 5, None), 16)
        matrices = {p.shape[1:] for _, p in nnx.to_flat_state(nnx.state(model.layers)) if p.ndim > 2}
        assert engine._ready(own, rows, slots, 16)[1] is None
        layer_by_layer = gathers_in_loop(own, rows, slots)
        once = gathers_in_loop(engine._ready(own, rows, slots, 16)[0], rows, slots)
        of_tokens = 4 * (MESHES[name].get("expert", 1) > 1)  # to experts elsewhere: sizes, rows, and rows back
        assert len(layer_by_layer) > 8
        assert len(once) == of_tokens and not matrices & set(once)
        monkeypatch.setattr(whole, "free_memory", lambda: 1000.0)
        assert gathers_in_loop(engine._ready(own, rows, slots, 16)[0], rows, slots) == layer_by_layer


@pytest.mark.parametrize("name", MESHES)
def test_what_gathered_weights_take_is_known_beforehand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = model_for(name), make_mesh(MeshConfig(**MESHES[name]))
    dtype = jnp.dtype(model.compute.dtype if model.compute.dtype != "auto" else "float32")
    with jax.set_mesh(mesh):
        own = placed(model, mesh)
        made = whole.gathered(own, dtype, beside=0)
        taken, shared = 0, 0
        for new, old in zip(jax.tree.leaves(made), jax.tree.leaves(own), strict=True):
            shard = new.addressable_shards[0].data
            if shard.unsafe_buffer_pointer() != old.addressable_shards[0].data.unsafe_buffer_pointer():
                taken += shard.nbytes
            else:
                shared += 1
        assert shared >= 3  # the norms at least
        for free, is_made in ((taken + 7, True), (taken + 6, False)):
            monkeypatch.setattr(whole, "free_memory", lambda free=free: free)
            again = whole.gathered(own, dtype, beside=7)
            assert (again is not own) == is_made


def test_free_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "host_memory", lambda: 8000.0)
    assert whole.free_memory() == pytest.approx(900)  # of eight devices of one host
    full = [dict(bytes_limit=1000, bytes_in_use=used) for used in (100, 700, 300)]
    kind = {"platform": "gpu"}
    devices = [type("Device", (), {**kind, "memory_stats": lambda self, s=s: s})() for s in full]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert whole.free_memory() == pytest.approx(200)


def test_the_memory_of_a_host_ends_where_a_control_group_does(tmp_path: Path) -> None:
    def write(**files: str) -> None:
        for name, text in files.items():
            file = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    assert 0 < whole.host_memory() < 1e14
    assert whole.host_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2  # no Linux
    write(proc__meminfo="MemTotal:  900 kB\nMemAvailable:   500 kB\nHugePages_Total:       0\n")
    assert whole.host_memory(tmp_path) == 500 * 1024
    write(proc__self__cgroup="0::/\n", sys__fs__cgroup__memory_dot_max="900\n")  # which does not say what it holds
    assert whole.host_memory(tmp_path) == 500 * 1024
    write(sys__fs__cgroup__memory_dot_max="max\n")  # no limit
    write(sys__fs__cgroup__memory_dot_current="70000\n")
    assert whole.host_memory(tmp_path) == 500 * 1024
    write(sys__fs__cgroup__memory_dot_max="100000\n", sys__fs__cgroup__memory_dot_stat="anon 3\ninactive_file 25000\n")
    assert whole.host_memory(tmp_path) == 55000
    write(proc__self__cgroup="0::/job/step\n", sys__fs__cgroup__job__memory_dot_max="80000\n")  # a job's within
    write(sys__fs__cgroup__job__memory_dot_current="60000\n")
    assert whole.host_memory(tmp_path) == 20000
    old = "sys__fs__cgroup__memory__memory_dot_"
    write(proc__self__cgroup="4:cpu,memory:/gone\n1:name=systemd:/\n", **{f"{old}limit_in_bytes": "9000\n"})
    write(**{f"{old}usage_in_bytes": "8000\n", f"{old}stat": "total_inactive_file 200\ninactive_file 1\n"})
    assert whole.host_memory(tmp_path) == 1200


@pytest.mark.parametrize("rows", [1, 9])  # one, which is multiplied as two
@pytest.mark.parametrize("name", ["fsdp8", "fsdp2-expert2-tensor2", "data2-fsdp4", "dense", "window"])
def test_layers_taken_apart_give_the_tokens_of_their_stack(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"dense": dict(num_local_experts=1, num_experts_per_tok=1), "window": dict(sliding_window=5)}
    model = Mixtral(tiny_config(**own[name]), key=jax.random.key(1)) if name in own else model_for(name)
    prompts, taken, seen = [[1, 5, 9 + i] for i in range(rows)], [], []
    monkeypatch.setattr(engine, "wants_apart", lambda *_: True)
    monkeypatch.setattr(engine, "take_apart", lambda model: taken.append(take_apart(model)) or taken[-1])
    for free in (1e12, 1000.0):  # all rows read the same tokens: the choice between two alike is left to rounding
        monkeypatch.setattr(engine, "free_memory", lambda free=free: free)
        request = engine._read_prompts(model, prompts, None, None, None)
        batch, slots = engine._right_align(request, 16)
        ready, sampler = engine._ready(model, batch, slots, 16), make_sampler()
        state, _ = engine._start(*ready, batch, sampler, slots=slots)
        for token in (7, 8, 9):
            live_B = np.arange(rows) < max(rows - 8 * (token == 9), 1)  # at the end one alone
            held = state.cache, jnp.full(rows, token), jnp.int32(9 + token), batch.pad_B, live_B
            logits_BV, cache = jax.jit(decode)(ready[0], *held, ready[1])
            state = state._replace(cache=cache)
            seen.append(logits_BV[live_B])
    assert len(taken) == 1
    is_bf16 = model.compute.dtype == "bfloat16"
    for got, want in zip(seen[:3], seen[3:], strict=True):
        np.testing.assert_allclose(got, want, atol=0.02 if is_bf16 else 1e-6)
    monkeypatch.setattr(engine, "free_memory", lambda: 1e12)
    streamed = zip(*stream(model, prompts, max_new_tokens=6), strict=True)
    assert generate(model, prompts, max_new_tokens=6) == [list(row) for row in streamed] and len(taken) == 3
    blocks, experts = (jax.tree.leaves(part) for part in taken[0])
    params = [p for _, p in nnx.to_flat_state(nnx.state(model.layers))]
    assert sum(w.size for w in blocks) == sum(p.size for p in params if "experts" not in p.axes)  # and nothing twice
    assert {w.dtype for w in experts} == {jnp.dtype(model.compute.dtype if is_bf16 else "float32")}
    codes = any(p.dtype == jnp.uint8 for p in params)
    assert codes or sum(w.size for w in experts) == sum(p.size for p in params if "experts" in p.axes)


@pytest.mark.parametrize("mesh", [None, "fsdp8"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids="-to-".join)
def test_a_model_that_was_cast_once_is_the_same(dtypes: tuple[str, str], mesh: str | None) -> None:
    stored, computed = map(jnp.dtype, dtypes)
    lora = LoraConfig(rank=2, targets=["all-linear", "gate"])
    model = Mixtral(
        tiny_config(), ComputeConfig(dtype=computed.name), key=jax.random.key(1), param_dtype=stored, lora=lora
    )
    for path, p in nnx.to_flat_state(nnx.state(model)):  # everything has digits that bf16 rounds away
        p[...] += (0.1 * jax.random.normal(jax.random.key(len(path)), p.shape)).astype(p.dtype)
    with jax.set_mesh(make_mesh(MeshConfig(**MESHES[mesh]))) if mesh else nullcontext():
        once = whole.gathered(model, computed, beside=0)
        exact = ("norm.scale", "moe.router", "moe.router_lora.a", "moe.router_lora.b")
        for path, p in nnx.to_flat_state(nnx.state(once)):
            assert p.dtype == (stored if ".".join(path).endswith(exact) else computed), path
        np.testing.assert_array_equal(once([[1, 5, 9, 4, 7, 3, 2, 6]] * 8), model([[1, 5, 9, 4, 7, 3, 2, 6]] * 8))
