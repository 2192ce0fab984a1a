"""Plans for GPUs: what leaves a node, the text of a GPU's program, and a real compilation with no GPU there."""

import logging
import os
import subprocess
import sys
from textwrap import dedent

import jax
import pytest

from mixtral_jax.config import MixtralConfig
from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan import gpus, plan, run
from mixtral_jax.train.plan.chips import CHIPS, parse_topology, peak_flops
from mixtral_jax.train.plan.closed_form import bandwidth, flops, roofline, share_across, traffic
from mixtral_jax.train.plan.hlo import read_program, sent_by_axis

BIG = MixtralConfig.preset("mixtral-8x7b").model_dump()
SMALL = {
    **BIG, "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # tokamax's own
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]
SIXTYFOUR, H100 = parse_topology("h100-64"), CHIPS["h100"]


@pytest.mark.parametrize(
    ("sizes", "slow", "axes", "together"),  # GPUs of a group that share a node: from the inside out tensor ... data
    [
        ({"fsdp": 64}, {}, "fsdp", 8),
        ({"fsdp": 8, "expert": 8}, {}, "expert", None),
        ({"fsdp": 8, "expert": 8}, {}, "fsdp", 1),
        ({"fsdp": 8, "expert": 8}, {}, "fsdp+expert", 8),
        ({"fsdp": 16, "expert": 4}, {}, "fsdp", 2),
        ({"expert": 4, "context": 2, "fsdp": 8}, {}, "expert+context", None),
        ({"tensor": 8, "context": 8}, {}, "context", 1),
        ({"fsdp": 8, "data": 8}, {}, "fsdp", None),
        ({"fsdp": 8, "data": 8}, {}, "data", 1),
        ({"fsdp": 8, "data": 8}, {"fsdp": 2}, "fsdp", 4),  # halves of it in two groups of nodes
        ({"fsdp": 8, "data": 8}, {"fsdp": 2}, "data", 2),
    ],
)
def test_a_ring_leaves_its_node_once_for_each_gpu_there(sizes, slow, axes, together):
    share = share_across(SIXTYFOUR, axes, sizes, slow, "all-gather")
    assert share == (0 if together is None else 1 / together)
    rate = bandwidth(SIXTYFOUR, axes, sizes, slow, "all-gather")
    assert 1 / rate == pytest.approx(max((1 - share) / H100.network, share / H100.slow_network))


def test_the_share_of_a_ring_is_that_of_a_walk_around_it():
    """The slow twin: 64 GPUs in a ring for each of the 8 that may leave a node, all the same bytes."""
    hops = [(g, (g + 1) % 64) for g in range(64)]
    leaves = sum(a // 8 != b // 8 for a, b in hops) / len(hops)
    assert share_across(SIXTYFOUR, "fsdp", {"fsdp": 64}) == leaves


def test_an_all_to_all_sends_most_of_it_to_other_nodes():
    away = sum(g // 8 != 0 for g in range(1, 64)) / 63
    assert share_across(SIXTYFOUR, "expert", {"expert": 64}, {}, "ragged-all-to-all") == pytest.approx(away)
    assert share_across(parse_topology("h100-8"), "expert", {"expert": 8}, {}, "all-to-all") == 0


def test_peaks_and_memory_are_those_of_the_data_sheets():
    names = {name: gpu.device_kind for name, gpu in gpus.GPUS.items()}
    assert {name: peak_flops(kind) for name, kind in names.items()} == {name: CHIPS[name].flops for name in names}
    for name, sold in (("a100", 80), ("a100-40gb", 40), ("h100", 80), ("h200", 141), ("b200", 180)):
        assert 0.85 * sold < CHIPS[name].memory / 1e9 < sold
    # what XLA is told of the memory's speed is what is sold, but for a B200's, which is the clock that was read
    assert all(abs(gpus.GPUS[name].memory_bandwidth / CHIPS[name].memory_bandwidth - 1) < 0.05 for name in names)


def test_a_run_is_given_the_share_of_memory_that_plans_count_with():
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    for own in ({}, {names[0]: "0.5"}, {names[1]: "0.5"}):
        environment = {name: value for name, value in os.environ.items() if name not in names} | own
        script = f"import mixtral_jax, os; print([os.environ.get(name) for name in {names}])"
        said = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        given = [own.get(name) for name in names] if own else [str(gpus.MEMORY_SHARE), None]
        assert said.stdout.strip() == str(given)


def test_the_network_between_nodes_is_an_option(make_config, monkeypatch, capsys):
    monkeypatch.setattr(gpus, "has_cuda_plugin", lambda: False)
    config = make_config(model=BIG, seq_len=4096, global_batch_size=64, mesh={"data": 1, "fsdp": 64})
    seconds = [plan(config, topology="h100-64", between_nodes=g).roofline.network for g in (100, 200)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert run(config, topology="h100-64", between_nodes=200) == 0
    assert "200 Gb/s between nodes" in capsys.readouterr().out
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"--between-nodes is {wrong:g}: .* positive"):
            run(config, topology="h100-64", between_nodes=wrong)


def test_a_ring_of_tokens_sends_all_of_them_and_an_all_to_all_those_that_are_routed(make_config):
    sent = []
    for transport in ("ring", "alltoall"):
        config = make_config(
            model=BIG, seq_len=4096, global_batch_size=64, mesh={"data": 1, "fsdp": 8, "expert": 8},
            compute={"moe": {"transport": transport}},
        )  # fmt: skip
        sent.append(traffic(config, config.mesh.sizes(64))["expert"])
    assert sent[0] == pytest.approx(4 * sent[1])  # 8 devices' tokens, or 2 choices


TEXT = dedent("""\
    HloModule jit_step, entry_computation_layout={()->f32[]}

    %gather (p: bf16[4,8]) -> bf16[32,8] {
      %p = bf16[4,8]{1,0} parameter(0)
      ROOT %all-gather.1 = bf16[32,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
    }

    %gemm (a: bf16[16,32], b: bf16[32,8]) -> f32[16,8] {
      %a = bf16[16,32]{1,0} parameter(0)
      %b = bf16[32,8]{1,0} parameter(1)
      ROOT %dot = f32[16,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %state = (s32[], bf16[4,8]{1,0}) parameter(0)
      %w = bf16[4,8]{1,0} get-tuple-element(%state), index=1
      %begin = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}, u32[]) async-start(%w), calls=%gather
      %update = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}, u32[]) async-update(%begin), calls=%gather
      %w32 = bf16[32,8]{1,0} async-done(%update), calls=%gather
      %x = bf16[16,32]{1,0} constant(0)
      %fused = f32[16,8]{1,0} fusion(%x, %w32), kind=kCustom, calls=%gemm
      %blas = (f32[2,16,8]{2,1,0}, s8[64]{0}) custom-call(%x2, %w2), custom_call_target="__cublas$gemm", \
    backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}
      %x2 = bf16[2,16,32]{2,1,0} constant(0)
      %w2 = bf16[2,32,8]{2,1,0} constant(0)
      %small = (f32[16,8]{1,0}, f32[2,8]{1,0}) reduce-scatter-start(%fused), replica_groups=[1,8]<=[8], \
    backend_config={"collective_backend_config":{"is_sync":true}}
      %kept = f32[2,8]{1,0} reduce-scatter-done(%small)
      %rows = bf16[16,8]{1,0} constant(0)
      %buffer = bf16[64,8]{1,0} constant(0)
      %at = s64[8]{0} constant(0)
      %ragged = ((bf16[16,8]{1,0}, bf16[64,8]{1,0}, s64[8]{0}), bf16[64,8]{1,0}) \
    ragged-all-to-all-start(%rows, %buffer, %at), replica_groups={{0,1,2,3,4,5,6,7}}
      %came = bf16[64,8]{1,0} ragged-all-to-all-done(%ragged)
      %matrices = bf16[4,8,24]{2,1,0} constant(0)
      %mpmd_map.1 = bf16[64,24]{1,0} custom-call(%came, %matrices), custom_call_target="mosaic_gpu_v2", \
    metadata={op_name="jit(step)/tokamax:{\\"op\\":\\"ragged_dot.PallasMosaicGpuRaggedDot\\"}/mpmd_map"}
      %q = (bf16[1,8,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
      %dq = (bf16[1,8,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmaxBackward"
      %dk = bf16[1,8,16,8]{3,2,1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
    backend_config={name = "attention_dkv"}
      ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%state)
    }

    %condition (state: (s32[], bf16[4,8])) -> pred[] {
      %state = (s32[], bf16[4,8]{1,0}) parameter(0)
      ROOT %less = pred[] compare(%state, %state), direction=LT
    }

    ENTRY %main (w: bf16[4,8]) -> f32[] {
      %w = bf16[4,8]{1,0} parameter(0)
      %start = (s32[], bf16[4,8]{1,0}) tuple(%w)
      %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body, \
    backend_config={"known_trip_count":{"n":"3"}}
      ROOT %zero = f32[] constant(0)
    }
    """)


def test_a_gpus_program_is_counted_with_what_is_fused_and_what_is_started():
    program = read_program(TEXT)
    assert program.dot_flops == 3 * (2 * 16 * 32 * 8 + 2 * 2 * 16 * 32 * 8)  # the fused product, and cuBLAS' of a batch
    assert program.kernels == {"tokamax ragged_dot": 3, "cudnn": 3, "cudnn backward": 3, "attention_dkv": 3}
    assert program.grouped == {(8, 24): 3} and program.unknown_loops == 0
    by_kind = {c.kind: c for c in program.collectives}
    assert {kind: (c.bytes, c.times, c.asynchronous) for kind, c in by_kind.items()} == {
        "all-gather": (512, 3, True),  # once, though start, update and end all name it
        "reduce-scatter": (512, 3, False),  # started, and waited for at once
        "ragged-all-to-all": (256, 3, True),  # the rows that there are, not the room for them
    }
    sent = sent_by_axis(program.collectives, {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1})
    assert sent["all-gather", "fsdp"] == 3 * 512 * 7 / 8


def test_a_loop_of_unknown_length_without_a_product_keeps_no_figure_from_the_report():
    unknown = TEXT.replace('"known_trip_count":{"n":"3"}', "")
    assert read_program(unknown).unknown_loops == 1
    lines = [line for line in unknown.splitlines() if " dot(" not in line and "%fused" not in line]
    assert read_program("\n".join(lines)).unknown_loops == 0


def test_nothing_stays_patched():
    from jax.extend import backend

    def state():
        return backend.get_default_device, sys.argv, logging.getLogger("absl").level

    before = state()
    with pytest.raises(KeyError), gpus.there("a100"):
        assert backend.get_default_device().device_kind == gpus.GPUS["a100"].device_kind and len(sys.argv) == 1
        raise KeyError
    assert state() == before


def compiled(config, topology):
    if not gpus.has_cuda_plugin():
        pytest.skip("compiling for a GPU needs jax's CUDA plugin (extra: aot-gpu)")
    pytest.importorskip("tokamax", reason="compiling for a GPU needs tokamax (extra: aot-gpu)")
    report = plan(config, topology=topology)
    if not topology.startswith(("h100", "h200", "2xh100")) and "does not compile" in report.source:
        # seen: jax 0.10.2 for B200 ("Pass pipeline failed"); tokamax 0.0.17 for A100 and B200 without jax-triton
        pytest.xfail(report.source)
    assert report.fits and report.source == "compiled" and report.reduced_weights == ()
    assert report.unknown_loops == 0
    for part in ("dots", "experts", "attention", "total"):
        assert 0.98 <= getattr(report.counted, part) / getattr(report.expected, part) <= 1.02, part
    return report


def small(make_config, **changes):
    return make_config(model=SMALL, seq_len=1024, **{"compute": {"remat": "full"}, **changes})


def test_a_step_with_every_kernel_compiles_for_gpus(make_config):
    """tokamax, cuDNN or Triton, and the ragged all-to-all, over two nodes of eight H100."""
    config = small(make_config, global_batch_size=16, mesh={"data": 1, "fsdp": 8, "expert": 2})
    report = compiled(config, "2xh100-8")
    assert report.calls["tokamax ragged_dot"] == 7 * 2
    assert {"ragged-all-to-all", "all-gather", "reduce-scatter"} <= {kind for kind, _ in report.traffic}
    assert report.across("ragged-all-to-all", "expert") == 0 < report.across("all-gather", "fsdp")
    assert jax.default_backend() == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100-1", "a100-8", "a100-40gb-8", "h200-8", "b200-8"])
def test_the_same_on_every_gpu(make_config, topology):
    chips = parse_topology(topology).chips
    compiled(small(make_config, global_batch_size=chips, mesh={"data": 1, "fsdp": chips}), topology)


@pytest.mark.slow
@pytest.mark.parametrize("habit", [True, False])
def test_a_layer_more_costs_its_gradient_and_no_copy_of_a_stack(make_config, monkeypatch, habit):
    """Without the work-around (`habit`) a second stack in fp32, in another layout: gone where it costs no more."""
    if habit:
        monkeypatch.setattr(quirks, "row_major", lambda w: w)
    temporaries, changes = [], {"global_batch_size": 8, "mesh": {"data": 1, "fsdp": 8}}
    for layers in (4, 12):
        config = small(make_config, optimizer={"state_dtype": "int8"}, **changes)
        model = config.model.model_copy(update={"num_hidden_layers": layers, "hidden_size": 2048})
        report = compiled(config.model_copy(update={"model": model}), "h100-8")
        temporaries.append((report.memory.temporaries, report.memory.parameters))
    (few, small_stack), (many, large_stack) = temporaries
    cost = (many - few) / (large_stack - small_stack)
    assert (cost > 1.8) if habit else (cost < 1.4)


def test_a_plan_says_which_kernels_run_there_and_warns_where_one_falls_back(make_config, monkeypatch):
    monkeypatch.setattr(gpus, "has_cuda_plugin", lambda: False)
    monkeypatch.setattr("mixtral_jax.kernels.choice.has_tokamax", lambda: False)  # here; there it will be

    def lines(topology="h100-8", **compute):
        made = small(make_config, global_batch_size=8, mesh={"data": 1, "fsdp": 8}, compute=compute)
        report = plan(made, topology=topology)
        assert report.to_json()["kernels"]["experts"]["kernel"] == report.kernels["experts"].kernel
        return "\n".join(report.lines())

    assert "experts tokamax" in lines() and "WARNING" not in lines()
    assert "attention triton" in lines("a100-8")
    assert "WARNING: attention falls back on chunked: " in lines(dtype="float32")
    assert "WARNING: experts falls back on ragged_dot" in lines(moe={"matmul": "ragged_dot"})
    with pytest.raises(ValueError, match=r"compute\.moe\.matmul is megablox, which needs a TPU"):
        lines(moe={"matmul": "megablox"})
    with pytest.raises(ValueError, match=r"compute\.attention is splash, which needs a TPU"):
        run(small(make_config, compute={"attention": "splash"}), topology="h100-8", search=True)
    monkeypatch.setattr(gpus, "has_cuda_plugin", lambda: True)
    with pytest.raises(ValueError, match=r"tokamax, .* is not installed: pip install"):
        lines()


def test_a_program_that_is_not_compiled_is_planned_by_closed_form_and_says_why(make_config, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("WGMMA needs more\nand a page of it")

    monkeypatch.setattr(gpus, "has_cuda_plugin", lambda: True)
    monkeypatch.setattr("mixtral_jax.kernels.choice.has_tokamax", lambda: True)
    monkeypatch.setattr("mixtral_jax.train.plan.planner.plan_mesh", lambda *_: None)
    monkeypatch.setattr("mixtral_jax.train.plan.planner.compile_step", refuse)
    report = plan(small(make_config, global_batch_size=8, mesh={"data": 1, "fsdp": 8}), topology="b200-8")
    said = f"closed form: jax {jax.__version__} does not compile this for b200-8 (WGMMA needs more)"
    assert report.source == said and report.fits and report.counted is None


def test_the_roofline_of_a_gathered_layer(make_config):
    """By hand: 64 GPUs gather 8x7B in bf16 twice and scatter its gradient in bf16, all in rings over 8 rails."""
    config = make_config(model=BIG, seq_len=4096, global_batch_size=64, mesh={"data": 1, "fsdp": 64})
    sizes = config.mesh.sizes(64)
    sent = {("closed form", axes): amount for axes, amount in traffic(config, sizes).items()}
    limits = roofline(config, SIXTYFOUR, flops=flops(config, sizes, SIXTYFOUR.machine).total, sent=sent)
    model = config.model
    numbers = model.num_params() - model.num_hidden_layers * 2 * model.hidden_size - model.hidden_size
    across, inside = (3 * 2 * numbers * 63 / 64 * share for share in (1 / 8, 7 / 8))
    assert limits.network == pytest.approx(max(across / 50e9, inside / 450e9), rel=0.01)
