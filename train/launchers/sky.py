"""SkyPilot: a managed job on any cloud's GPUs or TPUs; and xpk: the command line of a workload on GKE's TPUs."""

import base64
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.launchers.job import IMAGE_DIR, IN_IMAGE, RUN_FILE, Job, Nodes, check_mounted, mounts, yaml_text
from mixtral_jax.train.launchers.kubernetes import hosts
from mixtral_jax.train.plan import Topology, parse_topology

_AGAIN = [int(code) for code in ExitCode.again()]


class Sky(NamedTuple):
    """Where, and with what."""

    accelerators: str  # H100:8, tpu-v6e-16
    infra: str | None = None  # aws, gcp/us-central1
    image: str | None = None  # of a container that has this project; None: the working directory is installed
    mounts: tuple[str, ...] = ()  # /PATH=s3://BUCKET, in which run, cache and data lie
    spot: bool = True


def task(job: Job, how: Sky, topology: Topology | None) -> str:
    """The YAML of `sky jobs launch`.

    Raises:
        UserError: a mount that is none; a path of the run on no mount; nothing to install.
    """
    buckets = mounts("--mount", how.mounts, r"(?P<path>/[^=]*?)/*=(?P<source>.*://.*)", "/PATH=s3://BUCKET")
    check_mounted(job.config, buckets, "put it on a bucket with --mount /PATH=s3://BUCKET")
    if not how.image and not Path("pyproject.toml").exists():
        raise UserError("sky: there is no pyproject.toml here: submit from the project's directory, or give --image")
    slices = how.accelerators.startswith("tpu-")
    setup = f"python -m pip install --quiet '.[{'tpu' if slices else 'cuda'}]' --constraint constraints.txt"
    start = shlex.join(job.command(IN_IMAGE, RUN_FILE))
    return yaml_text({
        "name": job.name, "num_nodes": 1 if slices else job.nodes.count,
        "resources": {
            "accelerators": how.accelerators, "infra": how.infra, "use_spot": how.spot,
            "image_id": f"docker:{how.image}" if how.image else None,
            # more than 0 would start again behind 2, 3 and 4, too
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": _AGAIN},
        },
        "workdir": None if how.image else ".",
        "file_mounts": {RUN_FILE: str(job.file)}
        | {path: {"source": source, "mode": "MOUNT_CACHED"} for path, source in buckets.items()},
        "setup": None if how.image else setup, "run": f"cd {IMAGE_DIR} && {start}" if how.image else start,
    })  # fmt: skip


def nodes(accelerators: str, count: int) -> Nodes:
    """`H100:8` on so many nodes; a TPU slice (`tpu-v5p-64`) is one of SkyPilot's, with the hosts that it has.

    Raises:
        UserError: accelerators that are none.
    """
    if match := re.fullmatch(r"tpu-(v5p|v5litepod|v6e)-(\d+)(:1)?", accelerators):
        if count != 1:
            raise UserError(f"--nodes {count}: a TPU slice is one node of SkyPilot, whatever its hosts")
        return Nodes(*hosts(parse_topology(f"{match[1].replace('litepod', 'e')}-{match[2]}")))
    match = re.fullmatch(r"(?!tpu)[A-Za-z0-9-]+(?::(\d+))?", accelerators, re.IGNORECASE)
    if not match:
        raise UserError(f"--accelerators {accelerators}: NAME:COUNT or a TPU is expected, as H100:8 or tpu-v6e-16")
    return Nodes(count, int(match[1] or 1))


class Xpk(NamedTuple):
    """The cluster, and the image that runs there."""

    cluster: str
    image: str
    project: str | None = None
    zone: str | None = None
    max_restarts: int = 10


def workload(job: Job, how: Xpk, topology: Topology | None) -> str:
    """A script of `xpk workload create`; without --restart-on-exit-codes it takes 75 and 124 for final.

    Raises:
        UserError: there is no TPU slice; what the run writes would go with it.
    """
    check_mounted(job.config, None, "name an absolute path on a storage that xpk attaches to the workload")
    if topology is None or topology.libtpu is None:
        raise UserError("xpk: --topology names no TPU slice, such as v5p-64: use submit k8s for GPUs")
    kind = re.sub(r"^\d+x", "", topology.name)
    if ":" in kind:
        raise UserError(f"xpk: --topology {topology.name}: name the slice by its size, such as v5p-64")
    run = base64.b64encode(job.text.encode()).decode()  # letters that no shell on the way touches
    start = shlex.join(job.command(IN_IMAGE, "/tmp/run.yaml"))
    told = {
        "cluster": how.cluster, "workload": job.name, "docker-image": how.image,
        "tpu-type": kind.replace("v5e-", "v5litepod-"),
        "num-slices": topology.slices, "restart-on-exit-codes": ",".join(map(str, _AGAIN)),
        "max-restarts": how.max_restarts, "project": how.project, "zone": how.zone,
        "command": f"printf %s {run} | base64 -d > /tmp/run.yaml && exec {start}",
    }  # fmt: skip
    words = ["xpk", "workload", "create", *(f"--{key}={value}" for key, value in told.items() if value is not None)]
    return f"#!/bin/sh\n{shlex.join(words)}\n"
