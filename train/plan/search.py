"""Which mesh, micro-batch and rematerialisation: all that could be, pruned by arithmetic, ranked, and as a table."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mixtral_jax.parallel import MESH_AXES
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.plan.chips import Topology, larger
from mixtral_jax.train.plan.report import PlanReport, estimate, gb, mesh_text

EXPERT_AXES = (1, 2, 4, 8)
CONTEXT_AXES = (1, 2, 4, 8, 16)
ROWS_PER_SHARD = (1, 2, 4, 8, 16, 32)
REMATS = ("minimal", "attention", "experts_input", "full")  # no figures of the way to a host, which `offload` takes
HEAD = ("", "mesh", "rows/chip", "accum.", "remat", "memory", "MFU <=", "if serial", "tok/s/chip", "bound by")


def candidates(config: RunConfig, topology: Topology) -> list[PlanReport]:
    """All that the closed form lets fit, the fastest first; the global batch stays what the file says."""
    found = []
    for variant in _variants(config, topology):
        try:
            report = estimate(variant, topology)
        except ValueError:  # this mesh does not divide a matrix: blocks of a quantised base, for one
            continue
        if report.fits:
            found.append(report)
    return ranked(found)


def ranked(reports: Iterable[PlanReport]) -> list[PlanReport]:
    """What fits before what does not, then by tokens a second where half of the traffic is hidden."""
    return sorted(reports, key=lambda report: (not report.fits, -likely_rate(report)))


def likely_rate(report: PlanReport) -> float:
    """Tokens a second and chip between the two bounds: all traffic hidden, and none."""
    assert report.roofline is not None, "a search is for machines with published figures"
    return report.rate(report.roofline.likely)


def what_fits(config: RunConfig, topology: Topology) -> str:
    """Half a sentence: the fastest run that fits by closed form, here or on the smallest larger slice with any."""
    for there in (topology, *larger(topology)):
        for report in candidates(config, there):
            # the run itself was found not to fit, whatever the closed form says
            if there is not topology or _way(report.config, there) != _way(config, there):
                where = "" if there is topology else f"nothing fits {topology.name}; on {there.name} "
                return f"{where}this would, by closed form: {describe(report.config)}"
    return (
        f"nothing fits {topology.name} or larger slices of {topology.chip.name} with seq_len {config.seq_len} and "
        f"global_batch_size {config.global_batch_size}: take chips with more memory, a shorter seq_len, or a "
        "global_batch_size with more divisors"
    )


def _way(config: RunConfig, topology: Topology) -> tuple[dict[str, int], int, str]:
    return config.mesh.sizes(topology.chips), config.rows_per_micro_batch, config.compute.remat


def describe(config: RunConfig) -> str:
    """What a search chose."""
    axes = mesh_text({axis: getattr(config.mesh, axis) for axis in MESH_AXES})
    return f"{axes}, {config.micro_batch_size} sequences a micro-batch, remat {config.compute.remat}"


def table(reports: Sequence[PlanReport]) -> list[str]:
    """Lines of a table in the order given."""
    rows = [HEAD, *(_row(i, r) for i, r in enumerate(reports, 1))]
    widths = [max(len(row[c]) for row in rows) for c in range(len(HEAD))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(rank: int, r: PlanReport) -> tuple[str, ...]:
    assert r.roofline is not None
    memory = gb(r.memory.peak) if r.fits else f"{gb(r.memory.too_much)} too much"
    return (
        str(rank), mesh_text(r.sizes), f"{r.sequences:g}", str(r.config.accumulation), r.config.compute.remat, memory,
        f"{r.roofline.mfu:.1%}", f"{r.roofline.mfu_serial:.1%}", f"{likely_rate(r):,.0f}", r.roofline.bound,
    )  # fmt: skip


def _variants(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    chips, model = topology.chips_per_slice, config.model
    for expert, context, rows in itertools.product(EXPERT_AXES, CONTEXT_AXES, ROWS_PER_SHARD):
        fsdp = chips // (expert * context)
        micro = rows * fsdp * expert * topology.slices
        if (
            chips % (expert * context) or model.num_local_experts % expert or config.seq_len % (2 * context)
            or model.hidden_size % (fsdp * expert) or config.global_batch_size % micro
        ):  # fmt: skip
            continue
        axes = {"data": 1, "fsdp": fsdp, "expert": expert, "tensor": 1, "context": context}
        slow = {"dcn_data": topology.slices, "dcn_fsdp": 1}
        for remat in REMATS:
            changes: dict[str, Any] = {
                "mesh": config.mesh.model_copy(update=axes | slow),
                "micro_batch_size": micro,
                "compute": config.compute.model_copy(update={"remat": remat}),
            }
            yield config.model_copy(update=changes)
