"""Every attention back-end against the literal definition: outputs and all three gradients."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mixtral_jax.kernels.attention import attend
from mixtral_jax.kernels.attention_tiled import Tokens
from tests.attention_cases import CASES, Case, compare, make, out_and_gradients
from tests.oracles.attention import attention


@pytest.mark.parametrize("backend", ["reference", "chunked", "dot_product", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_backends_equal_the_definition(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = make(case)
    got = out_and_gradients(
        lambda q, k, v: attend(
            q, k, v, **inputs.tokens, window=case.window, backend=backend, ordered=not case.shuffled
        ),
        inputs.arrays,
    )
    want = attention(*inputs.arrays[:3], inputs.mask, inputs.arrays[3])
    compare(got, want, 1e-5)
    blind = inputs.mask.sum(-1) == 0
    assert (got[0][blind] == 0).all() and (got[1][blind] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "chunked", "dot_product"])
def test_bfloat16_keeps_its_type_and_is_near(backend: str) -> None:
    case = Case(T=90, lengths=(60, 25), H=32)
    inputs = make(case, seed=2)
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs.arrays)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, **inputs.tokens, window=None, backend=backend), q, k, v)
        return out, *pull_back(g)

    got = run(*arrays)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    rounded = [np.asarray(x, np.float32) for x in arrays]
    want = attention(*rounded[:3], inputs.mask, rounded[3])
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.01 * np.linalg.norm(b)


def test_large_scores_overflow_nothing() -> None:
    inputs = make(Case(T=80))
    q, k, v, g = inputs.arrays
    arrays = 1e3 * q, 1e3 * k, v, g
    for backend in ("reference", "chunked"):
        got = out_and_gradients(
            lambda q, k, v, b=backend: attend(q, k, v, **inputs.tokens, window=None, backend=b), arrays
        )
        assert all(np.isfinite(x).all() for x in got)
        np.testing.assert_allclose(got[0], attention(*arrays[:3], inputs.mask, g)[0], atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_output_depends_on_what_its_token_does_not_see(backend: str) -> None:
    case = Case(T=80, lengths=(30, 40), window=12)
    inputs = make(case, seed=3)
    q, k, v, _ = inputs.arrays
    run = jax.jit(lambda k, v: attend(q, k, v, **inputs.tokens, window=12, backend=backend))
    base = np.asarray(run(k, v))
    for s in (0, 29, 30, 55, 79):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, s] += 5
        other_v[:, s] -= 5
        changed = np.abs(np.asarray(run(other_k, other_v)) - base).max((2, 3)) > 0
        assert not (changed & (inputs.mask[:, :, s] == 0)).any()
        assert changed.any() == (inputs.mask[:, :, s].any())


# ---- what is visited, and what is held in memory --------------------------------------------------------------------


def compiled_training_step(T: int):
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 32), jnp.float32) for heads in (8, 2))
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        tokens = Tokens(positions, segments)
        return attend(q, k, v, queries=tokens, keys=tokens, window=None, backend="chunked").sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return step.lower(q, k, k, tokens, tokens).compile()


def test_32k_tokens_hold_no_square_buffer() -> None:
    compiled = compiled_training_step(32768)
    inputs = 32768 * (8 + 2 + 2) * 32 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * inputs  # 4 GiB would be one head's scores
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) <= 32768 * 8 * 32


# ---- under the transformations of the model ------------------------------------------------------------------------


def test_inside_scan_remat_and_checked_shard_map() -> None:
    """Two layers of attention, rematerialised, over batch and heads, with keys gathered over a sequence axis."""
    case = Case(B=2, T=64, N=4, K=2, lengths=(40, 20))
    inputs = make(case, seed=4)
    q, k, v, _ = inputs.arrays
    positions, segments = inputs.tokens["queries"]
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "context"), axis_types=(AxisType.Auto,) * 3)

    def loss(q, k, v, positions, segments, gather, add, backend):
        keys = gather(k), gather(v)
        tokens = dict(queries=Tokens(positions, segments), keys=Tokens(gather(positions), gather(segments)))

        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + attend(x, *keys, **tokens, window=9, backend=backend, ordered=False), None

        return add((jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0] ** 2).sum())

    def on_one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return loss(q, k, v, positions, segments, lambda x: x, lambda x: x, "reference")

    def on_mesh(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        spec, tokens = P("data", "context", "tensor"), P("data", "context")

        def local(q, k, v, positions, segments):
            gather = partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
            add = partial(jax.lax.psum, axis_name=("data", "tensor", "context"))
            return loss(q, k, v, positions, segments, gather, add, "chunked")

        run = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3 + (tokens,) * 2, out_specs=P(), check_vma=True)
        return run(q, k, v, positions, segments)

    want, want_gradients = jax.jit(jax.value_and_grad(on_one, (0, 1, 2)))(q, k, v)
    got, gradients = jax.jit(jax.value_and_grad(on_mesh, (0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_a_policy_that_saves_the_result_runs_no_forward_twice() -> None:
    """Two products forward and five backward; without the policy, the two forward ones again."""
    inputs = make(Case(T=100))

    def products(policy) -> int:
        attention = jax.checkpoint(
            lambda q, k, v: attend(q, k, v, **inputs.tokens, window=None, backend="chunked"), policy=policy
        )
        run = jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), (0, 1, 2))
        return str(jax.make_jaxpr(run)(*inputs.arrays[:3])).count("dot_general[")

    assert products(jax.checkpoint_policies.save_only_these_names("attended")) == 7
    assert products(jax.checkpoint_policies.nothing_saveable) == 9


def test_partitioned_by_the_compiler_over_batch_and_heads() -> None:
    case = Case(B=2, T=80, N=4, K=2, lengths=(40, 20))
    inputs = make(case, seed=5)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, P("data", None, "tensor"))) for x in inputs.arrays]
    got = out_and_gradients(
        lambda q, k, v: attend(q, k, v, **inputs.tokens, window=None, backend="chunked"), tuple(arrays)
    )
    compare(got, attention(*inputs.arrays[:3], inputs.mask, inputs.arrays[3]), 1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence() -> None:
    q, k = jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 4, 2, 8))
    ids = jnp.zeros((1, 4), jnp.int32)
    tokens = dict(queries=Tokens(ids, ids), keys=Tokens(ids, ids))
    with pytest.raises(ValueError, match=r"do not fit together"):
        attend(q, k, jnp.zeros((1, 4, 2, 6)), **tokens, window=None)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attend(q, jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3, 8)), **tokens, window=None)
    with pytest.raises(ValueError, match="sliding_window is 0"):
        attend(q, k, k, **tokens, window=0)
    with pytest.raises(ValueError, match=r"splash, which needs .*128 .*4 and 8"):
        attend(q, k, k, **tokens, window=None, backend="splash")
