"""What `plan` says: lines for people, one object for machines; and all of it that arithmetic can say."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mixtral_jax.kernels import Choice
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.plan import closed_form
from mixtral_jax.train.plan.chips import NODE_GPUS, Topology
from mixtral_jax.train.plan.closed_form import Flops, Roofline
from mixtral_jax.train.plan.compile import missing_compiler
from mixtral_jax.train.plan.placement import Memory, local_tokens, memory, resident, saved_bytes


class PlanReport(NamedTuple):
    """Everything is for one chip and one optimizer step."""

    config: RunConfig
    topology: Topology
    source: str  # compiled, or closed form and why
    memory: Memory
    expected: Flops
    traffic: dict[tuple[str, str], float]  # (kind, mesh axes) -> bytes sent
    roofline: Roofline | None  # None: a machine without published figures
    counted: Flops | None = None  # in the compiled program
    calls: Mapping[str, int] = {}  # of kernels in the compiled program, in a step
    unknown_loops: int = 0  # of the program, whose length depends on the data; their products are in no figure
    asynchronous: float = 0.0  # share of the traffic that the compiler overlaps with other work
    reduced_weights: tuple[str, ...] = ()  # weights that are all-reduced; there should be none
    compile_seconds: float = 0.0

    @property
    def sizes(self) -> dict[str, int]:
        """Of all axes of the mesh."""
        return self.config.mesh.sizes(self.topology.chips)

    @property
    def sequences(self) -> float:
        """Of one micro-batch."""
        return local_tokens(self.config, self.sizes) / self.config.seq_len

    @property
    def fits(self) -> bool:
        """Whether the step fits into the chip."""
        return self.memory.too_much <= 0

    def across(self, kind: str, axes: str) -> float:
        """Of a part of the traffic the bytes that leave a node of GPUs."""
        if not self.topology.is_gpu:
            return 0.0
        share = closed_form.share_across(self.topology, axes, self.sizes, self.config.mesh.slow, kind)
        return share * self.traffic[kind, axes]

    @property
    def kernels(self) -> dict[str, Choice]:
        """What attention and the experts run on there, and why."""
        return closed_form.kernels(self.config, self.sizes, self.topology.machine)

    def rate(self, seconds: float) -> float:
        """Tokens a second, of steps of so many seconds."""
        return self.config.tokens_per_step / self.topology.chips / seconds

    def lines(self, tokens: float | None = None, mfu: float | None = None) -> Iterator[str]:
        """For a terminal; of a training of so many `tokens` also how long it takes, at the bound and at an `mfu`."""
        c, t, m = self.config, self.topology, self.memory
        yield f"{c.run_name} on {t.name}: {t.chips} chips, mesh {mesh_text(self.sizes)}, remat {c.compute.remat}"
        yield (
            f"  {c.tokens_per_step:,} tokens a step; {self.sequences:g} sequences per chip x "
            f"{c.accumulation} micro-batches; {self.source}"
        )
        verdict = "fits" if self.fits else f"does NOT fit: {gb(m.too_much)} too much"
        yield f"memory per chip   {gb(m.peak)} of {gb(m.limit)}: {verdict}"
        kept = "".join(f"{name} {gb(n)}, " for name, n in (("frozen", m.frozen), ("reference", m.reference)) if n)
        yield (
            f"  parameters {gb(m.parameters)}, {kept}optimizer {gb(m.optimizer)}, gradients and temporaries "
            f"{gb(m.temporaries)}, code {gb(m.code)}"
        )
        saved = saved_bytes(c, self.sizes).items()
        yield f"  a token saves, in each layer, by remat: {', '.join(f'{remat} {kilo(size)}' for remat, size in saved)}"
        yield from self._kernel_lines()
        yield from self._flops_lines()
        yield f"traffic per chip  {gb(sum(self.traffic.values()))} sent a step; {self.asynchronous:.0%} asynchronous"
        for (kind, axes), amount in sorted(self.traffic.items(), key=lambda item: -item[1]):
            across = f", {gb(self.across(kind, axes))} of it between nodes" if t.chips > NODE_GPUS and t.is_gpu else ""
            yield f"  {kind:<20} {axes:<14} {gb(amount)}{across}"
        if t.is_gpu:
            yield (
                f"  a GPU sends {t.chip.network / 1e9:g} GB/s inside its node, {t.chip.slow_network / 1e9 * 8:g} Gb/s "
                "between nodes (--between-nodes)"
            )
        if self.reduced_weights:
            yield f"  WARNING: weights reduced whole to every chip: {', '.join(self.reduced_weights)}"
        yield from self._roofline_lines(tokens, mfu)
        yield f"compiled in       {self.compile_seconds:.0f} s" if self.compile_seconds else "compiled in       not"

    def _kernel_lines(self) -> Iterator[str]:
        yield f"kernels           {', '.join(f'{part} {choice.kernel}' for part, choice in self.kernels.items())}"
        for part, choice in self.kernels.items():
            if choice.fallback:
                yield f"  WARNING: {part} falls back on {choice.kernel}: {choice.why}"
        if self.calls:
            yield f"  calls in the program: {', '.join(f'{n} {name}' for name, n in sorted(self.calls.items()))}"

    def _flops_lines(self) -> Iterator[str]:
        e, c = self.expected, self.counted
        useful, _ = closed_form.useful(self.config, self.sizes)
        yield (
            f"compute per chip  {tera(e.total)} by closed form: {tera(useful)} useful (causal), "
            f"{tera(e.total - useful)} recomputed or masked in part"
        )
        if c is not None and self.unknown_loops:
            yield (
                f"  in the program {tera(c.total)}, without {self.unknown_loops} loops whose length depends on the "
                "data (experts, attention)"
            )
        elif c is not None:
            yield (
                f"  in the program {tera(c.total)} ({c.total / e.total:.3f} x): products {tera(c.dots)} "
                f"({c.dots / e.dots:.3f} x), experts {tera(c.experts)} ({c.experts / e.experts:.3f} x), "
                f"attention {tera(c.attention)} ({c.attention / e.attention:.3f} x)"
            )

    def _roofline_lines(self, tokens: float | None, mfu: float | None) -> Iterator[str]:
        r = self.roofline
        if r is None:
            yield "roofline          none: no figures are published for this machine"
            return
        yield (
            f"roofline          compute {r.compute:.3f} s, memory {r.memory:.3f} s, network {r.network:.3f} s a step: "
            f"bound by {r.bound}"
        )
        rate = self.rate(r.seconds)
        yield (
            f"  MFU at most {r.mfu:.1%} (causal, as perf/mfu; {r.mfu_full:.1%} counting all pairs of attention), "
            f"{r.mfu_serial:.1%} if no traffic is hidden; {rate:,.0f} tokens a second and chip"
        )
        rates = {"at the bound": rate}
        if mfu:
            rates[f"at an MFU of {mfu:.1%}"] = rate * mfu / r.mfu
            above = ", which is above the bound: nothing runs so" if mfu > r.mfu else ""
            yield f"  at an MFU of {mfu:.1%} {rate * mfu / r.mfu:,.0f} tokens a second and chip{above}"
        for what, each in rates.items() if tokens else ():
            chip_hours = (tokens or 0) / each / 3600
            hours = f"{chip_hours:,.0f}" if chip_hours >= 10 else f"{chip_hours:.2g}"
            took = span(chip_hours * 3600 / self.topology.chips)
            yield f"  {tokens:.3g} tokens: {took}, {hours} chip-hours {what}"

    def to_json(self) -> dict[str, Any]:
        """Bytes, FLOPs and seconds as numbers."""
        c, t, r, counted = self.config, self.topology, self.roofline, self.counted
        causal, full = closed_form.useful(c, self.sizes)
        return {
            "run_name": c.run_name,
            "topology": t.name,
            "chips": t.chips,
            "mesh": self.sizes,
            "remat": c.compute.remat,
            "tokens_per_step": c.tokens_per_step,
            "sequences_per_chip": self.sequences,
            "accumulation": c.accumulation,
            "source": self.source,
            "fits": self.fits,
            "memory": _numbers(self.memory, "temporaries", "too_much"),
            "saved_bytes_per_token_and_layer": saved_bytes(c, self.sizes),
            "flops": {
                "expected": {"useful": causal, "useful_full": full} | _numbers(self.expected, "total"),
                "counted": counted and _numbers(counted, "total") | {"unknown_loops": self.unknown_loops},
            },
            "traffic": [
                {"kind": kind, "axes": axes, "bytes": sent, "between_nodes": self.across(kind, axes)}
                for (kind, axes), sent in self.traffic.items()
            ],
            "kernels": {part: choice._asdict() for part, choice in self.kernels.items()},
            "kernel_calls": dict(self.calls),
            "asynchronous": self.asynchronous,
            "reduced_weights": list(self.reduced_weights),
            "roofline": r and _numbers(r, "seconds"),
            "tokens_per_second_per_chip": r and self.rate(r.seconds),
            "compile_seconds": self.compile_seconds,
        }


def _numbers(record: Memory | Flops | Roofline, *properties: str) -> dict[str, Any]:
    return record._asdict() | {name: getattr(record, name) for name in properties}


def estimate(config: RunConfig, topology: Topology) -> PlanReport:
    """The report by closed form.

    Raises:
        ValueError: the mesh does not fit the machine, or does not divide a parameter.
    """
    sizes = config.mesh.sizes(topology.chips)
    peak = sum(memory(config, sizes, topology.machine.platform).values())
    held = Memory(**resident(config, sizes), code=0.0, peak=peak, limit=topology.chip.memory)
    expected = closed_form.flops(config, sizes, topology.machine)
    traffic = {("closed form", axes): sent for axes, sent in closed_form.traffic(config, sizes).items()}
    bound = closed_form.roofline(config, topology, flops=expected.total, sent=traffic)
    return PlanReport(config, topology, f"closed form: {missing_compiler(topology)}", held, expected, traffic, bound)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def gb(size: float) -> str:
    """Decimal gigabytes, as chips are sold; fewer are megabytes or kilobytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size >= 1e5 else kilo(size)


def span(seconds: float) -> str:
    """A time in the largest unit of which there is one."""
    unit, name = next(((n, name) for n, name in ((86400, "days"), (3600, "hours")) if seconds >= n), (60, "minutes"))
    return f"{seconds / unit:.1f} {name}"


def kilo(size: float) -> str:
    """Decimal kilobytes."""
    return f"{size / 1e3:.1f} kB"


def tera(flops: float) -> str:
    """TFLOP, and GFLOP where they are few."""
    return f"{flops / 1e12:.1f} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.2f} GFLOP"
