"""The table of a search: what was compiled, best first, each in one line."""

from collections.abc import Sequence

from mixtral_jax.train.plan.report import PlanReport, gb

HEAD = ("", "mesh", "rows/chip", "accum.", "remat", "memory", "MFU <=", "if serial", "tok/s/chip", "bound by")


def ranked(reports: Sequence[PlanReport]) -> list[PlanReport]:
    """What fits before what does not, then by tokens a second where half of the traffic is hidden."""
    return sorted(reports, key=lambda r: (not r.fits, -expected_rate(r)))


def expected_rate(report: PlanReport) -> float:
    """Tokens a second and chip between the two bounds: all traffic hidden, and none.

    Raises:
        ValueError: a report without a roofline, which has no rate.
    """
    r = report.roofline
    if r is None:
        raise ValueError(f"{report.topology.name} has no published figures to rank by")
    seconds = (r.seconds + max(r.compute, r.memory) + r.network) / 2
    return report.tokens_per_step / report.topology.chips / seconds


def table(reports: Sequence[PlanReport]) -> list[str]:
    """Lines of a table in the order given."""
    rows = [HEAD, *(_row(i, r) for i, r in enumerate(reports, 1))]
    widths = [max(len(row[c]) for row in rows) for c in range(len(HEAD))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(rank: int, r: PlanReport) -> tuple[str, ...]:
    mesh = " x ".join(f"{a} {n}" for a, n in r.mesh.items() if n > 1) or "one device"
    assert r.roofline is not None
    memory = gb(r.memory.peak) if r.fits else f"{gb(r.memory.too_much)} too much"
    return (
        str(rank), mesh, f"{r.sequences_per_chip:g}", str(r.accumulation), r.remat, memory,
        f"{r.roofline.mfu:.1%}", f"{r.roofline.mfu_serial:.1%}", f"{expected_rate(r):,.0f}", r.roofline.bound,
    )  # fmt: skip
