"""Each habit of a compiler is still there, and gone with its work-around: where not, `gone` wants a version.

The habits that show as memory only, COPIES_STACKS and READS_AGAIN, need a whole layer at full size:
they are held by the plans of the presets (docs/sharding.md); STACKS_AS_GATHERED, a GPU's, by tests/plan/test_gpus.py.
NARROWS_SLOWLY and REPEATS_COMPARISONS show as time only (docs/decisions.md).
"""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.generation import engine, few_rows
from mixtral_jax.generation.sampling import make_sampler
from mixtral_jax.kernels import bits, native_bf16, product, transposed
from mixtral_jax.kernels.products import turned_if
from mixtral_jax.model import Mixtral
from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel.collectives import gather_shards
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from tests.tiny import tiny_config

bf16, fp32 = jnp.bfloat16, jnp.float32


def compile_for(topology, make, *arrays, specs=None):
    """Text of `make(x, ...)` inside a shard_map on a slice that one axis fills; by default rows are sharded."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    specs = specs or (P("fsdp"),) * len(arrays)
    run = jax.shard_map(make, mesh=mesh, in_specs=specs, out_specs=specs[-1])
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(arrays, specs, strict=True)
    ]
    return jax.jit(run).lower(*shapes).compile().as_text()


def all_reduced(text, *shape):
    return bool(re.findall(rf"bf16\[{','.join(map(str, shape))}\]\S* all-reduce\(", text))


def scatters(topology, rows, columns, stacked=False):
    """Whether a weight's gradient is reduced to every chip, before each keeps its shard."""
    shape, dim = ((1, rows, columns), 1) if stacked else ((rows, columns), 0)
    spec = P(*(None,) * dim, "fsdp")

    def gradient(x, dy, w):
        use = lambda w: x @ gather_shards(w, w.dtype, ("fsdp",), dim).reshape(rows, columns)  # noqa: E731 - used once, below
        return jax.vjp(use, w)[1](dy)[0]

    arrays = ((8192, rows), bf16), ((8192, columns), bf16), (shape, bf16)
    return compile_for(topology, gradient, *arrays, specs=(P("fsdp"), P("fsdp"), spec))


def gathers(topology, rows, columns):
    def product(x, w):
        return x @ gather_shards(w, w.dtype, ("fsdp",), 0)

    text = compile_for(topology, product, ((8192, rows), bf16), ((rows, columns), bf16))
    return all_reduced(text, rows, columns)


def hoists_a_cast():
    """Whether the whole stack of shards exists in bf16."""

    def layers(w_LDD, x_MD):
        def layer(x_MD, w_DD):
            return jax.nn.silu(x_MD @ gather_shards(quirks.cast(w_DD, bf16), bf16, ("fsdp",), 0)), None

        return jax.lax.scan(layer, x_MD, w_LDD)[0]

    arrays, specs = (((8, 1024, 1024), fp32), ((512, 1024), bf16)), (P(None, "fsdp"), P("fsdp"))
    return "bf16[8,256,1024]" in compile_for("v5e:2x2", layers, *arrays, specs=specs)


def sorts():
    """Whether the gradient of gates, taken by their experts, scatters."""

    def gradient(p_ME, g_MC):
        chosen_MC = jax.lax.top_k(p_ME, 2)[1]
        return jax.vjp(lambda p: quirks.take_chosen(p, chosen_MC), p_ME)[1](g_MC)[0]

    text = compile_for("v5e:2x2", gradient, ((8192, 8), fp32), ((8192, 2), fp32))
    return " scatter(" in text


def slow_on_a_transposed_left():
    """Whether a product with x^T misses the fast library of XLA on CPUs."""
    run = jax.jit(lambda x, g: jnp.dot(transposed(x), g, preferred_element_type=fp32))
    arrays = (jax.ShapeDtypeStruct((512, n), fp32) for n in (256, 896))
    return "ynn" not in run.lower(*arrays).compile().as_text()


def widens_a_transposed():
    """Whether a product in bf16 with x^T is computed in fp32."""
    run = jax.jit(lambda x, g: jnp.dot(transposed(x), g, preferred_element_type=fp32))
    arrays = (jax.ShapeDtypeStruct((512, n), bf16) for n in (256, 896))
    return "f32[256,512]" in run.lower(*arrays).compile().as_text()


def widens_an_updated():
    """Whether a buffer goes to fp32 and back where a part of it is written."""
    put = jax.lax.dynamic_update_slice_in_dim
    run = jax.jit(lambda x, part, at: put(bits(x), bits(part), at, axis=0), donate_argnums=0)
    arrays = (jax.ShapeDtypeStruct((rows, 256), bf16) for rows in (4096, 64))
    return "f32[4096,256]" in run.lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()


def fuses_a_transpose():
    """Whether a matrix is transposed in one loop with what cuts it out of a stack."""
    run = jax.jit(lambda stack, at: turned_if(at > 0, stack[at]))
    text = run.lower(jax.ShapeDtypeStruct((4, 128, 128), fp32), jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    return any("dynamic-slice(" in part and " transpose(" in part for part in text.split("\n\n") if "ENTRY" not in part)


def hoists_an_invariant():
    """Whether what no round of a loop changes is made before it, be there a round or not."""

    def run(rounds, x, y):
        def one(index, y):
            index, own = quirks.barrier(quirks.HOISTS_INVARIANTS, (index, x))
            return y + index * jnp.sin(own)

        return jax.lax.fori_loop(0, rounds, one, y)

    x = jax.ShapeDtypeStruct((4096,), fp32)
    text = jax.jit(run).lower(jax.ShapeDtypeStruct((), jnp.int32), x, x).compile().as_text()
    return "sine" in text[text.index("ENTRY") :]


def slow_on_one_row():
    """Whether the matrix of a product of one row in bf16 goes to fp32."""
    run = jax.jit(lambda x, w: product(x, w))  # traced anew
    arrays = (jax.ShapeDtypeStruct(shape, bf16) for shape in ((1, 256), (256, 896)))
    return "f32[256,896]" in run.lower(*arrays).compile().as_text()


def copies_a_slice():
    """Whether a step of decoding writes matrices of single experts, where layers may be taken apart."""
    model = Mixtral(tiny_config(hidden_size=256, intermediate_size=344), key=jax.random.key(0))
    rows, slots = engine._right_align(engine._read_prompts(model, [[1, 2]], None, None, None), 16)
    ready, sampler = engine._ready(model, rows, slots, few_rows.FEWEST_STEPS), make_sampler()
    state, _ = engine._start(*ready, rows, sampler, slots=slots)
    text = engine._step.lower(*ready, state, rows, sampler).compile().as_text()
    D, F = model.config.hidden_size, model.config.intermediate_size
    written = rf" = f32\[(?:1,)*{D},(?:2,{F}|{2 * F})\]\S* (?:fusion|copy|dynamic-slice)\("
    return any(re.search(written, part) for part in text.split("\n\n") if not part.startswith("%fused_computation"))


CASES = {
    "COPIES_SLICES": copies_a_slice,
    "SLOW_ON_ONE_ROW": slow_on_one_row,
    "HOISTS_INVARIANTS": hoists_an_invariant,
    "SCATTERS_TORUS_BY_ALL_REDUCE": lambda: all_reduced(scatters("v5e:4x4", 2048, 1024), 2048, 1024),
    "SCATTERS_FORMS_BY_ALL_REDUCE": lambda: all_reduced(scatters("v5e:4x4", 2048, 1024, stacked=True), 1, 2048, 1024),
    "GATHERS_CUBE_BY_ALL_REDUCE": partial(gathers, "v5p:4x4x4", 8192, 1024),
    "GATHERS_SMALL_BY_ALL_REDUCE": partial(gathers, "v5e:16x16", 8192, 256),
    "HOISTS_CASTS": hoists_a_cast,
    "SORTS_FOR_SCATTERS": sorts,
    "SLOW_ON_TRANSPOSED_LEFT": slow_on_a_transposed_left,
    "FUSES_TRANSPOSES": fuses_a_transpose,
    "WIDENS_TRANSPOSED": widens_a_transposed,
    "WIDENS_UPDATED": widens_an_updated,
}


@pytest.mark.parametrize("name", CASES)
def test_the_habit_is_there_and_its_work_around_works(monkeypatch, name):
    habit = getattr(quirks, name)
    if name in ("WIDENS_TRANSPOSED", "SLOW_ON_ONE_ROW", "COPIES_SLICES") and not native_bf16():
        pytest.skip("this processor has no products of bf16: all are computed in fp32")
    assert not CASES[name]()
    monkeypatch.setattr(quirks, name, quirks.Habit("jaxlib", "0", gone="0"))
    assert CASES[name]() == habit.here, f"{name}: is it gone? say so in mixtral_jax/parallel/compiler_quirks.py"


@pytest.mark.parametrize("topology", ["v5p:4x4x2", "v5e:16x16"])
def test_no_weight_is_reduced_to_every_chip_of_a_slice(topology):
    text = scatters(topology, 8192, 1024)
    fused = len(re.findall(r"AllReduceScatterFusion", text)) + len(re.findall(r" reduce-scatter(?:-start)?\(", text))
    assert fused >= 2
    assert not all_reduced(text, 8192, 1024)


def test_versions_are_compared_as_numbers():
    assert quirks.Habit("jaxlib", "0.10.2").here
    assert quirks.Habit("jaxlib", "0.10.2", gone="99.0.0.1").here
    assert not quirks.Habit("jaxlib", "0.1", gone="0.2").here
