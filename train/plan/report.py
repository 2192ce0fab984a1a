"""What `plan` says: a table for people, one object for machines."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mixtral_jax.train.plan.chips import Topology
from mixtral_jax.train.plan.closed_form import Flops
from mixtral_jax.train.plan.compile import Memory
from mixtral_jax.train.plan.roofline import Roofline


class Counted(NamedTuple):
    """FLOPs of one chip and step found in the compiled program."""

    dots: float
    experts: float
    attention: float
    unknown_loops: int = 0  # loops whose length depends on the data; their products are in no figure

    @property
    def total(self) -> float:
        """All three."""
        return self.dots + self.experts + self.attention


class PlanReport(NamedTuple):
    """Everything is for one chip and one optimizer step."""

    run_name: str
    topology: Topology
    mesh: dict[str, int]
    remat: str
    tokens_per_step: int  # of the whole machine
    sequences_per_chip: float  # of one micro-batch
    accumulation: int
    source: str  # compiled, or closed form and why
    memory: Memory
    expected: Flops
    counted: Counted | None
    traffic: dict[tuple[str, str], float]  # (kind, mesh axes) -> bytes sent
    asynchronous: float  # share of those bytes that the compiler overlaps with other work
    reduced_weights: tuple[str, ...]  # weights that are all-reduced; there should be none
    roofline: Roofline | None  # None: a machine without published figures
    compile_seconds: float
    tokens: float | None  # of the whole training

    @property
    def fits(self) -> bool:
        """Whether the step fits into the chip."""
        return self.memory.too_much <= 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of one chip, at the bound."""
        return None if self.roofline is None else self.tokens_per_step / self.topology.chips / self.roofline.seconds

    def lines(self) -> list[str]:
        """For a terminal."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        t, m = self.topology, self.memory
        mesh = " x ".join(f"{a} {n}" for a, n in self.mesh.items() if n > 1) or "one device"
        yield f"{self.run_name} on {t.name}: {t.chips} chips, mesh {mesh}, remat {self.remat}"
        yield (
            f"  {self.tokens_per_step:,} tokens a step; {self.sequences_per_chip:g} sequences per chip x "
            f"{self.accumulation} micro-batches; {self.source}"
        )
        verdict = "fits" if self.fits else f"does NOT fit: {gb(m.too_much)} too much"
        yield f"memory per chip   {gb(m.peak)} of {gb(m.limit)}: {verdict}"
        kept = "".join(f"{name} {gb(n)}, " for name, n in (("frozen", m.frozen), ("reference", m.reference)) if n)
        yield (
            f"  parameters {gb(m.parameters)}, {kept}optimizer {gb(m.optimizer)}, gradients and temporaries "
            f"{gb(m.temporaries)}, code {gb(m.code)}"
        )
        yield from self._flops_lines()
        yield f"traffic per chip  {gb(sum(self.traffic.values()))} sent a step; {self.asynchronous:.0%} asynchronous"
        for (kind, axes), amount in sorted(self.traffic.items(), key=lambda item: -item[1]):
            yield f"  {kind:<20} {axes:<14} {gb(amount)}"
        if self.reduced_weights:
            yield f"  WARNING: weights reduced whole to every chip: {', '.join(self.reduced_weights)}"
        yield from self._roofline_lines()
        yield f"compiled in       {self.compile_seconds:.0f} s" if self.compile_seconds else "compiled in       not"

    def _roofline_lines(self) -> Iterator[str]:
        t, r, rate = self.topology, self.roofline, self.tokens_per_second
        if r is None or rate is None:
            yield "roofline          none: no figures are published for this machine"
            return
        yield (
            f"roofline          compute {r.compute:.3f} s, memory {r.memory:.3f} s, network {r.network:.3f} s a step: "
            f"bound by {r.bound}"
        )
        yield (
            f"  MFU at most {r.mfu:.1%} (attention over all pairs; {r.mfu_causal:.1%} causal), "
            f"{r.mfu_serial:.1%} if no traffic is hidden; {rate:,.0f} tokens a second and chip"
        )
        if self.tokens:
            seconds = self.tokens / (rate * t.chips)
            yield (
                f"  {self.tokens:.3g} tokens: {seconds / 86400:.1f} days, {seconds * t.chips / 3600:,.0f} chip-hours "
                "at the bound"
            )

    def _flops_lines(self) -> Iterator[str]:
        e, c = self.expected, self.counted
        again = e.total - e.useful
        yield (
            f"compute per chip  {tera(e.total)} by closed form: {tera(e.useful)} useful (causal), {tera(again)} "
            "recomputed or masked in part"
        )
        if c is not None and c.unknown_loops:
            yield (
                f"  in the program {tera(c.total)}, without {c.unknown_loops} loops whose length depends on the data "
                "(experts, attention)"
            )
        elif c is not None:
            yield (
                f"  in the program {tera(c.total)} ({c.total / e.total:.3f} x): products {tera(c.dots)} "
                f"({c.dots / e.dots:.3f} x), experts {tera(c.experts)} ({c.experts / e.experts:.3f} x), "
                f"attention {tera(c.attention)} ({c.attention / e.attention:.3f} x)"
            )

    def to_json(self) -> dict[str, Any]:
        """Bytes, FLOPs and seconds as numbers."""
        t = self.topology
        return {
            "run_name": self.run_name,
            "topology": t.name,
            "chips": t.chips,
            "mesh": self.mesh,
            "remat": self.remat,
            "tokens_per_step": self.tokens_per_step,
            "sequences_per_chip": self.sequences_per_chip,
            "accumulation": self.accumulation,
            "source": self.source,
            "fits": self.fits,
            "memory": self.memory._asdict(),
            "flops": {
                "expected": self.expected._asdict() | {"total": self.expected.total},
                "counted": None if self.counted is None else self.counted._asdict() | {"total": self.counted.total},
            },
            "traffic": [{"kind": k, "axes": a, "bytes": b} for (k, a), b in self.traffic.items()],
            "asynchronous": self.asynchronous,
            "reduced_weights": list(self.reduced_weights),
            "roofline": None if self.roofline is None else self.roofline._asdict() | {"seconds": self.roofline.seconds},
            "tokens_per_second_per_chip": self.tokens_per_second,
            "compile_seconds": self.compile_seconds,
        }


def gb(size: float) -> str:
    """Decimal gigabytes, as chips are sold."""
    return f"{size / 1e9:.2f} GB"


def tera(flops: float) -> str:
    """TFLOP, and GFLOP where they are few."""
    return f"{flops / 1e12:.1f} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.2f} GFLOP"
