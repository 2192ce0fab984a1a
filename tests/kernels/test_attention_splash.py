"""The splash back-end: its values by the kernel's interpreter, its program by compiling for a TPU that is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.kernels.attention import attend
from mixtral_jax.kernels.attention_splash import splash_attention
from mixtral_jax.kernels.attention_tiled import Tokens
from tests.oracles.attention import attention, mask_matrix


@pytest.mark.parametrize("window", [None, 50])
def test_interpreted_kernel_equals_the_definition(window: int | None) -> None:
    """Two documents and padding; value and gradients."""
    B, T, N, K, H = 1, 256, 2, 1, 128
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((B, T, n, H), dtype=np.float32) for n in (N, K, K, N))
    segments = np.repeat([[1, 2, 0]], (100, 130, 26), axis=1)
    positions = np.concatenate([np.arange(100), np.arange(130), np.arange(26)])[None]

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        out, pull_back = jax.vjp(
            lambda q, k, v: splash_attention(q, k, v, *(jnp.asarray(segments),) * 2, window=window, interpret=True),
            q,
            k,
            v,
        )
        return out, *pull_back(g)

    mask = mask_matrix(positions[0], positions[0], segments[0], segments[0], window)[None]
    for got, want in zip(run(q, k, v, g), attention(q, k, v, mask, g), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_compiles_for_a_tpu_inside_scan_remat_and_checked_shard_map(window: int | None) -> None:
    """Forward and backward on v5e:2x4, chosen by `auto` from the mesh: one forward, one recomputed, dq, dk and dv."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = topologies.make_mesh(topology, (4, 2), ("data", "tensor"))
    heads, ids = P("data", None, "tensor"), P("data")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        tokens = Tokens(positions, segments)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            layer = jax.checkpoint(lambda x, _: (attend(x, k, v, queries=tokens, keys=tokens, window=window), None))
            y = jax.lax.scan(layer, q, None, length=2)[0]
            return jax.lax.psum(y.astype(jnp.float32).sum(), ("data", "tensor"))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    def array(n: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((8, 1024, n, 128), jnp.bfloat16, sharding=NamedSharding(mesh, heads))

    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, ids))
    with jax.set_mesh(mesh):
        specs = (heads,) * 3 + (ids,) * 2
        run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), (heads,) * 3), check_vma=True)
        compiled = jax.jit(run).lower(array(8), array(4), array(4), tokens, tokens).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4
    # one device's scores in bf16 would be 2 rows x 4 heads x 1024 x 1024 x 2 bytes
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 1024 * 1024 * 2
