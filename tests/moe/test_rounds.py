"""A bounded buffer of rows gives the numbers of the unbounded one, in as many rounds as it takes (NUMERICS H5)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import ComputeConfig, MoeConfig
from mixtral_jax.lora import LoraConfig
from mixtral_jax.model import abstract_model, next_token_sums
from mixtral_jax.moe import transport
from mixtral_jax.moe.experts import ExpertWeights, grouped_swiglu
from mixtral_jax.moe.transport import buffer_of, exchange_experts
from mixtral_jax.parallel.collectives import varying
from mixtral_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from tests.mesh_cases import CONFIG, FAST_TO_COMPILE, make_batches
from tests.optional import often
from tests.oracles import moe as oracle
from tests.programs import equations

E, C, DEVICES = 8, 2, 8
LOADS = ("even", "mixed", "padding", "one device without a token", "one expert", "one group", "nobody")


class Case(NamedTuple):
    """What is compiled."""

    expert: int = 8  # devices along that axis; the others are along data
    transport: str = "alltoall"
    factor: float | None = None
    dtype: str = "float32"
    sizes: tuple[int, int, int] = (8, 8, 4)  # tokens of a device, D, F


def numbers(load, case):
    """(w13, w2, x, gate, incoming gradient, experts) of all devices together."""
    rng = np.random.default_rng(0)
    M, D, F = case.sizes
    tokens = M * DEVICES
    w13, w2 = (rng.normal(0, 0.5, s).astype(np.float32) for s in ((E, D, 2 * F), (E, F, D)))
    x, g = rng.normal(0, 1, (2, tokens, D)).astype(np.float32)
    gate = rng.random((tokens, C)).astype(np.float32)
    expert = np.stack([rng.permutation(E)[:C] for _ in range(tokens)])
    even = np.arange(tokens * C).reshape(tokens, C) % E
    if load == "even":
        expert = even
    if load == "padding":
        expert[rng.random(tokens) < 0.4] = E
    if load == "one device without a token":
        expert[M : 2 * M] = E
    if load == "one expert":
        expert[:] = (3, E)
    if load == "one group":  # of the devices along data: all others have an even load
        expert = np.where(np.arange(tokens)[:, None] < tokens // 2, (3, 4), even)
    if load == "nobody":
        expert[:] = E
    return w13, w2, x, gate, g, expert.astype(np.int32)


def make(case, capacity=None):
    """(value of the exchange, its second value by device), gradients by both matrices, x and the gates."""
    mesh = make_mesh(MeshConfig(data=-1, expert=case.expert))

    def local(w13, w2, x, gate, g, expert):
        def run(weights, x, gate, sizes):
            return grouped_swiglu(x, gate, weights, sizes, "blocked")

        def loss(w13, w2, x, gate):
            weights = ExpertWeights(*(varying(w, TOKEN_AXES) for w in (w13, w2)))
            y, again = exchange_experts(
                weights, x, expert, gate, run,
                experts=E, transport=case.transport, capacity=capacity, factor=case.factor,
            )  # fmt: skip
            return jnp.sum(y.astype(jnp.float32) * g), (y, again[None])

        (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(w13, w2, x, gate)
        return aux, grads

    rows, own = P(TOKEN_AXES), P("expert")
    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(own, own, *(rows,) * 4), out_specs=((rows, rows), (own, own, rows, rows))
        )
    )


compiled = functools.cache(make)


def arguments(case, load):
    w13, w2, x, *rest = numbers(load, case)
    return *(jnp.asarray(a, case.dtype) for a in (w13, w2, x)), *rest


def result(case, load):
    return jax.device_get(compiled(case)(*arguments(case, load)))


CASES = [
    *(Case(factor=factor) for factor in (0.25, 1.0, 1.5)),
    Case(expert=4, factor=1.0), Case(expert=2, factor=1.5), Case(transport="ring", factor=0.5),
    Case(expert=1, factor=0.3),
]  # fmt: skip


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "case",
    often(CASES, lambda c: c.expert != 8 or c.factor in (1.0, 0.5)),
    ids=lambda c: f"{c.transport}-expert{c.expert}-{c.factor}",
)
def test_rounds_change_no_number(case, load):
    """Values bit for bit, gradients to 1e-5, and how many of a device's rows went in a second round is known."""
    (y, again), grads = result(case, load)
    (want, none), want_grads = result(case._replace(factor=None), load)
    np.testing.assert_array_equal(y, want)
    for got, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5)
    expert = numbers(load, case)[-1].reshape(DEVICES, -1)
    rounds = oracle.rounds(expert.reshape(-1, case.expert, expert.shape[1]), E, case.factor)
    np.testing.assert_array_equal(again, (expert < E).sum(1) * (rounds > 1))
    assert not none.any()


def test_the_loads_fill_one_buffer_and_more():
    """What the test above compares: rounds by load at an even load's buffer, and where one group needs more."""
    rounds = {load: oracle.rounds(numbers(load, Case())[-1].reshape(1, 8, -1), E, 1.0) for load in LOADS}
    assert list(rounds.values()) == [1, 2, 1, 2, 4, 3, 1]
    both = numbers("one group", Case(expert=4))[-1].reshape(2, 4, -1)
    assert [oracle.rounds(group[None], E, 1.0) for group in both] == [2, 1]


def test_buffers_written_out():
    assert buffer_of(8192, 2, 8, 8) == (65536, 65536)  # 8 devices may all send every token here
    assert buffer_of(8192, 2, 8, 8, factor=1.5) == (24576, 65536)
    assert buffer_of(8192, 2, 8, 2, factor=1.5) == (24576, 32768)  # of 4 experts here each token has chosen 2 at most
    assert buffer_of(8192, 2, 8, 2, factor=3) == (32768, 32768)
    assert buffer_of(100, 2, 8, 1, factor=1) == (200, 200)
    assert buffer_of(100, 2, 8, 8, capacity=25, factor=0.3) == (60, 200)


def test_a_capacity_and_a_buffer_together():
    """The capacity bounds what is sent: here 2 rows to an expert from a device, and so 16 in all, of 64 without."""
    case = Case(factor=0.3)
    w13, w2, x, gate, g, expert = numbers("one expert", case)
    expert[np.arange(len(expert)) % case.sizes[0] >= 2] = E  # what limit_capacity leaves
    args = (w13, w2, x, gate, g, expert)
    (y, again), grads = jax.device_get(make(case, capacity=2)(*args))
    (want, _), want_grads = jax.device_get(compiled(case._replace(factor=None))(*args))
    np.testing.assert_array_equal(y, want)
    for got, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5)
    assert again.tolist() == [2] * 8


def test_gradients_of_matrices_are_added_over_rounds_in_fp32():
    """64 rounds of two rows of one expert: a sum in bf16 would stop growing."""
    case = Case(dtype="bfloat16", sizes=(16, 8, 4), factor=2 / 32)
    args = list(arguments(case, "one expert"))
    args[2], args[4] = jnp.abs(args[2]), np.abs(args[4])  # of one sign
    _, (dw13, dw2, dx, dgate) = jax.device_get(compiled(case)(*args))
    _, want = jax.device_get(compiled(case._replace(factor=None))(*args))
    for got, whole in zip((dw13, dw2), want[:2], strict=True):
        a, b = (w.astype(np.float64) for w in (got, whole))
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 0.004
    np.testing.assert_array_equal(dx, want[2])
    np.testing.assert_array_equal(dgate, want[3])


def temporaries(case):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(case, "even")]
    return make(case).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_further_rounds_take_no_memory_of_their_own(monkeypatch):
    """Against a program that has one round and no others, and against the worst case."""
    case = Case(sizes=(256, 64, 256), factor=1.5)
    rounds, worst = temporaries(case), temporaries(case._replace(factor=None))
    monkeypatch.setattr(transport, "in_rounds", lambda one, _, *args, disjoint: one(*args, 0))
    once = temporaries(case)
    assert rounds <= 1.1 * once and once < 0.6 * worst, (rounds, once, worst)


def program(remat, factor=0.5, lora=None):
    """The model's loss and gradients on 4 devices along expert and 2 along fsdp, and what they need."""
    compute = ComputeConfig(attention="reference", remat=remat, moe=MoeConfig(buffer_factor=factor))
    model, mesh = abstract_model(CONFIG, compute, lora=lora), make_mesh(MeshConfig(data=1, expert=4, fsdp=2))

    def loss(model, rows):
        sums, stats = next_token_sums(model, *rows)
        return sums.loss_sum, stats

    return model, mesh, jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("remat", ["none", "minimal", "experts_input", "full"])
def test_rounds_are_agreed_on_once_and_saved(remat):
    """In the loop over layers: one maximum over the mesh, one exchange of the counts, none in the backward pass."""
    model, mesh, step = program(remat)
    rows = make_batches()["whole"]
    with jax.set_mesh(mesh):
        found = list(equations(jax.make_jaxpr(step)(model, rows).jaxpr))
    agreed = [e for e in found if e.name == "pmax" and e.dtype == "int32"]
    assert [(e.shape, e.loops) for e in agreed] == [((), (CONFIG.num_hidden_layers,))]
    assert set(agreed[0].axes) == set(TOKEN_AXES)
    counts = [e for e in found if e.name == "all_gather" and e.dtype == "int32"]
    assert len(counts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_adapters_of_experts(base):
    """LoRA on all of an expert's matrices, on a frozen base in full or in blocks."""
    lora = LoraConfig(rank=2, targets=("moe.w*",), base_dtype=base, base_block=2)
    rows, results = make_batches()["packed"], []

    def made(path, like):
        numbers = np.arange(like.size).reshape(like.shape)
        whole = jnp.issubdtype(like.dtype, jnp.integer)
        return jnp.asarray(numbers % 256 if whole else 0.3 * np.sin(numbers), like.dtype)

    for factor in (0.5, None):
        model, mesh, _ = program("full", factor, lora)
        graphdef, state = nnx.split(model)
        paths, tree = jax.tree_util.tree_flatten_with_path(state)
        values = [made(*leaf) for leaf in paths]
        learned = [i for i, (path, _) in enumerate(paths) if "lora" in jax.tree_util.keystr(path)]

        def loss(adapters, values, graphdef=graphdef, tree=tree, learned=learned):
            own = dict(zip(learned, adapters, strict=True))
            model = nnx.merge(graphdef, jax.tree.unflatten(tree, [own.get(i, v) for i, v in enumerate(values)]))
            sums, stats = next_token_sums(model, *rows)
            return sums.loss_sum, stats

        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_TO_COMPILE)
        with jax.set_mesh(mesh):
            results.append(jax.device_get(step([values[i] for i in learned], values)))
    ((loss, stats), grads), ((want, _), want_grads) = results
    assert stats.overflow_L.min() > 0 and loss == pytest.approx(want, rel=1e-6)
    assert len(grads) == 6 and all(np.any(g != 0) for g in grads)
    for got, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5 * max(1, np.abs(exact).max()))
