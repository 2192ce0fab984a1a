"""NUMERICS G1, G2, C2: one step on every mesh gives what one device gives: losses, loads, gradients, parameters.

Kinds of batches are data of one compiled function per mesh and transport. In all of them the grouped matmul leaves NaN
in the rows that belong to no expert, as a kernel may. The single device computes every expert for every row and
materialises the scores, so it shares neither kernel with the meshes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import ComputeConfig, MoeConfig
from mixtral_jax.kernels import grouped
from mixtral_jax.moe.transport import resolve_transport
from tests.mesh_cases import (
    CONFIG,
    make_batches,
    make_params,
    make_step,
    mesh_config,
    one_expert_params,
    smallest_routing_gap,
)

TOLERANCE = 1e-5  # absolute, for losses and for gradients scaled to a largest element of 1
NOTHING_DROPPED = CONFIG.num_local_experts / CONFIG.num_experts_per_tok  # room for all tokens in every expert

DENSE_MESHES = [{"fsdp": 1}, {"fsdp": 8}, {"tensor": 2}, {"tensor": 4}, {"context": 2}, {"context": 4}]
EXPERT_MESHES = [
    {"expert": 2},
    {"expert": 4},
    {"expert": 8},
    {"expert": 4, "fsdp": 2},
    {"expert": 2, "tensor": 2},  # and data 2
    {"expert": 2, "fsdp": 2, "context": 2},
]
MORE_MESHES = [{"tensor": 2, "context": 2, "fsdp": 2}, {"expert": 2, "tensor": 2, "context": 2}, {"fsdp": 4}]


def cases():
    for sizes in DENSE_MESHES:
        yield sizes, {}
    for sizes in EXPERT_MESHES:
        yield from ((sizes, {"transport": transport}) for transport in ("ring", "alltoall"))
    full = {"capacity_factor": NOTHING_DROPPED}
    fast = [{"fsdp": 1}, {"expert": 4, "fsdp": 2}, {"expert": 2, "tensor": 2}]
    for sizes in [*DENSE_MESHES, *EXPERT_MESHES]:
        marks = () if sizes in fast else pytest.mark.slow
        yield pytest.param(sizes, full, marks=marks)
    yield {"expert": 4, "fsdp": 2}, {"capacity_factor": NOTHING_DROPPED, "transport": "ring"}
    yield {"expert": 4, "fsdp": 2}, {"chunk_tokens": 8}
    yield {"expert": 4, "fsdp": 2}, {"buffer_factor": 0.5}  # more rounds in all layers, of most kinds
    for sizes in EXPERT_MESHES:
        yield pytest.param(sizes, {"buffer_factor": 1.0}, marks=pytest.mark.slow)
    for more in ({"transport": "ring"}, {"chunk_tokens": 8}, {"matmul": "ragged_dot"}, full):
        yield pytest.param({"expert": 4, "fsdp": 2}, {"buffer_factor": 0.5, **more}, marks=pytest.mark.slow)
    # not blocked: the way of the accelerators' back-ends, with its own backward pass (kernels/swiglu_grouped.py)
    yield {"expert": 4, "fsdp": 2}, {"matmul": "ragged_dot"}
    for sizes in MORE_MESHES:
        yield pytest.param(sizes, {}, marks=pytest.mark.slow)


def name(value):
    return "-".join(f"{k}{v}" for k, v in value.items()) or "dropless"


@pytest.fixture(scope="module")
def expected():
    """(params, rows, result on one device) for each kind of batch, with no routing decision near a tie."""
    seed = next(s for s in range(20) if _gap(s) > TOLERANCE)
    params, batches = make_params(seed=seed), make_batches(seed)
    inputs = {kind: (params, rows) for kind, rows in batches.items()}
    inputs["one expert"] = (one_expert_params(params), batches["padded"])
    one_device = make_step(compute=ComputeConfig(attention="reference", moe=MoeConfig(matmul="dense")))
    return {kind: (*args, jax.device_get(one_device(*args))) for kind, args in inputs.items()}


def _gap(seed):
    params = make_params(seed=seed)
    return min(smallest_routing_gap(params, rows) for rows in make_batches(seed).values())


@pytest.fixture(autouse=True)
def nan_behind_the_last_group(monkeypatch):
    clean = grouped._forward

    def with_nan(backend, x_RD, w_EDF, sizes_E, transpose):
        y_RF = clean(backend, x_RD, w_EDF, sizes_E, transpose)
        return jnp.where((jnp.arange(y_RF.shape[0]) < jnp.sum(sizes_E))[:, None], y_RF, jnp.nan)

    monkeypatch.setattr(grouped, "_forward", with_nan)


def worst_difference(result, reference):
    """The largest over all leaves of |a - b|, gradients scaled to a largest element of 1; fails on NaN."""
    worst = 0.0
    paths = jax.tree_util.tree_leaves_with_path(result)
    for (path, a), b in zip(paths, jax.tree.leaves(reference), strict=True):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(a).all(), where
        scale = max(float(np.max(np.abs(b))), 1e-2) if "grads" in where else 1.0
        difference = float(np.max(np.abs(a - b))) / scale
        assert difference <= TOLERANCE, f"{where}: {difference}"
        worst = max(worst, difference)
    return worst


def test_one_device_computes_what_the_cases_are_named_after(expected):
    counts = {kind: result["counts"] for kind, (_, _, result) in expected.items()}
    tokens = int(np.sum(expected["padded"][1][4] > 0))
    np.testing.assert_array_equal(counts["one expert"], [[tokens, tokens, 0, 0, 0, 0, 0, 0]] * 2)
    assert (counts["packed"] > 0).all()
    assert counts["empty rows"].sum() == 2 * 2 * 2 * 16
    for _, _, result in expected.values():
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(result["grads"]))


@pytest.mark.parametrize(("sizes", "moe"), list(cases()), ids=name)
def test_every_mesh_gives_what_one_device_gives(expected, sizes, moe, record_property):
    compute = ComputeConfig(attention="reference", moe=MoeConfig(**moe))
    step = make_step(compute=compute, mesh_config=mesh_config(**sizes))
    worst = {}
    for kind, (params, rows, reference) in expected.items():
        result = jax.device_get(step(params, rows))
        np.testing.assert_array_equal(result["counts"], reference["counts"], err_msg=kind)
        np.testing.assert_array_equal(result["dropped"], 0)
        worst[kind] = worst_difference(result, reference)
    assert step.jitted._cache_size() == 1
    record_property("worst", worst)
    print(name(sizes), name(moe), worst)


def test_meshes_without_an_expert_axis_have_no_transport():
    assert [resolve_transport(t, 1) for t in ("auto", "ring", "alltoall")] == ["none"] * 3
    assert [resolve_transport(t, 4) for t in ("auto", "ring", "alltoall")] == ["alltoall", "ring", "alltoall"]


def test_capacity_counts_what_it_drops_on_every_device(expected):
    """Half of the even share: each device drops by itself, and the counts add up over the mesh."""
    moe = MoeConfig(capacity_factor=0.5)
    step = make_step(compute=ComputeConfig(attention="reference", moe=moe), mesh_config=mesh_config(expert=4, fsdp=2))
    params, rows, reference = expected["whole"]
    result = jax.device_get(step(params, rows))
    # 16 tokens a device, so an expert takes 2 rows of each device; layer 0 routes as without a capacity
    assert (result["counts"][0] == reference["counts"][0]).all()
    kept = 2 * 128 - result["dropped"]
    assert (result["dropped"] > 0).all() and (kept <= 8 * 8 * 2).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
