"""`submit ENGINE CFG`: writes the engine's files, says what will happen, and with --go hands them over."""

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.data.prepare import write_atomically
from mixtral_jax.parallel import platform
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.launchers import kubernetes, local, sky, slurm
from mixtral_jax.train.launchers.job import Job, Nodes, Plan, jobs
from mixtral_jax.train.plan import NODE_GPUS, Topology, memory_line, mesh_text, parse_topology, passing_line

Options = Mapping[str, Any]


class Engine(NamedTuple):
    """What takes a run: its client, its own settings among all options, and what makes its files of them."""

    client: str | None
    settings: Any  # a class of named fields
    plan: Callable[[Sequence[Job], Any, Topology | None], Plan]
    away: bool = False  # its machines see no directory of this one


def _each(name: str, text: Callable[[Job, Any, Topology | None], str], *words: str) -> Callable[..., Plan]:
    """A file of each run, which the words hand over."""

    def plan(jobs: Sequence[Job], how: Any, topology: Topology | None) -> Plan:
        files = {job.here / name: text(job, how, topology) for job in jobs}
        return files, [[*words, str(path)] for path in files]

    return plan


_APPLIED = _each("job.yaml", kubernetes.manifest, "kubectl", "apply", "--filename")
_LAUNCHED = _each("task.yaml", sky.task, "sky", "jobs", "launch", "--yes", "--detach-run")
ENGINES = {
    "slurm": Engine("sbatch", slurm.Slurm, slurm.plan),
    "k8s": Engine("kubectl", kubernetes.Kubernetes, _APPLIED, away=True),
    "sky": Engine("sky", sky.Sky, _LAUNCHED, away=True),
    "xpk": Engine("xpk", sky.Xpk, _each("xpk.sh", sky.workload, "sh"), away=True),
    "local": Engine(None, local.Local, local.plan),
}


def submit(name: str, path: str, overrides: Sequence[str], options: Options) -> int:
    """Everything is made and checked before anything is written.

    Raises:
        UserError: what the engine, its nodes or the run cannot be; the engine's client is missing, with --go.
    """
    for option in ("grace_seconds", "max_restarts"):
        if options.get(option, 0) < 0:
            raise UserError(f"--{option.replace('_', '-')} is {options[option]}: 0 or more is expected")
    if len(str(options.get("image")).split()) != 1:
        raise UserError(f"--image {options['image']!r}: a container image is expected (see the Dockerfile)")
    engine = ENGINES[name]
    topology = parse_topology(options["topology"]) if options.get("topology") else None
    found = jobs(path, overrides, options["sweep"] or (), _nodes(name, options, topology), away=engine.away)
    how = engine.settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
                             if key in engine.settings._fields and value is not None})  # fmt: skip
    files, commands = engine.plan(found, how, topology)
    if options["go"] and engine.client and shutil.which(engine.client) is None:
        raise UserError(f"--go: {engine.client} is not installed here: hand the files over where it is")
    files = {job.file: job.text for job in found} | files
    _write(files)
    for job in () if engine.away else found:
        if options["go"]:  # what an earlier submission came to
            (job.here / "final").unlink(missing_ok=True)
        counted = job.here / "restarts.json"
        if options["go"] or not counted.exists():
            write_atomically(counted, "{}\n")  # which a disk that is full by then lets change
    where = platform() if name == "local" else topology.machine.platform if topology else "gpu"
    for line in _told(found, files, commands, where, go=options["go"]):
        print(line, flush=True)  # ahead of what the supervisor's processes say
    if not options["go"]:
        return ExitCode.DONE
    if name == "local":
        return local.supervise(found, how)
    for command in commands:
        done = subprocess.run(command, check=False)  # which says by itself what is wrong
        if done.returncode:
            print(f"{engine.client} ended with {done.returncode}: nothing more is handed over")
            return ExitCode.UNEXPECTED
    return ExitCode.DONE


def _nodes(name: str, options: Options, topology: Topology | None) -> Nodes:
    if topology is not None:
        each, chips = kubernetes.hosts(topology)
        count = each * topology.slices
        for option, default, has in (("nodes", 1, count), ("devices", NODE_GPUS, chips)):
            if (told := options.get(option, default)) not in (default, has):
                raise UserError(f"--{option} {told}: --topology {topology.name} has {has}: leave one of them out")
        return Nodes(count, chips)
    if name == "xpk":
        raise UserError("xpk: --topology is needed, such as v5p-64")
    if name == "sky":
        return sky.nodes(options["accelerators"], options["nodes"])
    processes = options.get("processes", 1)
    if name == "local":
        return Nodes(1, processes * options["devices"], processes)
    return Nodes(options["nodes"], options["devices"], processes)


def _write(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        if text.startswith("#!"):
            path.chmod(0o755)


def _told(
    found: Sequence[Job], files: Mapping[Path, str], commands: list[list[str]], where: str, *, go: bool
) -> Iterator[str]:
    """What will happen on machines of a platform, for a person."""
    for job in found:
        much = f"{job.config.tokens_per_step:,} tokens a step, {job.config.steps or 'all'} steps"
        yield f"{'run':>8}  {job.config.stage} {job.run} on {job.nodes}: mesh {mesh_text(job.sizes)}, {much}"
    yield f"{'memory':>8}  {memory_line(found[0].config, found[0].sizes)}"
    yield f"{'besides':>8}  {passing_line(found[0].config, found[0].sizes, where)}"
    for path in files:
        yield f"{'written':>8}  {path}"
    for word, codes, more in (("again", ExitCode.again(), ", a signal or 1"), ("final", ExitCode.final(), "")):
        yield f"{word:>8}  {', '.join(f'{int(code)} ({code.meaning})' for code in codes)}{more}"
    for command in commands:
        yield f"{'start' if go else 'to start':>8}  {shlex.join(command)}"
    for place in (job.here / "final" for job in found):
        if place.exists():
            yield f"{'stands':>8}  {place}: nothing starts until it and restarts.json are removed, as --go does"
    if not go:
        yield f"{'':>8}  nothing was started: --go does"
