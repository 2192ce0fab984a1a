"""Know before renting: compile the real step for a machine that is not there, and say whether and how fast it runs."""

import json as jsonlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mixtral_jax.parallel import Machine
from mixtral_jax.train.config import RunConfig, check_sizes
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan.chips import Topology, local_machine, parse_topology
from mixtral_jax.train.plan.closed_form import Flops, attention_kernel, attention_pairs, kernels, roofline
from mixtral_jax.train.plan.compile import compile_step, missing_compiler, plan_mesh
from mixtral_jax.train.plan.hlo import ATTENTION, Collective, Program, axes_of, read_program, sent_by_axis
from mixtral_jax.train.plan.placement import as_run_on, local_tokens
from mixtral_jax.train.plan.report import PlanReport, estimate, gb
from mixtral_jax.train.plan.search import candidates, ranked, table, what_fits

COMPILED_BY_SEARCH = 3  # of the candidates that should fit


def run(
    config: RunConfig,
    *,
    topology: str | None = None,
    devices: int | None = None,
    search: bool = False,
    tokens: float | None = None,
    mfu: float | None = None,
    between_nodes: float | None = None,
    json: str | None = None,
) -> int:
    """The command line's `plan`: prints the report, and writes it where `json` says (- for stdout).

    Raises:
        UserError: a senseless value, neither or both of topology and devices, an unknown topology, nothing that fits.
    """
    if tokens is not None and not 1 <= tokens < math.inf:
        raise UserError(f"--tokens is {tokens:g}: the length of a run is a positive number of tokens")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu:g}: a share of the peak is above 0 and at most 1, such as 0.4")
    if between_nodes is not None and not 0 < between_nodes < math.inf:
        raise UserError(f"--between-nodes is {between_nodes:g}: a positive number of Gb/s of each chip, such as 400")
    if search and devices is not None:
        raise UserError("--search ranks by published figures of chips: it needs --topology, not --devices")
    if search and topology is not None:
        reports = best_plans(config, topology, between_nodes)
    else:
        reports = [plan(config, topology=topology, devices=devices, between_nodes=between_nodes)]
    if json != "-":
        for report in reports:
            print(*report.lines(tokens, mfu), sep="\n", end="\n\n" if search else "\n")
        if search:
            print(*table(reports), sep="\n")
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
    config: RunConfig, *, topology: str | None = None, devices: int | None = None, between_nodes: float | None = None
) -> PlanReport:
    """The report of one run, on a machine that is not there or on this one as so many CPU devices.

    `between_nodes`: Gb/s out of one chip between nodes or slices, where it is not what chips.py says.

    Raises:
        UserError: neither or both of the two, or an unknown topology.
        ValueError: the mesh does not fit the machine.
    """
    if topology is not None and devices is None:
        machine = parse_topology(topology, between_nodes)
    elif devices is not None and topology is None:
        if devices < 1:
            raise UserError(f"--devices is {devices}: a plan needs at least one device")
        machine = local_machine(devices)
    else:
        raise UserError("plan needs --topology (such as v5p-64) or --devices N, and not both")
    check_sizes(config, config.mesh.sizes(machine.chips))
    return _report(as_run_on(config, machine.machine.platform), machine)


def best_plans(config: RunConfig, topology: str, between_nodes: float | None = None) -> list[PlanReport]:
    """The reports of the ways to run that a search compiled, the best that fits first.

    Raises:
        UserError: an unknown topology, or nothing that fits.
    """
    machine = parse_topology(topology, between_nodes)
    config = as_run_on(config, machine.machine.platform)
    kernels(config, {"context": 1}, machine.machine)  # what cannot run there is no mesh's fault
    found = candidates(config, machine)[:COMPILED_BY_SEARCH]
    if not found:
        raise UserError(what_fits(config, machine))
    return ranked(_report(candidate.config, machine) for candidate in found)


def _report(config: RunConfig, topology: Topology) -> PlanReport:
    """By closed form, and of what can be compiled for here what the compiler says."""
    report, chip = estimate(config, topology), topology.chip
    if topology.machine.platform != "cpu" and missing_compiler(topology):
        return report
    kernels(config, report.sizes, topology.machine, tokamax=None)  # it must be here to be compiled
    start, mesh = time.perf_counter(), plan_mesh(config, topology)
    try:
        memory, texts = compile_step(config, mesh, chip.memory, chip.name if topology.is_gpu else None)
    except RuntimeError as error:  # XLA's, or a kernel's that is not made for such a GPU
        if not topology.is_gpu:
            raise
        why = f"jax {jax.__version__} does not compile this for {topology.name} ({str(error).splitlines()[0]})"
        return report._replace(source=f"closed form: {why}")
    report = report._replace(memory=memory, compile_seconds=time.perf_counter() - start)
    if not texts:
        return report._replace(source="compiled, does not fit: traffic by closed form")
    programs = [read_program(text) for text in texts]
    collectives = [c for program in programs for c in program.collectives]
    calls = sum((program.kernels for program in programs), start=Counter[str]())
    counted = _counted(config, report.sizes, programs, topology.machine)
    traffic = sent_by_axis(collectives, report.sizes)
    amounts = {done: sum(c.bytes * c.times for c in collectives if c.asynchronous is done) for done in (True, False)}
    return report._replace(
        source="compiled",
        counted=counted,
        calls=dict(calls),
        unknown_loops=sum(program.unknown_loops for program in programs),
        traffic=traffic,
        asynchronous=amounts[True] / max(sum(amounts.values()), 1),
        reduced_weights=_reduced_weights(config, collectives, report.sizes),
        roofline=roofline(config, topology, flops=counted.total, sent=traffic),
    )


def _counted(config: RunConfig, sizes: Mapping[str, int], programs: Sequence[Program], machine: Machine) -> Flops:
    """FLOPs of the programs. Kernels count the rows and tiles that they compute, not the buffers they are given."""
    model, tokens = config.model, local_tokens(config, sizes)
    matrices = sum((program.grouped for program in programs), start=Counter[tuple[int, ...]]())
    rows = min(config.compute.moe.chunk_tokens or tokens, tokens) * model.num_experts_per_tok  # of one call
    experts = 2 * rows * sum(math.prod(matrix) * calls for matrix, calls in matrices.items())
    pairs = attention_pairs(config.seq_len, model.sliding_window, attention_kernel(config, sizes, machine).tile)
    # of one product in one layer, of the two that attention_flops counts in each
    product = tokens * model.attention_flops(pairs) / (2 * model.num_hidden_layers) / sizes["tensor"]
    calls = sum((program.kernels for program in programs), start=Counter[str]())
    attention = product * sum(n * calls[name] for name, n in ATTENTION.items())
    return Flops(sum(program.dot_flops for program in programs), experts, attention)


def _reduced_weights(config: RunConfig, collectives: Sequence[Collective], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Shapes that are all-reduced although they hold a whole matrix (of one layer, one expert shard at least).

    Along `data` alone that is no fault: weights are whole there, and their gradients are summed.
    """
    model = config.model
    smallest = model.hidden_size * model.num_key_value_heads * model.head_dim
    found = {
        "x".join(map(str, dims))
        for c in collectives
        if c.kind == "all-reduce" and axes_of(c, sizes) != "data"
        for dims in c.shapes
        if math.prod(dims) >= smallest and model.hidden_size in dims
    }
    return tuple(sorted(found))


def _what_would_fit(config: RunConfig, report: PlanReport, *, searched: bool) -> str:
    problem = f"{config.run_name} does not fit {report.topology.name}: {gb(report.memory.too_much)} too much"
    if report.roofline is None:  # this machine: there is no larger one to name
        return f"{problem} per device; take more --devices, a smaller micro_batch_size or compute.remat=full"
    if searched:
        return f"{problem} per chip in the best of {COMPILED_BY_SEARCH} candidates, which fit by closed form only"
    return f"{problem} per chip; {what_fits(config, report.topology)} (plan --search tries them)"
