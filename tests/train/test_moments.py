"""Moments in bf16 and in 8-bit blocks, against numpy twins; that they follow, lie, move and resume as fp32 ones do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mixtral_jax import checkpoint
from mixtral_jax.checkpoint import tree_shapes
from mixtral_jax.checkpoint.slices import ArrayReader
from mixtral_jax.config import MixtralConfig
from mixtral_jax.lora import LoraConfig
from mixtral_jax.model import abstract_model
from mixtral_jax.parallel import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import GATHERED
from mixtral_jax.train import moments, trainer
from mixtral_jax.train.checkpoints import Found, restore_state
from mixtral_jax.train.optimizer import OptimizerConfig, apply_gradients, init_optimizer, make_optimizer
from mixtral_jax.train.plan.chips import parse_topology
from mixtral_jax.train.plan.compile import missing_compiler, plan_mesh
from mixtral_jax.train.state import abstract_state, create_state
from tests.oracles import moments as twin

LAYERS = {"moe": {"w13": (2, 1, 2, 2, 64), "w2": (2, 1, 64, 4)}, "norm": {"scale": (2, 4)}}
SHAPES = {"layers": LAYERS, "head": {"weight": (4, 48)}}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def spread(seed, shape):
    """Numbers of all sizes, some 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-45, 10, shape)) * (rng.random(shape) > 0.1)
    return x.astype(np.float32)


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_blocks_are_those_of_the_twin(name):
    shape, axis = LAYERS["moe"][name], {"w13": 4, "w2": 2}[name]
    m, v = spread(0, shape), np.square(spread(1, shape))
    m[0, 0], v[0, 0] = 0, 0
    held = moments.zeros({"layers": {"moe": {name: jnp.asarray(m)}}}, "int8")
    key = jax.random.key(7)
    got = moments.write(*({"layers": {"moe": {name: jnp.asarray(x)}}} for x in (m, v)), held, key)
    random = np.asarray(jax.random.bits(jax.random.fold_in(key, 0), shape, jnp.uint32))
    for x, r, table, stored in (
        (m, random & 0xFFFF, twin.M_LEVELS, got[0]), (v, random >> 16, twin.V_LEVELS, got[1])
    ):  # fmt: skip
        stored, read = (t["layers"]["moe"][name] for t in (stored, moments.read(stored)))
        codes, scales, read, x, r = (np.moveaxis(a, axis, -1) for a in (stored.codes, stored.scales, read, x, r))
        assert scales.shape[-1] == 2  # blocks of 32
        for place in np.ndindex(scales.shape):
            block = (*place[:-1], slice(32 * place[-1], 32 * place[-1] + 32))
            expected, scale = twin.block_write(x[block], r[block], table)
            assert scales[place] == scale
            np.testing.assert_array_equal(codes[block], expected)
            np.testing.assert_allclose(read[block], twin.block_read(expected, scale, table), rtol=1e-6, atol=1e-45)


def test_bfloat16_is_that_of_the_twin():
    x = spread(0, (64,))
    held = moments.zeros({"head": {"weight": x}}, "bfloat16")
    key = jax.random.key(3)
    m, v = moments.write({"head": {"weight": x}}, {"head": {"weight": x * x}}, held, key)
    random = np.asarray(jax.random.bits(jax.random.fold_in(key, 0), x.shape, jnp.uint32))
    for got, y, r in ((m, x, random & 0xFFFF), (v, x * x, random >> 16)):
        expected = [twin.bfloat16(*pair) for pair in zip(y, map(int, r), strict=True)]
        np.testing.assert_array_equal(moments.read(got)["head"]["weight"], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_is_kept_is_right_in_the_mean(dtype):
    rng = np.random.default_rng(0)
    size, sign = np.exp2(rng.uniform(-10, 0, (1, 2, 4, 64))), rng.choice([-1, 1], (1, 2, 4, 64))
    m = jnp.asarray(size * sign, jnp.float32)
    trees = [{"layers": {"query": x}} for x in (m, m * m)]
    held = moments.zeros(trees[0], dtype)
    kept = jax.vmap(lambda key: moments.read(moments.write(*trees, held, key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    for got, exact in zip(kept, trees, strict=True):
        half = {"bfloat16": 2**-8, "int8": 2**-4}[dtype]  # of the distance of two levels, relative, at the most
        mean, exact = np.asarray(got["layers"]["query"], np.float64).mean(0), exact["layers"]["query"]
        np.testing.assert_allclose(mean, exact, rtol=5 * half / np.sqrt(4000))


def follow(dtype, b2, steps, value):
    """A second moment of 1 under gradients whose square is always `value`, as a share of what it should be."""
    shape = (1, 8, 64)
    held = moments.zeros({"layers": {"query": jnp.zeros(shape)}}, dtype)
    held = moments.write(*({"layers": {"query": jnp.ones(shape)}},) * 2, held, jax.random.key(0))

    def step(held, key):
        m, v = moments.read(held)
        v = jax.tree.map(lambda v: b2 * v + (1 - b2) * value, v)
        return moments.write(m, v, held, key), None

    (_, v), _ = jax.lax.scan(step, held, jax.random.split(jax.random.key(1), steps))
    expected = b2**steps + (1 - b2**steps) * value
    return float(jnp.mean(moments.read(v)["layers"]["query"])) / expected


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("b2", "steps"), [(0.95, 40), (0.999, 2000)])
@pytest.mark.parametrize("value", [0.1, 3.0])
def test_a_second_moment_follows_its_gradients(dtype, b2, steps, value):
    assert follow(dtype, b2, steps, value) == pytest.approx(1, rel=0.03)


def test_rounded_to_nearest_it_would_never_fall():
    """Why rounding is stochastic: at b2 = 0.999 a bf16 stays where it is, 7 times as large as it should be."""
    v = jnp.ones((), jnp.bfloat16)
    for _ in range(10):
        v = (0.999 * v.astype(jnp.float32) + 0.001 * 0.0).astype(jnp.bfloat16)
    assert v == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_one_update_from_nothing_is_that_of_fp32(dtype):
    """What is kept is rounded; the update itself is not."""
    results = []
    for state_dtype in ("float32", dtype):
        optimizer = make_optimizer(OptimizerConfig(state_dtype=state_dtype, schedule="constant"), 10, 0.5)
        params = tree(0)
        state = init_optimizer(optimizer, params)
        results.append(jax.jit(apply_gradients, static_argnums=0)(
            optimizer, params, state, tree(1), jnp.float32(1), jnp.int32(1)))  # fmt: skip
    for a, b in zip(*(jax.tree.leaves(r.params) for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_two_hundred_updates_end_where_fp32_ends(dtype):
    """A quadratic bowl with noise: the way down is the same within the noise of rounding."""
    ends = []
    for state_dtype in ("float32", dtype):
        config = OptimizerConfig(
            state_dtype=state_dtype, learning_rate=0.02, schedule="linear", weight_decay=0.0, b2=0.99
        )
        optimizer = make_optimizer(config, 200)

        def step(carry, n, optimizer=optimizer):
            params, state = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), n), (64,))[0]
            grads = jax.tree.map(lambda p: p * (1 + 0.3 * noise), params)
            applied = apply_gradients(optimizer, params, state, grads, jnp.float32(1), n)
            return (applied.params, applied.state), norm(params)

        params = tree(0)
        _, norms = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, jnp.arange(1, 201)))(
            (params, init_optimizer(optimizer, params))
        )
        ends.append(np.asarray(norms))
    np.testing.assert_allclose(ends[1], ends[0], rtol=0.03, atol=0.02 * ends[0][0])


def norm(params):
    return jnp.sqrt(sum(jnp.sum(p * p) for p in jax.tree.leaves(params)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_update_works_in_place_and_layer_by_layer(dtype):
    optimizer = make_optimizer(OptimizerConfig(state_dtype=dtype), 10)
    params = {"layers": {"moe": {"w2": jnp.ones((16, 2, 256, 64))}}, "head": {"weight": jnp.ones((8, 8))}}
    state = init_optimizer(optimizer, params)

    def update(params, state, grads):
        applied = apply_gradients(optimizer, params, state, grads, jnp.float32(1), jnp.int32(1))
        return applied.params, applied.state

    memory = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    layer = 2 * 256 * 64 * 4
    assert memory.alias_size_in_bytes >= 16 * layer * (1.5 if dtype == "int8" else 2)
    # of 32 layers of both moments; XLA on the CPU keeps copies of all codes besides, a quarter of that
    assert memory.temp_size_in_bytes < {"bfloat16": 8, "int8": 16}[dtype] * layer


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "mixtral-8x22b", "mistral-7b", "tiny"])
def test_blocks_lie_along_what_fsdp_does_not_cut_and_tensor_cuts_in_whole_ones(preset):
    model = abstract_model(MixtralConfig.preset(preset), lora=LoraConfig(rank=64))
    whole = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        block = moments.block_of(path, variable.shape)
        if block is None:
            continue
        whole += 1
        axis, length = block
        assert variable.get_metadata()["axes"][axis] not in (*GATHERED, "experts", "layers")
        if preset != "tiny" and variable.get_metadata()["axes"][axis] == "ffn":
            assert variable.shape[axis] // 8 % length == 0 and length >= 64
    assert whole >= 10


@pytest.mark.parametrize(
    ("then", "now"),
    [("bfloat16", "bfloat16"), ("int8", "int8"), ("float32", "int8"), ("bfloat16", "int8"), ("int8", "float32")],
)
def test_a_checkpoint_comes_back_as_it_was_or_as_it_is_to_be_held(tmp_path, then, now):
    optimizers = {dtype: make_optimizer(OptimizerConfig(state_dtype=dtype), 10) for dtype in (then, now)}
    params = tree(0)
    state = create_state(params, optimizers[then])
    held = moments.write(tree(1), jax.tree.map(jnp.square, tree(2)), state.optimizer.moments[0][1:], jax.random.key(0))
    adam, *others = state.optimizer.moments
    state = state._replace(optimizer=state.optimizer._replace(moments=(adam._replace(mu=held[0], nu=held[1]), *others)))
    checkpoint.save(tmp_path / "1", state)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    abstract = abstract_state(shapes, optimizers[now])
    found = Found(1, tmp_path / "1", {}, {"config": {"optimizer": {"state_dtype": then}}})
    restored = restore_state(found, abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), restored) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    if then == now:
        jax.tree.map(np.testing.assert_array_equal, restored, state)
    got, exact = (moments.read(s.optimizer.moments[0][1:]) for s in (restored, state))
    kinds = {then, now} - {"float32"}
    rtol = 0 if not kinds or then == now else 0.14 if "int8" in kinds else 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 1e-3), got, exact)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_update_on_a_mesh_is_that_of_one_device_and_blocks_stay_where_they_are(mesh, dtype):
    """Bit for bit, the random bits too; and nothing but the gradient norm crosses the devices."""
    optimizer = make_optimizer(OptimizerConfig(state_dtype=dtype, max_grad_norm=None), 10)
    shapes = {"layers": {"moe": {"w13": (2, 2, 4, 2, 128), "w2": (2, 2, 128, 4)}}, "norm": {"scale": (4,)}}
    specs = {"layers": {"moe": {"w13": P(None, "expert", "fsdp", None, "tensor"),
                                "w2": P(None, "expert", "tensor", "fsdp")}}, "norm": {"scale": P()}}  # fmt: skip
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731 - short
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda shape: rng.standard_normal(shape).astype(np.float32), shapes, is_leaf=is_leaf)
        for _ in range(2)
    )
    place = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    abstract = abstract_state(
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, place), optimizer
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if dtype == "int8":
        assert shardings.optimizer.moments[0].nu["layers"]["moe"]["w2"].scales.spec == P(
            None, "expert", "tensor", "fsdp"
        )

    def update(state, grads):
        applied = apply_gradients(optimizer, state.params, state.optimizer, grads, jnp.float32(1), state.step + 1)
        return state._replace(step=state.step + 1, params=applied.params, optimizer=applied.state)

    ends = []
    for placed in (None, (shardings, place)):
        step = jax.jit(update, **({} if placed is None else {"in_shardings": placed, "out_shardings": shardings}))
        state = create_state(jax.tree.map(jnp.asarray, params), optimizer)
        if placed is not None:
            text = step.lower(abstract, grads).compile().as_text()
            assert not any(f" {kind}(" in text for kind in ("all-gather", "all-to-all", "collective-permute"))
            state = jax.device_put(state, shardings)
        for _ in range(3):
            state = step(state, grads)
        ends.append(jax.device_get((state.params, state.optimizer.moments)))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_run_that_resumes_has_the_state_of_one_that_was_not_stopped(make_config, monkeypatch):
    """Bit for bit, codes and scales too; then as fp32, which is said."""
    monkeypatch.setattr(trainer, "make_mesh", lambda config: None)
    model, settings, ends = {"intermediate_size": 64}, {"schedule": "constant", "warmup_steps": 0}, []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            config = make_config(run_name=name, steps=steps, model=model, optimizer={"state_dtype": "int8", **settings})
            assert trainer.run(config) == 0
        ends.append(ArrayReader(config.run_dir / "checkpoints" / "4"))
    whole, parts = ends
    assert any(".codes" in name for name in whole.names) and set(whole.names) == set(parts.names)
    for name in whole.names:
        np.testing.assert_array_equal(whole.read(name, ()), parts.read(name, ()))
    assert trainer.run(make_config(run_name="parts", steps=5, model=model, optimizer=settings)) == 0
    said = (config.run_dir / "logs" / "process_0.log").read_text()
    assert 'changed optimizer.state_dtype: "int8" -> "float32"' in said
    state = ArrayReader(config.run_dir / "checkpoints" / "5")
    assert not any(".codes" in name for name in state.names)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["v5e-8", "h100-8"])
def test_no_accelerator_copies_the_state(make_config, name, dtype):
    """Compiled, never run. A cond around the update made a GPU copy all of it: temporaries of 9 bytes of every 9."""
    topology = parse_topology(name)
    if reason := missing_compiler(topology):
        pytest.skip(reason)
    devices = plan_mesh(make_config(mesh={"data": 1, "fsdp": 8}), topology)
    place = jax.sharding.NamedSharding(devices, P(None, "expert", "tensor", "fsdp"))
    params = {"layers": {"moe": {"w2": jax.ShapeDtypeStruct((16, 8, 1792, 1024), jnp.float32, sharding=place)}}}
    optimizer = make_optimizer(OptimizerConfig(state_dtype=dtype), 10)
    state = abstract_state(params, optimizer)

    def update(state, grads):
        applied = apply_gradients(optimizer, state.params, state.optimizer, grads, jnp.float32(1), state.step + 1)
        return state._replace(step=state.step + 1, params=applied.params, optimizer=applied.state)

    with jax.set_mesh(devices):
        traced = jax.jit(update, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, state)).trace(
            state, params
        )
        platform = "cuda" if topology.is_gpu else "tpu"
        memory = traced.lower(lowering_platforms=(platform,)).compile().memory_analysis()
    layer = 8 * 1792 * 1024 * 4 / 8
    assert memory.temp_size_in_bytes < 7 * layer  # of one moment of 16 layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {"lora": {"rank": 32}, "optimizer": {"state_dtype": "int8", "skip_spikes": 3.0}}),
        ("sft", {"router": {"update": "frozen"}, "optimizer": {"state_dtype": "int8", "max_grad_norm": None}}),
        ("dpo", {"router": {"update": 0.1}, "optimizer": {"state_dtype": "bfloat16"}}),
        ("dpo", {"lora": {"rank": 32}, "optimizer": {"state_dtype": "int8"}}),
    ],
)
def test_every_way_to_tune_runs_with_them(make_tuning_config, monkeypatch, stage, changes):
    monkeypatch.setattr(trainer, "make_mesh", lambda config: None)
    config = make_tuning_config(stage, model={"intermediate_size": 64}, **changes)
    assert trainer.run(config) == 0
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
    step = max(int(path.name) for path in (config.run_dir / "checkpoints").iterdir() if path.name.isdigit())
    dtypes = {dtype for _, dtype in tree_shapes(config.run_dir / "checkpoints" / str(step)).values()}
    assert ({"int8", "uint8"} if changes["optimizer"]["state_dtype"] == "int8" else {"bfloat16"}) <= dtypes
