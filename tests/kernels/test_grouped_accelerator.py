"""Megablox by its interpreter, alone: values, gradients' parts, empty and partly filled groups, rows of nobody.

Of tokamax only that our calls lower to its kernels for NVIDIA GPUs: nothing here can run those.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.grouped_accelerator import grouped_rows, grouped_weight_gradient

CASES = {  # rows of the buffer, D, F, rows of each group
    "whole tiles": (256, 128, 256, (128, 0, 128)),
    "groups end within tiles": (300, 128, 384, (100, 130, 70)),
    "rows of nobody": (300, 256, 128, (37, 0, 1, 60)),
    "no row at all": (128, 128, 128, (0, 0)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    R, D, F, sizes = CASES[request.param]
    rng = np.random.default_rng(0)
    x_RD, dy_RF, w_EDF = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((R, D), (R, F), (len(sizes), D, F))
    )
    x_RD[sum(sizes) :], dy_RF[sum(sizes) :] = np.nan, np.nan
    spans = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    return x_RD, dy_RF, w_EDF, np.array(sizes, np.int32), spans


def test_rows_times_the_matrix_of_their_group(case):
    x_RD, dy_RF, w_EDF, sizes_E, spans = case
    y_RF = np.asarray(grouped_rows("megablox", x_RD, w_EDF, sizes_E, transpose=False, interpret=True))
    dx_RD = np.asarray(grouped_rows("megablox", dy_RF, w_EDF, sizes_E, transpose=True, interpret=True))
    assert y_RF.shape == dy_RF.shape and dx_RD.shape == x_RD.shape
    for e, span in enumerate(spans):
        np.testing.assert_allclose(y_RF[span], x_RD[span] @ w_EDF[e], atol=1e-4)
        np.testing.assert_allclose(dx_RD[span], dy_RF[span] @ w_EDF[e].T, atol=1e-4)


def test_gradient_of_each_matrix_comes_from_its_rows_alone(case):
    x_RD, dy_RF, _, sizes_E, spans = case
    dw_EDF = np.asarray(grouped_weight_gradient("megablox", x_RD, dy_RF, sizes_E, jnp.float32, interpret=True))
    for e, span in enumerate(spans):
        np.testing.assert_allclose(dw_EDF[e], x_RD[span].T @ dy_RF[span], atol=1e-4)


class H100(types.SimpleNamespace):
    """What tokamax asks of a device before it chooses a kernel."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H100 80GB HBM3", "9.0", 132
    __hash__ = object.__hash__


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tokamax's own
@pytest.mark.parametrize("product", ["rows", "rows transposed", "weights"])
@pytest.mark.parametrize(("D", "F"), [(256, 512), (256, 16), (16, 256)], ids=["wide", "up to a rank", "from a rank"])
def test_tokamax_lowers_to_its_gpu_kernels(monkeypatch, product, D, F):
    pytest.importorskip("tokamax", reason="lowering for NVIDIA GPUs needs tokamax (extra: cuda)")
    from jax.extend import backend

    monkeypatch.setattr(backend, "get_default_device", H100)
    monkeypatch.setattr("sys.argv", ["tokamax"])  # it reads flags from the command line, which is pytest's
    R, E = 512, 4

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def run(a, b, sizes_E):
        if product == "weights":
            return grouped_weight_gradient("tokamax", a, b, sizes_E, jnp.bfloat16)
        return grouped_rows("tokamax", a, b, sizes_E, transpose=product == "rows transposed")

    given, result = {
        "rows": ((array(R, D), array(E, D, F)), (R, F)),
        "rows transposed": ((array(R, F), array(E, D, F)), (R, D)),
        "weights": ((array(R, D), array(R, F)), (E, D, F)),
    }[product]
    exported = jax.export.export(jax.jit(run), platforms=["cuda"])(*given, jax.ShapeDtypeStruct((E,), jnp.int32))
    assert exported.out_avals[0].shape == result
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("D, F", [(128, 16), (20, 64), (64, 128)])
def test_columns_that_are_filled_up_change_nothing(monkeypatch, D, F):
    """tokamax's own XLA form takes any size, and runs here."""
    pytest.importorskip("tokamax", reason="needs tokamax (extra: cuda)")
    monkeypatch.setattr("mixtral_jax.kernels.grouped_accelerator._implementations", lambda: ("xla",))
    monkeypatch.setattr("sys.argv", ["tokamax"])
    rng, sizes_E = np.random.default_rng(0), np.array([3, 0, 5], np.int32)
    x_RD, dy_RF, w_EDF = (rng.standard_normal(s).astype(np.float32) for s in ((8, D), (8, F), (3, D, F)))
    expert_R = np.repeat(np.arange(3), sizes_E)
    y_RF = grouped_rows("tokamax", x_RD, w_EDF, sizes_E, transpose=False)
    dx_RD = grouped_rows("tokamax", dy_RF, w_EDF, sizes_E, transpose=True)
    dw_EDF = grouped_weight_gradient("tokamax", x_RD, dy_RF, sizes_E, jnp.float32)
    np.testing.assert_allclose(y_RF, np.einsum("RD,RDF->RF", x_RD, w_EDF[expert_R]), atol=1e-4)
    np.testing.assert_allclose(dx_RD, np.einsum("RF,RDF->RD", dy_RF, w_EDF[expert_R]), atol=1e-4)
    one_RE = (expert_R[:, None] == np.arange(3)).astype(np.float32)
    np.testing.assert_allclose(dw_EDF, np.einsum("RE,RD,RF->EDF", one_RE, x_RD, dy_RF), atol=1e-4)
