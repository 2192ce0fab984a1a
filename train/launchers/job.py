"""What is to be run where, whatever the engine: points of a sweep, files in the run's directory, and their checks."""

import hashlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString, SingleQuotedScalarString

from mixtral_jax.data.records import is_remote
from mixtral_jax.train.config import RunConfig, check_sizes, load_config, resolved_yaml, run_and_step
from mixtral_jax.train.errors import UserError

PYTHON = (sys.executable, "-P")  # which puts no directory first that it happens to stand in
IN_IMAGE, RUN_FILE = ("python", "-P"), "/etc/mixtral-jax/run.yaml"  # of a container
IMAGE_DIR = "/mixtral-jax"  # WORKDIR of the Dockerfile
Plan = tuple[dict[Path, str], list[list[str]]]  # files for an engine, and the commands that hand them over
_OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_NEEDED = ("/", "/dev/shm", IMAGE_DIR, os.path.dirname(RUN_FILE))  # in a container: nothing is mounted over it
_YAML_1_1 = re.compile("y|n|yes|no|on|off", re.IGNORECASE)  # which others read as true and false
_WRITTEN = ("output_dir", "data.cache_dir", "checkpoint.directory")
_COPIES = "data.staging_dir"  # which each machine may have for itself
_OF_IMAGE, _NOT_IN_IMAGE = (IMAGE_DIR, "/root"), ("runs", ".cache", "..")  # .dockerignore, .gitignore
_GLOB = re.compile(r"[*?\[]")
_NAME_LETTERS = 40  # of xpk; Kubernetes puts up to 23 more behind it


@dataclass(frozen=True)
class Nodes:
    """Machines that one job has, and what is in each."""

    count: int
    devices: int  # in each
    processes: int = 1  # on each

    def __post_init__(self) -> None:
        for what, count in (("nodes", self.count), ("devices", self.devices), ("processes", self.processes)):
            if count < 1:
                raise UserError(f"{what} is {count}: a job has at least one")
        if self.devices % self.processes:
            raise UserError(f"{self.devices} devices a node cannot be shared evenly by {self.processes} processes")

    def __str__(self) -> str:
        each = f"{self.devices} device{'s' * (self.devices > 1)}"
        return f"{self.count} node{'s' * (self.count > 1)} with {each} and {self.processes} process(es) each"


@dataclass(frozen=True)
class Job:
    """One run on its nodes."""

    config: RunConfig
    nodes: Nodes
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
    def text(self) -> str:
        """What the engine gives to the command: the run file, resolved, with the overrides in it."""
        return resolved_yaml(self.config)

    @property
    def file(self) -> Path:
        """It as a file, whose name is of its contents: what is submitted later changes none that a job reads."""
        return self.here / f"run-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}.yaml"

    @property
    def name(self) -> str:
        """The run's name as engines take it."""
        return engine_name(self.config.run_name)

    @property
    def sizes(self) -> dict[str, int]:
        """Of the mesh on all devices."""
        return self.config.mesh.sizes(self.nodes.count * self.nodes.devices)

    def command(self, python: Sequence[str] = PYTHON, file: Path | str | None = None) -> list[str]:
        """The words that start one process."""
        return [*python, "-m", "mixtral_jax.launch", self.config.stage, str(file or self.file)]


def jobs(path: str, overrides: Sequence[str], sweep: Sequence[str], nodes: Nodes, *, away: bool = False) -> list[Job]:
    """One job, or one for each point of the sweep: every combination of the values, each with a run name of its own.

    Raises:
        UserError: the configuration, or the mesh on those nodes, is wrong; a sweep is not `a.b=x,y`, or its points have
            names that an engine cannot tell apart.
    """
    base = load_config(path, overrides).config
    found = []
    for point in points(sweep):
        own = []
        if point:
            own = [*point, f"run_name={base.run_name}-{_point_name(point)}"]
            if base.checkpoint.directory:  # which belongs to one run
                own.append(f"checkpoint.directory={base.checkpoint.directory}/{_point_name(point)}")
        job = Job(load_config(path, [*overrides, *own]).config if own else base, nodes, away)
        if not job.config.goes_on:
            raise UserError(f"resume is {job.config.resume}, and a job that was stopped starts again: set resume=auto")
        try:
            check_sizes(job.config, job.sizes)
        except ValueError as error:
            raise UserError(f"{nodes}: {error}") from None
        found.append(job)
    if len({job.name for job in found}) < len(found):
        raise UserError("the points of the sweep have names that an engine cannot tell apart: shorten run_name")
    return found


def points(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each point, `["lr=1,2", "seed=0,1"]` as four; without a sweep the one that has none."""
    axes = []
    for text in sweep:
        key, equals, values = text.partition("=")
        several = [value.strip() for value in _outside_brackets(values) if value.strip()]
        if not (equals and key and several) or len(set(several)) < len(several):
            raise UserError(f"--sweep {text}: KEY=VALUE,VALUE with different values is expected")
        axes.append([f"{key}={value}" for value in several])
    named = [axis[0].partition("=")[0] for axis in axes]
    if len(set(named)) < len(named):
        raise UserError(f"--sweep names {next(k for k in named if named.count(k) > 1)} twice: give all its values once")
    return list(itertools.product(*axes))


def _outside_brackets(text: str) -> list[str]:
    """Parted at commas: `1,[2,{a: 3, b: 4}]` is two."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _point_name(point: Sequence[str]) -> str:
    """`optimizer.learning_rate=1e-4` as `learning_rate=1e-4`, without marks that no directory should have."""
    short = "-".join(re.sub(r"^[^=]*\.", "", text) for text in point)
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
    """Paths that every node must see; the machine that submits is none of them.

    Raises:
        UserError: one that lies on a place which each machine has for itself.
    """
    for key, place in places(job.config):
        if key != _COPIES and _lies_in(real := os.path.realpath(place), _OF_ONE_MACHINE):
            raise UserError(f"{key}: {real} is a place of this machine alone, and the nodes of the job must see it")


def _lies_in(place: str, directories: Iterable[str]) -> bool:
    """Whether a path is one of them, or in one."""
    return f"{place}/".startswith(tuple(f"{above}/" for above in directories))


def mounts(option: str, told: Sequence[str], pattern: str, such: str) -> dict[str, str]:
    """Sources of what is mounted, by its absolute path in the container; `pattern` has groups `path` and `source`.

    Raises:
        UserError: one that is none, or hides what is there, or two at the same path.
    """
    found: dict[str, str] = {}
    for text in told:
        match = re.fullmatch(pattern, text)
        if match is None:
            raise UserError(f"{option} {text}: {such} is expected")
        path = os.path.normpath(match["path"])
        if path in _NEEDED:
            raise UserError(f"{option} {text}: {path} holds what a container needs: mount it elsewhere")
        if found.setdefault(path, match["source"]) != match["source"]:
            raise UserError(f"{option} {text}: another one is mounted at the same path")
    return found


def check_mounted(config: RunConfig, mounted: Iterable[str] | None, remedy: str) -> None:
    """Paths of a run in a container, whose relative ones are those of the project that it was made of.

    What is written must outlive it. `mounted` None: what is there is not known.

    Raises:
        UserError: one that goes with the container, or is not in it, or is on nothing that is mounted.
    """
    for key, told in places(config):
        place = os.path.normpath(told)
        inside, passing = not place.startswith("/"), _lies_in(place, _OF_ONE_MACHINE)
        if key == _COPIES and (inside or passing):
            continue  # they may go with the container
        if key in _WRITTEN and (inside or (mounted is None and _lies_in(place, (*_OF_ONE_MACHINE, *_OF_IMAGE)))):
            raise UserError(f"{key}: {place} is inside of the container and goes with it: {remedy}")
        if inside and (_lies_in(place, _NOT_IN_IMAGE) or not os.path.exists(_GLOB.split(place)[0] or ".")):
            raise UserError(f"{key}: {place} is not in the project, of which the container is made: {remedy}")
        if not inside and (passing if mounted is None else not _lies_in(place, mounted)):
            raise UserError(f"{key}: {place} is on nothing that is mounted: {remedy}")


def directories(job: Job) -> list[str]:
    """What a container on this file system must see: directories of all paths, and the one that we stand in."""
    found = {os.getcwd()}
    for key, place in places(job.config):
        if key == _COPIES and job.nodes.count > 1 and _lies_in(os.path.realpath(place), _OF_ONE_MACHINE):
            continue  # on the other nodes nobody has made it
        named = _GLOB.split(os.path.abspath(place))[0]
        found.add(named if key in (*_WRITTEN, _COPIES) or os.path.isdir(named) else os.path.dirname(named))
    return sorted(found)


def places(config: RunConfig) -> list[tuple[str, str]]:
    """Paths of a configuration that are no addresses, with their dotted keys."""
    data, adapters = config.data, config.adapters
    named = [
        ("output_dir", config.output_dir), ("data.cache_dir", data.cache_dir), ("data.tokenizer", data.tokenizer),
        ("init_from", config.init_from), ("lora.init_from", adapters and adapters.init_from),
        ("resume_from", config.resume_from and run_and_step(config.resume_from)[0]), (_COPIES, data.staging_dir),
        ("checkpoint.directory", config.checkpoint.directory),
    ]  # fmt: skip
    for kind in ("train", "validation"):
        of_kind = [(f"data.{kind}.{source.name}", path) for source in getattr(data, kind) for path in source.paths]
        named += [(key, os.path.expanduser(path.removeprefix("file://"))) for key, path in of_kind]
    paths = [(key, str(place).removeprefix("file://")) for key, place in named if place]
    return [(key, path) for key, path in paths if not is_remote(path)]


def yaml_text(*objects: Mapping[str, Any]) -> str:
    """Objects as documents, without empty sections; long texts as blocks."""
    yaml, out = YAML(), io.StringIO()
    yaml.width, yaml.default_flow_style, yaml.explicit_start = 1 << 16, False, len(objects) > 1
    yaml.dump_all([_plain(o) for o in objects], out)
    return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain for key, v in value.items() if (plain := _plain(v)) not in ({}, None)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, str) and _YAML_1_1.fullmatch(value):
        return SingleQuotedScalarString(value)
    return LiteralScalarString(value) if isinstance(value, str) and "\n" in value else value
