"""The presets on their machines, compiled whole: minutes each, so slow. Figures: docs/benchmarks.md."""

from pathlib import Path

import pytest

from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.plan import has_cuda_plugin, plan
from mixtral_jax.train.plan.placement import memory

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = CONFIGS / "pretrain"
# MaxText's own ahead-of-time compilation of the same model, slice, precision and sequences a chip: peak HBM in GB.
MAXTEXT = {
    ("8x7b-v5p-64", 64): 34.4,
    ("8x7b-v5p-64", 256): 49.6,
    ("8x7b-v5p-64", 768): 92.3,
    ("8x7b-v5e-256", 256): 9.3,
    ("8x7b-v5e-256", 512): 11.3,
    ("8x7b-v6e-256", 2048): 24.3,
}
# Once a step, and 0.1 % of its traffic: the TPU compiler reduces 8x22B's gradient of the head to every chip.
HEAD = {"8x22b-v5p-256": {"6144x32000"}, "8x22b-v6e-256": {"8x6144x4000"}}


def compiled(name, *changes):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    config = load_config(PRESETS / f"mixtral-{name}.yaml", changes).config
    report = plan(config, topology=name.split("-", 1)[1])
    assert report.source == "compiled" and report.fits
    # every product is one that the closed form knows, and none is computed more often
    assert report.unknown_loops == 0
    for part in ("dots", "experts", "attention", "total"):
        assert 0.98 <= getattr(report.counted, part) / getattr(report.expected, part) <= 1.02, part
    assert set(report.reduced_weights) <= HEAD.get(name, set())
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), MAXTEXT)
def test_8x7b_needs_no_more_memory_than_maxtext(name, rows):
    report = compiled(name, f"global_batch_size={rows}", f"micro_batch_size={rows}")
    assert report.memory.peak <= MAXTEXT[name, rows] * 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8x7b-v5p-128", "8x22b-v5p-256", "8x22b-v6e-256"])
def test_every_other_preset_fits_its_slice(name):
    compiled(name)


@pytest.mark.slow
def test_expert_parallelism_sends_rows_by_a_ragged_all_to_all():
    report = compiled("8x7b-v5p-128", "mesh.expert=8")
    assert ("ragged-all-to-all", "expert") in report.traffic
    weights = sum(amount for (kind, _), amount in report.traffic.items() if kind == "all-gather")
    assert weights < 50e9  # pure FSDP gathers 183 GB


@pytest.mark.slow
def test_rows_of_32k_fit_over_four_chips():
    long = ["seq_len=32768", "mesh.fsdp=16", "mesh.context=4", "global_batch_size=16", "micro_batch_size=16"]
    report = compiled("8x7b-v5p-128", *long)
    assert ("all-gather", "context") in report.traffic


EXPERT_8 = ["mesh.expert=8", "compute.remat=full"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("name", "topology", "changes"),
    [
        ("pretrain/mixtral-8x7b-h100-64", "h100-64", []),
        ("pretrain/mixtral-8x7b-h100-64", "h100-64", EXPERT_8),
        ("sft/mixtral-8x7b-lora-h100-8", "h100-8", []),
    ],
)
def test_gpu_presets_fit_and_the_closed_form_is_near(name, topology, changes):
    if not has_cuda_plugin():
        pytest.skip("compiling for a GPU needs jax's CUDA plugin (extra: aot-gpu)")
    pytest.importorskip("tokamax", reason="compiling for a GPU needs tokamax (extra: aot-gpu)")
    config = load_config(CONFIGS / f"{name}.yaml", changes).config
    report = plan(config, topology=topology)
    assert report.source == "compiled" and report.fits and report.unknown_loops == 0
    most = 1.02 if config.adapters is None else 1.03  # ranks are filled up to a tile's columns
    for part in ("dots", "experts", "attention", "total"):
        assert 0.98 <= getattr(report.counted, part) / getattr(report.expected, part) <= most, part
    assert report.reduced_weights == () and not any(choice.fallback for choice in report.kernels.values())
    if config.adapters is None:  # theirs is near with the flags of a run alone, which only a process of its own has
        assert sum(memory(config, report.sizes, "gpu").values()) == pytest.approx(report.memory.peak, rel=0.1)
