"""The plan: names of machines, the text of compiled programs, arithmetic against counting, and a real compilation."""

import json
import os
from argparse import ArgumentTypeError

import jax
import pytest

from mixtral_jax.config import MixtralConfig
from mixtral_jax.train.commands.table import _count
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan import plan, run
from mixtral_jax.train.plan.chips import CHIPS, parse_topology
from mixtral_jax.train.plan.closed_form import bandwidth
from mixtral_jax.train.plan.compile import plan_mesh
from mixtral_jax.train.plan.hlo import Collective, axes_of, kernel_name, read_program, sent_by_axis
from mixtral_jax.train.plan.planner import _reduced_weights
from mixtral_jax.train.plan.report import gb, span

PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%piece.1 (p: bf16[4,8]) -> bf16[32,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, @CHAIN@
}

%piece.2 (p: bf16[4,8]) -> bf16[32,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, @CHAIN@
}

%body (state: (s32[], bf16[4,8], f32[16,8])) -> (s32[], bf16[4,8], f32[16,8]) {
  %state = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %w = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %begin = bf16[32,8]{1,0} fusion(%w), kind=kCustom, calls=%piece.1
  %end = bf16[32,8]{1,0} fusion(%w), kind=kCustom, calls=%piece.2
  %x = bf16[16,32]{1,0} custom-call(%end), custom_call_target="tpu_custom_call", backend_config="{
}
"
  %stack = bf16[2,32,8]{2,1,0} bitcast(%end)
  %gmm.3 = bf16[16,8]{1,0} custom-call(%end, %stack), custom_call_target="tpu_custom_call"
  %dot = f32[16,8]{1,0} dot(%x, %end), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %conv = f32[16,8]{1,0} convolution(%x, %end), dim_labels=bf_io->bf
  %all-reduce = f32[16,8]{1,0} all-reduce(%dot), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) tuple(%state)
}

%condition (state: (s32[], bf16[4,8], f32[16,8])) -> pred[] {
  %state = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[4,8]) -> f32[] {
  %w = bf16[4,8]{1,0} parameter(0)
  %start = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) tuple(%w)
  %loop = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %zero = f32[] constant(0)
}
""".replace("@CHAIN@", 'replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, frontend_attributes={chain_id="1"}')


def test_a_program_is_counted_with_its_loops():
    program = read_program(PROGRAM)
    assert program.dot_flops == 5 * 2 * (2 * 16 * 32 * 8)
    assert program.kernels == {"x": 5, "gmm": 5}
    assert program.grouped == {(32, 8): 5}
    assert program.unknown_loops == 0
    gathered, reduced = sorted(program.collectives, key=lambda c: c.kind)
    assert gathered == Collective("all-gather", 512, 5, ((0, 2, 4, 6), (1, 3, 5, 7)), True, ((32, 8),))
    assert reduced == Collective("all-reduce", 512, 5, ((0, 1, 2, 3), (4, 5, 6, 7)), False, ((16, 8),))


@pytest.mark.parametrize(
    ("named", "listed"),
    [
        ("mesh['fsdp'=4,'expert'=2] {'fsdp'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['fsdp'=4,'expert'=2] {'expert'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
    ],
)
def test_groups_are_read_by_the_names_of_their_axes(named, listed):
    """As jax 0.12 writes them."""
    (gathered,) = (
        c for c in read_program(PROGRAM.replace("{{0,2,4,6},{1,3,5,7}}", named)).collectives if c.kind == "all-gather"
    )
    assert gathered.groups == listed


@pytest.mark.parametrize(
    ("instruction", "kernel"),
    [
        ("gmm.66", "gmm"),
        ("transpose_jvp_jit_tgmm___", "tgmm"),
        ("splash_mha_dq_segmented_no_residuals.9", "splash_mha_dq"),
    ],
)
def test_kernels_by_their_names(instruction, kernel):
    assert kernel_name(instruction) == kernel


def test_products_in_loops_of_unknown_length_are_not_guessed():
    program = read_program(PROGRAM.replace("constant(5)", "parameter(1)"))
    assert program.unknown_loops == 1 and program.dot_flops == 0
    assert program.kernels == {"x": 1, "gmm": 1} and len(program.collectives) == 2


def test_traffic_is_what_leaves_a_chip_by_axis():
    mesh = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}
    gathered, reduced = sorted(read_program(PROGRAM).collectives, key=lambda c: c.kind)
    assert axes_of(gathered, mesh) == "fsdp"
    assert axes_of(reduced, mesh) == "fsdp+expert"
    sent = sent_by_axis((gathered, reduced), mesh)
    assert sent == {("all-gather", "fsdp"): 5 * 512 * 3 / 4, ("all-reduce", "fsdp+expert"): 5 * 512 * 2 * 3 / 4}


@pytest.mark.parametrize(
    ("name", "chips", "libtpu"),
    [("v5p-64", 32, "v5p:4x4x2"), ("v5p-128", 64, "v5p:4x4x4"), ("v5e-256", 256, "v5e:16x16"),
     ("v6e-8", 8, "v6e:2x4"), ("2xv5e-256", 512, "v5e:16x16"), ("v5p:2x2x1", 4, "v5p:2x2x1"), ("h100-64", 64, None),
     ("v5p:4x4x12", 192, "v5p:4x4x12"), ("v5p:2x4x4", 32, "v5p:2x4x4"), ("v5e:4x8", 32, "v5e:4x8"),
     ("h100-4", 4, None), ("2xh100-8", 16, None), ("a100-3", 3, None), ("a100-40gb-16", 16, None), ("h200-8", 8, None),
     ("b200-72", 72, None)],
)  # fmt: skip
def test_names_of_machines(name, chips, libtpu):
    topology = parse_topology(name)
    assert (topology.chips, topology.libtpu) == (chips, libtpu)


UNKNOWN = ["v4-8", "v5p-63", "v5p-6", "v5e", "0xv5e-256", "v5e-256x", "h100", "h100-12", "v5e:3x5", "3xh100-4", "a100-"]


@pytest.mark.parametrize("name", [*UNKNOWN, "v5p:4x4", "v5p:3x3x3", "v5p:0x4x4", "v5p:4000x4x4", "v5e:2x2x2"])
def test_an_unknown_machine_lists_the_known(name):
    with pytest.raises(UserError, match=r"unknown topology .*v5p-64, .*v5e-256, .*a100-40gb-N, h100-N.* whole nodes"):
        parse_topology(name)


def test_a_torus_axis_has_only_its_own_links():
    v5p, sizes = parse_topology("v5p-128"), {"fsdp": 16, "context": 4}
    whole = bandwidth(v5p, "fsdp+context", sizes)
    assert whole == CHIPS["v5p"].network
    assert bandwidth(v5p, "context", sizes) == pytest.approx(whole / 3)
    assert bandwidth(v5p, "fsdp", sizes) == pytest.approx(whole * 2 / 3)


BIG = MixtralConfig.preset("mixtral-8x7b").model_dump()


def test_without_jaxs_cuda_plugin_gpus_are_planned_by_closed_form(make_config, monkeypatch):
    monkeypatch.setattr("mixtral_jax.train.plan.gpus.has_cuda_plugin", lambda: False)
    config = make_config(
        model=BIG, seq_len=4096, global_batch_size=64, compute={"remat": "full"},
        mesh={"data": 1, "fsdp": 8, "expert": 8},
    )  # fmt: skip
    report = plan(config, topology="h100-64")
    text = "\n".join(report.lines(tokens=1e12))
    assert "pip install 'mixtral-jax[aot-gpu]'" in report.source and "days" in text and report.fits
    assert report.counted is None and report.compile_seconds == 0
    bound = report.roofline.mfu
    small = "\n".join(report.lines(tokens=1e6, mfu=bound / 2)).splitlines()
    at_half = next(i for i, line in enumerate(small) if f"at an MFU of {bound / 2:.1%}" in line)
    assert ["minutes" in line for line in small[at_half + 1 : at_half + 3]] == [True, True]
    assert "at the bound" in small[at_half + 1] and f"at an MFU of {bound / 2:.1%}" in small[at_half + 2]
    assert "above the bound" in "\n".join(report.lines(mfu=1.0))
    content = json.loads(json.dumps(report.to_json()))
    assert content["chips"] == 64 and content["memory"]["peak"] > 0


def test_one_chip_that_is_not_there_is_a_mesh_too(make_config):
    """Or the step would be compiled for this machine's CPU."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    mesh = plan_mesh(make_config(mesh={"data": 1}), parse_topology("v5e-1"))
    assert mesh is not None and [device.platform for device in mesh.devices.flat] == ["tpu"]


def test_without_libtpu_the_closed_form_says_which_extra_installs_it(make_config, monkeypatch):
    monkeypatch.setattr("mixtral_jax.train.plan.compile.has_libtpu", lambda: False)
    config = make_config(model=BIG, seq_len=4096, global_batch_size=32, mesh={"data": 1, "fsdp": 32})
    assert "pip install 'mixtral-jax[aot]'" in plan(config, topology="v5p-64").source


def test_sizes_and_times_in_units_that_say_something():
    assert [gb(x) for x in (2.5e9, 1e8, 3.2e7, 1500, 0)] == ["2.50 GB", "0.10 GB", "32.00 MB", "1.5 kB", "0.0 kB"]
    assert [span(x) for x in (864000, 7200, 90)] == ["10.0 days", "2.0 hours", "1.5 minutes"]
    assert [_count(x) for x in ("10B", "1.5t", "3e5", "2K")] == [1e10, 1.5e12, 3e5, 2e3]
    with pytest.raises(ArgumentTypeError, match="'10Q' is no number such as 1e10 or 10B"):
        _count("10Q")


def test_gradients_of_plain_data_parallelism_are_no_warning(make_config):
    config = make_config(mesh={"data": 4, "fsdp": 2})
    width = config.model.hidden_size
    rows = [((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7)), ()]
    found = [Collective("all-reduce", 1, 1, groups, False, ((width, width),)) for groups in rows]
    sizes = config.mesh.sizes(8)
    assert [bool(_reduced_weights(config, [c], sizes)) for c in found] == [False, True, True]


def test_what_cannot_be_planned(make_config, monkeypatch):
    monkeypatch.setattr("mixtral_jax.train.plan.gpus.has_cuda_plugin", lambda: False)
    config = make_config(model=BIG, seq_len=4096, global_batch_size=64, mesh={"data": 1, "fsdp": 64})
    with pytest.raises(UserError, match=r"--topology .* or --devices"):
        plan(config)
    with pytest.raises(ValueError, match="64 devices, but there are 32"):
        plan(config, topology="v5p-64")
    for tokens in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"--tokens is {tokens:g}: .* positive"):
            run(config, topology="v5p-128", tokens=tokens)
    for mfu in (0.0, 40.0, float("nan")):
        with pytest.raises(UserError, match=f"--mfu is {mfu:g}: a share"):
            run(config, topology="v5p-128", mfu=mfu)
    with pytest.raises(
        UserError, match=r"does not fit h100-8: .* GB too much per chip; nothing fits h100-8; on h100-16"
    ):
        run(config.model_copy(update={"mesh": config.mesh.model_copy(update={"fsdp": 8})}), topology="h100-8")


def test_the_local_mesh_is_compiled_for_its_cpus(make_config, tmp_path, capsys):
    config = make_config(mesh={"data": 1, "fsdp": 4, "expert": 2})
    file = tmp_path / "plan.json"
    assert run(config, devices=8, json=str(file)) == 0
    content = json.loads(file.read_text())
    assert content["chips"] == 8 == len(jax.devices())
    kinds = {t["kind"] for t in content["traffic"]}
    assert "all-gather" in kinds and "reduce-scatter" in kinds
    printed = capsys.readouterr().out
    assert "8 local CPU devices" in printed and "roofline          none" in printed
    assert "in the program" in printed and "loops whose length depends on the data" in printed
    # all products outside of the experts' loops: projections, head, and attention, whose rows are short, over all pairs
    counted, expected = (content["flops"][kind] for kind in ("counted", "expected"))
    assert counted["unknown_loops"] > 0 and counted["experts"] == 0
    assert 0.99 * expected["dots"] <= counted["dots"] <= expected["dots"] + 2 * expected["attention"]
    assert content["roofline"] is None and content["tokens_per_second_per_chip"] is None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert content["memory"]["limit"] == machine / 8


@pytest.mark.parametrize(
    ("lora", "reference", "kept"),
    [(None, "frozen", "reference"), ({"rank": 2}, "lora_base", "frozen"), (None, "precomputed", None)],
)
def test_dpo_is_planned_with_its_reference(make_tuning_config, lora, reference, kept):
    config = make_tuning_config(
        "dpo", lora=lora, dpo={"reference": reference}, global_batch_size=8, mesh={"data": 1, "fsdp": 8}
    )
    report = plan(config, devices=8)
    held = {name: getattr(report.memory, name) for name in ("frozen", "reference")}
    assert [name for name, size in held.items() if size > 0] == ([kept] if kept else [])
    base = config.model.num_params() * 4 / 8
    if kept:
        assert held[kept] == pytest.approx(base, rel=0.1)  # small vectors are on every device
    else:
        assert report.memory.parameters == pytest.approx(base, rel=0.1)
    assert kept is None or f"{kept} " in "\n".join(report.lines())


SMALL = {
    **BIG, "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def test_a_step_with_every_kernel_compiles_for_a_tpu_slice(make_config):
    """megablox, splash and the ragged all-to-all on v5e-8; FLOPs of the closed form, no weight reduced whole."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    config = make_config(
        model=SMALL, seq_len=1024, global_batch_size=8, mesh={"data": 1, "fsdp": 4, "expert": 2},
        compute={"remat": "full"},
    )  # fmt: skip
    report = plan(config, topology="v5e-8")
    assert report.fits and report.source == "compiled"
    assert report.counted.total <= 1.02 * report.expected.total
    assert report.counted.total >= 0.99 * report.expected.total
    assert report.reduced_weights == ()
    kinds = {kind for kind, _ in report.traffic}
    assert {"ragged-all-to-all", "all-gather", "reduce-scatter"} <= kinds
    assert ("ragged-all-to-all", "expert") in report.traffic and ("all-gather", "fsdp") in report.traffic
