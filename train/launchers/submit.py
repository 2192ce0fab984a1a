"""`submit ENGINE CFG`: writes the engine's files, says what will happen, and with --go hands them over."""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.train.console import duration
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.launchers import kubernetes, sky, slurm
from mixtral_jax.train.launchers.job import Job, Machine, jobs, quoted, run_file, write
from mixtral_jax.train.launchers.local import Local, Supervisor
from mixtral_jax.train.plan import Topology, memory_line, parse_topology, passing_line

Options = Mapping[str, Any]
AWAY = ("k8s", "sky", "xpk")  # engines whose machines see no directory of this one
Plan = tuple[dict[Path, str], list[list[str]]]  # files, and the commands that hand them over


def submit(engine: str, path: str, overrides: Sequence[str], options: Options) -> int:
    """Everything is made and checked before anything is written.

    Raises:
        UserError: what the engine, the machine or the run cannot be; the engine's client is missing, with --go.
    """
    for option in ("grace_seconds", "max_restarts"):
        if options.get(option, 0) < 0:
            raise UserError(f"--{option.replace('_', '-')} is {options[option]}: 0 or more is expected")
    if len(str(options.get("image", "i")).split()) != 1:
        raise UserError(f"--image {options['image']!r}: a container image is expected (see the Dockerfile)")
    topology = _topology(options.get("topology"))
    machine = _machine(engine, options, topology)
    found = jobs(path, overrides, options.get("sweep") or (), machine, away=engine in AWAY)
    if len({job.name for job in found}) < len(found):
        raise UserError("the points of the sweep have names that an engine cannot tell apart: shorten run_name")
    files, commands = ENGINES[engine](found, options, topology)
    if options["go"] and (missing := [c[0] for c in commands if shutil.which(c[0]) is None]):
        raise UserError(f"--go: {missing[0]} is not installed here: hand the files over where it is")
    write(files)
    for job in found if options["go"] else ():  # what an earlier submission came to
        for name in ("final", "restarts.json"):
            (job.here / name).unlink(missing_ok=True)
    for line in _told(engine, found, files, commands, go=options["go"]):
        print(line)
    if engine == "local" and options["go"]:
        return _supervised(found, options)
    for command in commands if options["go"] else ():
        done = subprocess.run(command, check=False)  # which says by itself what is wrong
        if done.returncode:
            print(f"{command[0]} ended with {done.returncode}: nothing more is handed over")
            return ExitCode.UNEXPECTED
    return ExitCode.DONE


def _topology(name: str | None) -> Topology | None:
    return None if name is None else parse_topology(name)


def _machine(engine: str, options: Options, topology: Topology | None) -> Machine:
    if topology is not None:
        each, chips = kubernetes.hosts(topology)
        return Machine(each * topology.slices, chips)
    if engine == "sky":
        return sky.machine(options["accelerators"], options["nodes"])
    if engine == "local":
        return Machine(1, options["processes"] * options["devices"], options["processes"])
    if engine == "xpk":
        raise UserError("xpk: --topology is needed, such as v5p-64")
    return Machine(options["nodes"], options["devices"], options.get("processes") or 1)


def _slurm(found: Sequence[Job], options: Options, topology: Topology | None) -> Plan:
    how = _taken(slurm.Slurm, options)
    directory = found[0].here
    if len(found) > 1:  # beside the runs
        directory = found[0].run.parent / f"{found[0].config.run_name.partition('=')[0]}.sweep" / "launch"
    return slurm.files(found, how, directory), slurm.start(directory, how)


def _kubernetes(found: Sequence[Job], options: Options, topology: Topology | None) -> Plan:
    how = _taken(kubernetes.Kubernetes, options)
    slices = topology if topology is not None and topology.libtpu is not None else None
    files = {path: text for job in found for path, text in kubernetes.files(job, how, slices).items()}
    return files, [["kubectl", "apply", "--filename", str(path)] for path in files]


def _sky(found: Sequence[Job], options: Options, topology: Topology | None) -> Plan:
    how = _taken(sky.Sky, options)
    files = {path: text for job in found for path, text in sky.files(job, how).items()}
    return files, [["sky", "jobs", "launch", "--yes", "--detach-run", str(job.here / "task.yaml")] for job in found]


def _xpk(found: Sequence[Job], options: Options, topology: Topology | None) -> Plan:
    assert topology is not None
    how = _taken(sky.Xpk, options)
    commands = [sky.workload(job, how, topology) for job in found]
    return {job.here / "xpk.sh": f"#!/bin/sh\n{quoted(c)}\n" for job, c in zip(found, commands, strict=True)}, commands


def _here(found: Sequence[Job], options: Options, topology: Topology | None) -> Plan:
    _local(options)
    return {path: text for job in found for path, text in run_file(job).items()}, []


def _local(options: Options) -> Local:
    if not options["on_cpu"] and options["processes"] > 1:
        raise UserError(f"--accelerators: one process has them all, --processes is {options['processes']}")
    every = options["kill_every"]
    seconds = None if every is None else duration(every, "--kill-every", "30s or 2m")
    return _taken(Local, {**options, "kill_every": seconds}).check()


def _supervised(found: Sequence[Job], options: Options) -> int:
    """One after another; a signal ends them all. The code of the first that did not end well."""
    codes = []
    for job in found:
        supervisor = Supervisor(job, _local(options))
        codes.append(supervisor.run())
        if supervisor.asked:
            break
    return next(filter(None, codes), ExitCode.DONE)


def _taken(kind: Any, options: Options) -> Any:
    """The engine's own settings among all options."""
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()
                   if key in kind._fields and v is not None})  # fmt: skip


ENGINES: dict[str, Callable[[Sequence[Job], Options, Topology | None], Plan]] = {
    "slurm": _slurm, "k8s": _kubernetes, "sky": _sky, "xpk": _xpk, "local": _here,
}  # fmt: skip


def _told(
    engine: str, found: Sequence[Job], files: Mapping[Path, str], commands: list[list[str]], *, go: bool
) -> list[str]:
    """What will happen, for a person."""
    again = ", ".join(f"{int(code)} ({code.meaning})" for code in ExitCode.again())
    final = ", ".join(f"{int(code)} ({code.meaning})" for code in ExitCode.final())
    lines = [f"{'run':>8}  {job.config.stage} {job.run} on {job.machine}: {_mesh(job)}" for job in found]
    sizes = found[0].config.mesh.sizes(found[0].machine.nodes * found[0].machine.devices)
    lines += [f"{'memory':>8}  {memory_line(found[0].config, sizes)}"]
    lines += [f"{'besides':>8}  {passing_line(found[0].config, sizes)}"]
    lines += [f"{'written':>8}  {path}" for path in files]
    lines += [f"{'again':>8}  after {again}, a signal or 1", f"{'final':>8}  {final}"]
    lines += [f"{'start' if go else 'to start':>8}  {quoted(command)}" for command in commands]
    ended = [job.here / "final" for job in found if (job.here / "final").exists()]
    lines += [
        f"{'stands':>8}  {path}: nothing starts until it and restarts.json are removed, as --go does" for path in ended
    ]
    return lines if go else [*lines, f"{'':>8}  nothing was started: --go does"]


def _mesh(job: Job) -> str:
    sizes = job.config.mesh.sizes(job.machine.nodes * job.machine.devices)
    named = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    return f"mesh {named}, {job.config.tokens_per_step:,} tokens a step, {job.config.steps or 'all'} steps"
