"""Know before renting: compile the real step for a machine that is not there, and say whether and how fast it runs."""

import json as jsonlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.train.config.schema import RunConfig, check_sizes
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan import closed_form
from mixtral_jax.train.plan.chips import Topology, local_machine, parse_topology
from mixtral_jax.train.plan.compile import Compiled, Memory, compile_step, for_accelerator, has_libtpu, plan_mesh
from mixtral_jax.train.plan.hlo import Collective, Program, read_program
from mixtral_jax.train.plan.ranking import ranked, table
from mixtral_jax.train.plan.report import Counted, PlanReport
from mixtral_jax.train.plan.roofline import roofline, sent_by_axis
from mixtral_jax.train.plan.search import candidates, what_fits

COMPILED_BY_SEARCH = 3  # of the candidates that should fit


def run(
    config: RunConfig,
    *,
    topology: str | None = None,
    devices: int | None = None,
    search: bool = False,
    tokens: float | None = None,
    json: str | None = None,
) -> int:
    """The command line's `plan`: prints the report, and writes it where `json` says (- for stdout).

    Raises:
        UserError: neither or both of topology and devices, an unknown topology, nothing that fits.
    """
    reports = plan_all(config, topology=topology, devices=devices, tokens=tokens, search=search)
    if json != "-":
        for report in reports:
            print("\n".join(report.lines()), end="\n\n" if search else "\n")
        if search:
            print("\n".join(table(reports)))
    if json is not None:
        content = jsonlib.dumps([r.to_json() for r in reports] if search else reports[0].to_json(), indent=2)
        if json == "-":
            print(content)
        else:
            Path(json).write_text(content + "\n", encoding="utf-8")
    if not any(report.fits for report in reports):
        raise UserError(_what_would_fit(config, reports[0], searched=search))
    return 0


def plan(
    config: RunConfig,
    *,
    topology: str | None = None,
    devices: int | None = None,
    tokens: float | None = None,
    search: bool = False,
) -> PlanReport:
    """The report of one run, or with `search` of the best way to run it; see `run`."""
    return plan_all(config, topology=topology, devices=devices, tokens=tokens, search=search)[0]


def plan_all(
    config: RunConfig,
    *,
    topology: str | None = None,
    devices: int | None = None,
    tokens: float | None = None,
    search: bool = False,
) -> list[PlanReport]:
    """One report, or those that a search compiled, the best that fits first."""
    if (topology is None) == (devices is None):
        raise UserError("plan needs --topology (such as v5p-64) or --devices N, and not both")
    if tokens is not None and not 1 <= tokens < math.inf:
        raise UserError(f"--tokens is {tokens:g}: the length of a run is a positive number of tokens")
    if devices is not None:
        if devices < 1:
            raise UserError(f"--devices is {devices}: a plan needs at least one device")
        if search:
            raise UserError("--search ranks by published figures of chips: it needs --topology, not --devices")
        check_sizes(config, config.mesh.sizes(devices))
        return [_report(config, local_machine(devices), tokens, local=True)]
    assert topology is not None
    there = parse_topology(topology)
    config = for_accelerator(config)
    if not search:
        check_sizes(config, config.mesh.sizes(there.chips))
        return [_report(config, there, tokens)]
    best = candidates(config, there)[:COMPILED_BY_SEARCH]
    if not best:
        raise UserError(what_fits(config, there))
    reports = [_report(candidate.config, there, tokens) for candidate in best]
    return ranked(reports)


def _report(config: RunConfig, topology: Topology, tokens: float | None, *, local: bool = False) -> PlanReport:
    shape = closed_form.shape_of(config, topology.chips)
    expected = closed_form.flops(config, shape)
    counted, compiled, programs = None, None, []
    if local or (topology.libtpu and has_libtpu()):
        mesh = plan_mesh(config, None if local else topology)
        compiled = compile_step(config, mesh, topology.chip.usable)
        if compiled.texts:
            programs = [read_program(text) for text in compiled.texts]
            counted = _counted(config, shape, programs)
    collectives = tuple(c for program in programs for c in program.collectives)
    traffic = _traffic(config, shape, collectives if programs else None)
    sent: defaultdict[str, float] = defaultdict(float)
    for (_, axes), amount in traffic.items():
        sent[axes] += amount
    return PlanReport(
        run_name=config.run_name,
        topology=topology,
        mesh=shape.sizes,
        remat=config.compute.remat,
        tokens_per_step=config.tokens_per_step,
        sequences_per_chip=shape.tokens / config.seq_len,
        accumulation=config.accumulation,
        source=_source(topology, compiled),
        memory=_memory(config, shape, topology) if compiled is None else compiled.memory,
        expected=expected,
        counted=counted,
        traffic=traffic,
        asynchronous=_asynchronous(collectives),
        reduced_weights=reduced_weights(config, collectives),
        roofline=None
        if local
        else roofline(
            topology,
            flops=expected.total if counted is None else counted.total,
            useful=(expected.useful, expected.useful_full),
            memory_bytes=closed_form.memory_traffic(config, shape),
            sent=sent,
            sizes=shape.sizes,
        ),
        compile_seconds=0.0 if compiled is None else compiled.seconds,
        tokens=tokens,
    )


def _source(topology: Topology, compiled: Compiled | None) -> str:
    if compiled is not None:
        return "compiled" if compiled.texts else "compiled, does not fit: traffic by closed form"
    if topology.libtpu is None:
        return "closed form: a GPU program can only be compiled on a GPU"
    return "closed form: libtpu is not installed (pip install 'mixtral-jax[aot]')"


def _memory(config: RunConfig, shape: closed_form.Shape, topology: Topology) -> Memory:
    parts = closed_form.memory(config, shape)
    peak, limit = sum(parts.values()), topology.chip.usable
    own = {name: parts[name] for name in ("parameters", "optimizer", "frozen", "reference")}
    rest = peak - sum(own.values())
    return Memory(**own, temporaries=rest, code=0.0, peak=peak, limit=limit, too_much=max(0.0, peak - limit))


def _counted(config: RunConfig, shape: closed_form.Shape, programs: Sequence[Program]) -> Counted:
    """FLOPs of the programs. Kernels count the rows and tiles that they compute, not the buffers they are given."""
    model, tokens = config.model, shape.tokens
    kernels = sum((program.kernels for program in programs), start=Counter())
    matrices = sum((program.grouped for program in programs), start=Counter())
    rows = tokens * model.num_experts_per_tok
    experts = 2 * rows * sum(math.prod(matrix) * calls for matrix, calls in matrices.items())
    pairs = closed_form.attention_pairs(config.seq_len, model.sliding_window)
    score = 2 * tokens * pairs * model.num_attention_heads * model.head_dim / shape.sizes["tensor"]
    products = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
    attention = score * sum(n * kernels[name] for name, n in products.items())
    unknown = sum(program.unknown_loops for program in programs)
    return Counted(sum(program.dot_flops for program in programs), experts, attention, unknown)


def _traffic(
    config: RunConfig, shape: closed_form.Shape, collectives: tuple[Collective, ...] | None
) -> dict[tuple[str, str], float]:
    if collectives is None:
        return {("closed form", axes): amount for axes, amount in closed_form.traffic(config, shape).items()}
    local = max(1, config.model.num_local_experts // shape.sizes["expert"])
    share = 1 / min(shape.sizes["expert"], max(1, local * shape.sizes["expert"] // config.model.num_experts_per_tok))
    return sent_by_axis(collectives, shape.sizes, share)


def _asynchronous(collectives: tuple[Collective, ...]) -> float:
    total = sum(c.bytes * c.times for c in collectives)
    return sum(c.bytes * c.times for c in collectives if c.asynchronous) / max(total, 1)


def reduced_weights(config: RunConfig, collectives: tuple[Collective, ...]) -> tuple[str, ...]:
    """Shapes that are all-reduced although they hold a whole matrix (of one layer, one expert shard at least)."""
    model = config.model
    smallest = model.hidden_size * model.num_key_value_heads * model.head_dim
    found = {
        "x".join(map(str, dims))
        for c in collectives
        if c.kind == "all-reduce"
        for dims in c.shapes
        if math.prod(dims) >= smallest and model.hidden_size in dims
    }
    return tuple(sorted(found))


def _what_would_fit(config: RunConfig, report: PlanReport, *, searched: bool) -> str:
    problem = f"{config.run_name} does not fit {report.topology.name}: {report.memory.too_much / 1e9:.2f} GB too much"
    if report.roofline is None:  # this machine: there is no larger one to name
        return f"{problem} per device; take more --devices, a smaller micro_batch_size or compute.remat=full"
    if searched:
        return f"{problem} per chip in the best of {COMPILED_BY_SEARCH} candidates, which fit by closed form only"
    return f"{problem} per chip; {what_fits(config, report.topology)} (plan --search tries them)"
