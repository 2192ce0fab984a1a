"""What is to be run where, whatever the engine: points of a sweep, files in the run's directory, and their checks."""

import hashlib
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from mixtral_jax.data.prepare import write_atomically
from mixtral_jax.data.records import is_remote
from mixtral_jax.train.config import RunConfig, check_sizes, load_config, resolved_yaml, run_and_step
from mixtral_jax.train.errors import UserError

PYTHON = (sys.executable, "-P")  # which puts no directory first that it happens to stand in
IN_IMAGE = ("python", "-P")
_OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_WRITTEN = ("output_dir", "data.cache_dir", "checkpoint.directory")
_COPIES = "data.staging_dir"  # which each machine may have for itself
_NOT_IN_IMAGE = ("runs", ".cache")  # .dockerignore, .gitignore
_GLOB = re.compile(r"[*?\[]")
_NAME_LETTERS = 40  # of xpk; Kubernetes puts up to 23 more behind it


@dataclass(frozen=True)
class Machine:
    """Nodes that one job has, and what is in each."""

    nodes: int
    devices: int  # in each node
    processes: int = 1  # on each node

    def __post_init__(self) -> None:
        for what, count in (("nodes", self.nodes), ("devices", self.devices), ("processes", self.processes)):
            if count < 1:
                raise UserError(f"{what} is {count}: a job has at least one")
        if self.devices % self.processes:
            raise UserError(f"{self.devices} devices a node cannot be shared evenly by {self.processes} processes")

    def __str__(self) -> str:
        each = f"{self.devices} device{'s' * (self.devices > 1)}"
        return f"{self.nodes} node{'s' * (self.nodes > 1)} with {each} and {self.processes} process(es) each"


@dataclass(frozen=True)
class Job:
    """One run on one machine."""

    config: RunConfig
    machine: Machine
    away: bool = False  # its directory is not seen from here, where the files are made

    @property
    def run(self) -> Path:
        """The run's directory, absolute."""
        return self.config.run_dir.absolute()

    @property
    def here(self) -> Path:
        """Where files for the engine are written: in the run's directory, or in `runs`."""
        return (Path("runs", self.config.run_name).absolute() if self.away else self.run) / "launch"

    @property
    def file(self) -> Path:
        """The run file that the engine gives to the command: resolved, with the overrides in it."""
        return self.here / "run.yaml"

    @property
    def name(self) -> str:
        """The run's name as engines take it."""
        return engine_name(self.config.run_name)

    def command(self, python: Sequence[str] = PYTHON, file: Path | str | None = None) -> list[str]:
        """The words that start one process."""
        return [*python, "-m", "mixtral_jax.launch", self.config.stage, str(file or self.file)]


def jobs(
    path: str, overrides: Sequence[str], sweep: Sequence[str], machine: Machine, *, away: bool = False
) -> list[Job]:
    """One job, or one for each point of the sweep: every combination of the values, each with a run name of its own.

    Raises:
        UserError: the configuration, or the mesh on that machine, is wrong; or a sweep is not `a.b=x,y`.
    """
    base = load_config(path, overrides).config
    found = []
    for point in points(sweep):
        config = base
        if point:
            own = [f"run_name={base.run_name}-{_point_name(point)}"]
            if base.checkpoint.directory:  # which belongs to one run
                own.append(f"checkpoint.directory={base.checkpoint.directory}/{_point_name(point)}")
            config = load_config(path, [*overrides, *point, *own]).config
        try:
            check_sizes(config, config.mesh.sizes(machine.nodes * machine.devices))
        except ValueError as error:
            raise UserError(f"{machine}: {error}") from None
        found.append(Job(config, machine, away))
    return found


def points(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each point, `["lr=1,2", "seed=0,1"]` as four; without a sweep the one that has none."""
    axes = []
    for text in sweep:
        key, equals, values = text.partition("=")
        several = [value for value in _split(values) if value]
        if not (equals and key and several) or len(set(several)) < len(several):
            raise UserError(f"--sweep {text}: KEY=VALUE,VALUE with different values is expected")
        axes.append([f"{key}={value}" for value in several])
    named = [axis[0].partition("=")[0] for axis in axes]
    if len(set(named)) < len(named):
        raise UserError(f"--sweep names {next(k for k in named if named.count(k) > 1)} twice: give all its values once")
    return list(itertools.product(*axes))


def _split(values: str) -> list[str]:
    """At commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[({]*[\])}])", values)]


def _point_name(point: Sequence[str]) -> str:
    """`optimizer.learning_rate=1e-4` as `learning_rate=1e-4`, without marks that no directory should have."""
    keys, values = zip(*(text.split("=", 1) for text in point), strict=True)
    short = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True))
    return re.sub(r"[^A-Za-z0-9=._+-]+", "_", short)


def engine_name(name: str) -> str:
    """By RFC 1035, as Kubernetes and clouds want it, and at most 40 letters: a longer one ends with its hash.

    Raises:
        UserError: nothing is left of it.
    """
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not short:
        raise UserError(f"run_name {name!r} gives no name that an engine takes: letters, digits and hyphens")
    short = short if short[0].isalpha() else f"r-{short}"
    if len(short) <= _NAME_LETTERS:
        return short
    return f"{short[: _NAME_LETTERS - 7].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def check_shared(job: Job) -> None:
    """Paths that every node must see.

    Raises:
        UserError: one that lies on a place which each machine has for itself.
    """
    if job.machine.nodes == 1:
        return
    for key, place in places(job.config):
        if key != _COPIES and _is_of_one_machine(place):
            real = os.path.realpath(place)
            raise UserError(f"{key}: {real} is a place of this machine alone, and {job.machine.nodes} nodes read it")


def _is_of_one_machine(place: str) -> bool:
    return os.path.realpath(place).startswith(tuple(f"{above}/" for above in _OF_ONE_MACHINE))


def check_mounted(config: RunConfig, mounted: Sequence[str] | None, remedy: str) -> None:
    """Paths of a run in a container, whose relative ones are those of the project that it was made of.

    What is written must outlive it. `mounted` None: what is there is not known.

    Raises:
        UserError: one that goes with the container, or is not in it, or is on nothing that is mounted.
    """
    for key, place in places(config):
        if key == _COPIES and (not place.startswith("/") or _is_of_one_machine(place)):
            continue  # they may go with the container
        if not place.startswith("/"):
            if key in _WRITTEN:
                raise UserError(f"{key}: {place} is inside of the container and goes with it: {remedy}")
            if place.split("/")[0] in _NOT_IN_IMAGE or not os.path.exists(_GLOB.split(place)[0] or "."):
                raise UserError(f"{key}: {place} is not in the project, of which the container is made: {remedy}")
        elif mounted is not None and not any(f"{place}/".startswith(f"{path.rstrip('/')}/") for path in mounted):
            raise UserError(f"{key}: {place} is on nothing that is mounted: {remedy}")


def directories(job: Job) -> list[str]:
    """What a container on this file system must see: directories of all paths, and the one that we stand in."""
    found = {os.getcwd()}
    for key, place in places(job.config):
        if key == _COPIES and job.machine.nodes > 1 and _is_of_one_machine(place):
            continue  # on the other nodes nobody has made it
        named = _GLOB.split(os.path.abspath(place))[0]
        found.add(named if key in (*_WRITTEN, _COPIES) or os.path.isdir(named) else os.path.dirname(named))
    return sorted(found)


def places(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Paths of a configuration that are no addresses, by their dotted keys."""
    data = config.data
    named: dict[str, str | None] = {"output_dir": config.output_dir, "data.cache_dir": data.cache_dir}
    named |= {"data.tokenizer": data.tokenizer, "init_from": config.init_from}
    named |= {"lora.init_from": config.adapters.init_from if config.adapters else None, _COPIES: data.staging_dir}
    named["resume_from"] = config.resume_from and run_and_step(config.resume_from)[0]
    named["checkpoint.directory"] = config.checkpoint.directory and str(config.checkpoint.directory)
    for kind in ("train", "validation"):
        for source in getattr(data, kind):
            named |= {f"data.{kind}.{source.name}": path for path in source.paths}
    yield from ((key, place) for key, place in named.items() if place and not is_remote(place))


def write(files: Mapping[Path, str]) -> None:
    """All of them, each whole; their directories are made."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        if text.startswith("#!"):
            path.chmod(0o755)


def yaml_text(*objects: Mapping[str, Any]) -> str:
    """Objects as documents, without empty sections; long texts as blocks."""
    yaml, out = YAML(), io.StringIO()
    yaml.width, yaml.default_flow_style, yaml.explicit_start = 1 << 16, False, len(objects) > 1
    yaml.dump_all([_plain(o) for o in objects], out)
    return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items() if v not in ({}, None)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return LiteralScalarString(value) if isinstance(value, str) and "\n" in value else value


def run_file(job: Job) -> dict[Path, str]:
    """The resolved run file in the run's directory."""
    return {job.file: resolved_yaml(job.config)}


def quoted(words: Sequence[str]) -> str:
    """For a shell."""
    return shlex.join(words)
