"""SLURM: an sbatch script that hands on the signal ahead of its time limit, and requeues itself by the run's word."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.launchers.job import PYTHON, Job, check_shared, quoted, run_file

VERDICT = "mixtral_jax.train.launchers"


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


def script(jobs: Sequence[Job], how: Slurm, directory: Path) -> str:
    """One script for a run, or for the points of a sweep as an array.

    Raises:
        UserError: a number or a line that SLURM does not take.
    """
    if how.chain < 1 or how.warn_seconds < 1:
        raise UserError(f"--chain {how.chain} and --warn-seconds {how.warn_seconds} are 1 or more")
    if how.chain > 1 and len(jobs) > 1:
        raise UserError("--chain and --sweep: a chain is of one run")
    python = (how.python, "-P") if how.python else PYTHON
    return "\n".join(["#!/bin/bash", *_directives(jobs, how, directory), _BODY.format(
        points="\n".join(_point(i, job, python) for i, job in enumerate(jobs)),
        where=quoted([str(Path.cwd())]), python=quoted(python), verdict=VERDICT,
        container=f" --container-image={quoted([how.container])}" if how.container else "",
        requeue="false" if how.chain > 1 else "true",
    )])  # fmt: skip


def files(jobs: Sequence[Job], how: Slurm, directory: Path) -> dict[Path, str]:
    """The script in `directory`, and the run file of each job.

    Raises:
        UserError: see `script`; a path that the nodes do not share.
    """
    for job in jobs:
        check_shared(job)
    made = {path: text for job in jobs for path, text in run_file(job).items()}
    return made | {directory / "job.sbatch": script(jobs, how, directory)}


def start(directory: Path, how: Slurm) -> list[list[str]]:
    """The commands that hand it over."""
    return [["sbatch", *["--dependency=singleton"] * (how.chain > 1), str(directory / "job.sbatch")]] * how.chain


def _directives(jobs: Sequence[Job], how: Slurm, directory: Path) -> list[str]:
    machine, name = jobs[0].machine, jobs[0].name if len(jobs) == 1 else directory.parent.name
    asked = {
        "job-name": name, "nodes": machine.nodes, "ntasks-per-node": machine.processes,
        "gpus-per-node": machine.devices if how.gpus else None, "partition": how.partition, "account": how.account,
        "qos": how.qos, "time": how.time, "signal": f"B:USR1@{how.warn_seconds}", "open-mode": "append",
        "output": f"{directory}/slurm-%j.log", "array": f"0-{len(jobs) - 1}" if len(jobs) > 1 else None,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in asked.items() if value is not None]
    words.append("--no-requeue" if how.chain > 1 else "--requeue")
    for word in (*words, *how.lines):
        if "\n" in word or (not word.startswith("-")):
            raise UserError(f"#SBATCH {word!r}: a line of it begins with - and is one line")
    return [f"#SBATCH {word}" for word in (*words, *how.lines)]


def _point(index: int, job: Job, python: Sequence[str]) -> str:
    return f"  {index}) run={quoted([str(job.run)])}; set -- {quoted(job.command(python))} ;;"


_BODY = """
# Made by `mixtral-jax submit slurm`. What comes of an attempt is decided by the run's STATUS, then by srun's code.
set -u
case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{points}
esac
cd {where} || exit 2
if [ -e "$run/launch/final" ]; then  # an earlier job of a chain, or somebody, has ended it for good
  echo "nothing is started: $(cat "$run/launch/final")"; exit 0
fi
before=$({python} -m {verdict} "$run" attempt) || exit 2
srun --kill-on-bad-exit=0{container} "$@" &
steps=$!
told=1 code=143
trap 'told=1; kill -USR1 "$steps"' USR1 TERM  # srun hands it to every process: it saves, and ends with 75
while [ "$told" ]; do  # a trap ends a wait, too
  told=
  wait "$steps"; ended=$?
  [ "$ended" = 127 ] || code=$ended  # 127: it was waited for before
done
said=$({python} -m {verdict} "$run" "$code" "$before")
[ "$said" ] || said="final $code its verdict could not be found"
echo "$said"
read -r what code why <<<"$said"
if [ "$what" = again ]; then
  if {requeue}; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
fi
echo "$code $why" >"$run/launch/final"
exit "$code"
"""
