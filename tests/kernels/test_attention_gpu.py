"""Attention as a program for NVIDIA GPUs, lowered without one: which kernels, and that nothing of T x T is in it."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from mixtral_jax.attention import attend_row
from mixtral_jax.kernels.attention_cudnn import cudnn_attention
from mixtral_jax.kernels.attention_tiled import SAVED, Tokens
from mixtral_jax.kernels.attention_triton import triton_attention

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
CUDNN = Counter({"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 1})
TRITON = Counter({"attention_forward": 2, "attention_dq": 1, "attention_dkv": 1})
HAS_CUDNN = jax.__version_info__ >= (0, 12)
T, HEADS = 8704, 6  # no powers of two, which Triton wants of what it computes on


def lowered(kind: str, window: int | None, context: int, dtype: str) -> str:
    """Forward and backward of two rematerialised layers on a mesh of such devices, in a shard_map that checks."""
    mesh = AbstractMesh(
        (2, context), ("data", "context"), (AxisType.Auto,) * 2, abstract_device=AbstractDevice(kind, None, "gpu")
    )
    rows = P("data", "context")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        attend = attend_row(Tokens(positions, segments), window, "auto")

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            y = jax.lax.scan(jax.checkpoint(lambda x, _: (attend(x, k, v)[0], None)), q, None, length=2)[0]
            return jax.lax.psum(y.astype(jnp.float32).sum(), ("data", "context"))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    q, k = (jax.ShapeDtypeStruct((2, T, heads, 64), dtype) for heads in (HEADS, 2))
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    run = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 5, out_specs=(rows,) * 3, check_vma=True)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(q, k, k, ids, ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("kind", "window", "context", "dtype", "kernels"),
    [
        (H100, None, 1, "bfloat16", CUDNN if HAS_CUDNN else TRITON),
        (H100, 1000, 1, "bfloat16", CUDNN if HAS_CUDNN else TRITON),
        (H100, None, 2, "bfloat16", TRITON),
        (A100, 1000, 1, "bfloat16", TRITON),
        (A100, None, 2, "bfloat16", TRITON),
        (H100, None, 1, "float32", Counter()),
    ],
)
def test_the_program_for_a_gpu_holds_no_square(kind, window, context, dtype, kernels):
    text = lowered(kind, window, context, dtype)
    called = Counter(re.findall(r"custom_call @(__cudnn\S+?)\(", text))
    called += Counter(re.findall(r'name = "(attention_\w+)"', text))
    assert called == kernels
    shapes = [[int(n) for n in dims.split("x")] for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)]
    assert max(map(np.prod, shapes)) <= 2 * T * HEADS * 64 * (1 if kernels else 2)  # no more than the queries' numbers
    assert all(sum(n >= T // context for n in dims) < 2 for dims in shapes)


@pytest.mark.parametrize("kernel", ["triton", "cudnn"])
def test_a_policy_that_saves_the_result_runs_no_forward_twice(kernel):
    """What the backward pass needs carries the name `attended`, one statistic a token and head among it."""
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 64), "bfloat16") for heads in (4, 2))
    ids = jnp.zeros((1, 256), jnp.int32)

    def attend(q, k, v):
        if kernel == "cudnn":
            return cudnn_attention(q, k, v, ids, window=None)
        return triton_attention(q, k, v, ids, ids, jnp.arange(256), window=None)

    def forwards(policy) -> int:
        kept = jax.checkpoint(attend, policy=policy)
        run = jax.grad(lambda q, k, v: kept(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
        text = str(jax.make_jaxpr(run)(q, k, k))
        made = re.findall(
            r"(\w+):bf16\S+ \w+:f32\[1,4,256\] = pallas_call|(\w+):\S+ \w+:\S+ = dot_product_attention_fwd", text
        )
        # jax leaves a kernel that nothing reads, which the compiler then drops
        return sum(len(re.findall(rf"\b{a or b}\b", text)) > 1 for a, b in made)

    assert forwards(jax.checkpoint_policies.save_only_these_names(SAVED)) == 1
    assert forwards(jax.checkpoint_policies.nothing_saveable) == 2
