"""SLURM: an sbatch script that hands on the signal ahead of its time limit, and requeues itself by the run's word."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.launchers.job import IN_IMAGE, PYTHON, Job, Plan, check_shared, directories
from mixtral_jax.train.plan import Topology

_TIME = re.compile(r"((?P<days>\d+)-)?(?P<rest>\d+(:\d+){0,2})|UNLIMITED|INFINITE", re.IGNORECASE)


class Slurm(NamedTuple):
    """What is asked of the controller; None and empty: its own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpus: bool = True  # the devices of a node are GPUs that it counts
    container: str | None = None  # of srun's --container-image (pyxis)
    python: str | None = None
    warn_seconds: int = 180
    chain: int = 1
    lines: tuple[str, ...] = ()  # of #SBATCH


def plan(jobs: Sequence[Job], how: Slurm, topology: Topology | None) -> Plan:
    """One script for a run, or beside the runs of a sweep one for all of them, as an array.

    Raises:
        UserError: a number or a line that SLURM does not take; a path that the nodes do not share; tasks that leave
            devices idle.
    """
    nodes = jobs[0].nodes
    if nodes.processes not in (1, nodes.devices):  # of several on a node each takes the device of its number
        raise UserError(f"--processes {nodes.processes}: 1 is expected, or one a device: {nodes.devices}")
    if how.chain < 1 or not 1 <= how.warn_seconds <= 65535:
        raise UserError(f"--chain {how.chain} is 1 or more, --warn-seconds {how.warn_seconds} 1 to 65535")
    if how.time and 0 < _seconds(how.time) <= how.warn_seconds:
        raise UserError(f"--time {how.time} is not longer than --warn-seconds {how.warn_seconds}: it would only begin")
    if how.chain > 1 and len(jobs) > 1:
        raise UserError("--chain and --sweep: a chain is of one run")
    for job in jobs:
        check_shared(job)
    place = jobs[0].here
    if len(jobs) > 1:
        place = jobs[0].run.parent / f"{jobs[0].config.run_name.partition('=')[0]}.sweep" / "launch"
    path = place / "job.sbatch"
    # behind all jobs of its name: a chain, and what is submitted again while the run is under way
    command = ["sbatch", *["--dependency=singleton"] * (len(jobs) == 1), str(path)]
    return {path: script(jobs, how, place)}, [command] * how.chain


def _seconds(time: str) -> int:
    """Of a limit; 0: there is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time}: minutes, H:M:S or D-H:M:S is expected, as sbatch has it")
    parts = [int(part) for part in (match["rest"] or "0").split(":")]
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return int(match["days"] or 0) * 86400 + sum(count * unit for count, unit in zip(parts, units, strict=False))


def script(jobs: Sequence[Job], how: Slurm, directory: Path) -> str:
    """What sbatch gets, with its log in `directory`.

    Raises:
        UserError: a line that SLURM does not take.
    """
    python = (how.python, "-P") if how.python else IN_IMAGE if how.container else PYTHON
    seen = sorted({place for job in jobs for place in (*directories(job), str(job.here))})
    told = {"image": how.container, "mounts": ",".join(f"{p}:{p}" for p in seen), "workdir": os.getcwd()}  # for pyxis
    inside = f" {shlex.join(f'--container-{key}={value}' for key, value in told.items())}" if how.container else ""
    points = [f"run={shlex.quote(str(job.run))}; set -- {shlex.join(job.command(python))}" for job in jobs]
    return "\n".join(["#!/bin/bash", *_directives(jobs, how, directory), _BODY.format(
        points="\n".join(f"  {index}) {point} ;;" for index, point in enumerate(points)),
        where=shlex.quote(os.getcwd()), python=shlex.join(python), inside=inside,
        alone=f"mkdir -p {shlex.join(seen)} && srun --nodes=1 --ntasks=1{inside} " if inside else "",
        requeue="false" if how.chain > 1 else "true",
    )])  # fmt: skip


def _directives(jobs: Sequence[Job], how: Slurm, directory: Path) -> list[str]:
    nodes, name = jobs[0].nodes, jobs[0].name if len(jobs) == 1 else directory.parent.name
    asked = {
        "job-name": name, "nodes": nodes.count, "ntasks-per-node": nodes.processes,
        "gpus-per-node": nodes.devices if how.gpus else None, "partition": how.partition, "account": how.account,
        "qos": how.qos, "time": how.time, "signal": f"B:USR1@{how.warn_seconds}", "open-mode": "append",
        "output": f"{str(directory).replace('%', '%%')}/slurm-%j.log",
        "array": f"0-{len(jobs) - 1}" if len(jobs) > 1 else None,
    }  # fmt: skip
    words = [f"--{key}={shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
    words.append("--no-requeue" if how.chain > 1 else "--requeue")
    for word in (*words, *how.lines):
        if "\n" in word or (not word.startswith("-")):
            raise UserError(f"#SBATCH {word!r}: a line of it begins with - and is one line")
    return [f"#SBATCH {word}" for word in (*words, *how.lines)]


_BODY = """
# Made by `mixtral-jax submit slurm`. What comes of an attempt is decided by the run's STATUS, then by srun's code.
set -u
case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{points}
esac
cd {where} || exit 2
ask() {{ {alone}{python} -m mixtral_jax.train.launchers "$run" "$@"; }}
if [ -e "$run/launch/final" ]; then  # an earlier job of a chain, or somebody, has ended it for good
  read -r code why <"$run/launch/final"
  echo "nothing is started: $code $why"; exit "${{code:-2}}"  # what waits for this job learns how the run ended
fi
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun inherits it no more
told='' warned='' steps='' code=75
trap 'told=1 warned=1; [ -z "$steps" ] || kill -USR1 "$steps"' USR1  # srun hands it on: all save, and end with 75
trap 'told=1; [ -z "$steps" ] || kill -USR1 "$steps"' TERM
before=$(ask attempt) || exit 2
if [ -z "$told" ]; then
  srun --kill-on-bad-exit=0{inside} "$@" &
  steps=$! told=1 code=143
  while [ "$told" ]; do  # a trap ends a wait, too
    told=
    wait "$steps"; ended=$?
    [ "$ended" = 127 ] || code=$ended  # 127: it was waited for before
  done
fi
said=$(ask "$code" "$before")
echo "${{said:?no verdict on code $code: see above}}"
read -r what code why <<<"$said"
if [ "$what" = again ]; then
  this=$SLURM_JOB_ID  # one task of an array has the number of the whole
  [ -z "${{SLURM_ARRAY_JOB_ID:-}}" ] || this=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
  # behind scancel a job is completing while this runs; behind its limit, too, but of that it was warned
  if [ -z "$warned" ] && [ "$(squeue -h -j "$this" -o %T)" = COMPLETING ]; then
    echo "cancelled, or preempted for good: this script does not start it again"
  elif {requeue}; then
    scontrol requeue "$this"
  fi
  exit "$code"
fi
if [ "$code" != 2 ] || [ ! -e "$run/LEASE" ]; then  # refused where another job has the run: that one goes on
  echo "$code $why" >"$run/launch/final"
fi
exit "$code"
"""
