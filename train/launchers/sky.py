"""SkyPilot: a managed job on any cloud's GPUs or TPUs; and xpk: the command line of a workload on GKE's TPUs."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.launchers.job import IN_IMAGE, Job, Machine, check_mounted, quoted, run_file, yaml_text
from mixtral_jax.train.launchers.kubernetes import AGAIN, hosts
from mixtral_jax.train.plan import Topology, parse_topology

_SETUP = "python -m pip install --quiet '.[{extra}]' --constraint constraints.txt"


class Sky(NamedTuple):
    """Where, and with what."""

    accelerators: str  # H100:8, tpu-v6e-16
    infra: str | None = None  # aws, gcp/us-central1
    image: str | None = None  # of a container that has this project; None: the working directory is installed
    mounts: tuple[str, ...] = ()  # /PATH=s3://BUCKET, in which run, cache and data lie
    max_restarts: int = 3  # after errors of other codes


def task(job: Job, how: Sky) -> str:
    """The YAML of `sky jobs launch`.

    Raises:
        UserError: a mount that is none; a path of the run on no mount; nothing to install.
    """
    mounts = dict(map(_mount, how.mounts))
    check_mounted(job.config, list(mounts), "put it on a bucket with --mount /PATH=s3://BUCKET")
    if not how.image and not Path("pyproject.toml").exists():
        raise UserError("sky: there is no pyproject.toml here: submit from the project's directory, or give --image")
    slices = how.accelerators.startswith("tpu-")
    extra = "tpu" if slices else "cuda"
    resources: dict[str, Any] = {
        "accelerators": how.accelerators, "infra": how.infra, "use_spot": True,
        "image_id": f"docker:{how.image}" if how.image else None,
        "job_recovery": {"max_restarts_on_errors": how.max_restarts, "recover_on_exit_codes": AGAIN},
    }  # fmt: skip
    told = {
        "name": job.name, "num_nodes": 1 if slices else job.machine.nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "workdir": None if how.image else ".",
        "file_mounts": {"/etc/mixtral-jax/run.yaml": str(job.here / "run.yaml")}
        | {path: {"source": source, "mode": "MOUNT_CACHED"} for path, source in mounts.items()},
        "setup": None if how.image else _SETUP.format(extra=extra),
        "run": quoted(job.command(IN_IMAGE, "/etc/mixtral-jax/run.yaml")),
    }  # fmt: skip
    return yaml_text(told)


def machine(accelerators: str, nodes: int) -> Machine:
    """`H100:8` on so many nodes; a TPU slice (`tpu-v5p-64`) is one of SkyPilot's, with the hosts that it has.

    Raises:
        UserError: accelerators that are none.
    """
    if match := re.fullmatch(r"tpu-(v5p|v5litepod|v6e)-(\d+)(:1)?", accelerators):
        if nodes != 1:
            raise UserError(f"--nodes {nodes}: a TPU slice is one node of SkyPilot, whatever its hosts")
        return Machine(*hosts(parse_topology(f"{match[1].replace('litepod', 'e')}-{match[2]}")))
    match = re.fullmatch(r"(?!tpu)[A-Za-z0-9-]+(?::(\d+))?", accelerators, re.IGNORECASE)
    if not match:
        raise UserError(f"--accelerators {accelerators}: NAME:COUNT or a TPU is expected, as H100:8 or tpu-v6e-16")
    return Machine(nodes, int(match[1] or 1))


def _mount(text: str) -> tuple[str, str]:
    path, equals, source = text.partition("=")
    if not (path.startswith("/") and equals and "://" in source):
        raise UserError(f"--mount {text}: /PATH=s3://BUCKET is expected")
    return path.rstrip("/"), source


def files(job: Job, how: Sky) -> Mapping[Path, str]:
    """The task, and the run file that it takes along."""
    return {job.here / "task.yaml": task(job, how)} | run_file(job)


class Xpk(NamedTuple):
    """The cluster, and the image that runs there."""

    cluster: str
    image: str
    project: str | None = None
    zone: str | None = None
    max_restarts: int = 10


def workload(job: Job, how: Xpk, topology: Topology) -> list[str]:
    """The words of `xpk workload create`; without --restart-on-exit-codes it takes 75 and 124 for final.

    Raises:
        UserError: the machine is no TPU slice; what the run writes would go with it.
    """
    check_mounted(job.config, None, "name an absolute path on a storage that xpk attaches to the workload")
    if topology.libtpu is None:
        raise UserError(f"xpk: {topology.name} is no TPU slice: use submit k8s for GPUs")
    kind = topology.name.rpartition("x")[2] if topology.slices > 1 else topology.name
    if ":" in kind:
        raise UserError(f"xpk: --topology {topology.name}: name the slice by its size, such as v5p-64")
    command = quoted(job.command(IN_IMAGE, "/tmp/run.yaml"))
    told = {
        "cluster": how.cluster, "workload": job.name, "docker-image": how.image,
        "tpu-type": kind.replace("v5e-", "v5litepod-"),
        "num-slices": topology.slices, "restart-on-exit-codes": ",".join(map(str, AGAIN)),
        "max-restarts": how.max_restarts, "project": how.project, "zone": how.zone,
        "command": f"printf %s {quoted([_encoded(job)])} | base64 -d > /tmp/run.yaml && exec {command}",
    }  # fmt: skip
    return ["xpk", "workload", "create", *(f"--{key}={value}" for key, value in told.items() if value is not None)]


def _encoded(job: Job) -> str:
    """The run file in letters that no shell on the way touches."""
    return base64.b64encode(next(iter(run_file(job).values())).encode()).decode()
