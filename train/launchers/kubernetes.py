"""Kubernetes: a JobSet (one child a TPU slice, or one of GPU nodes), or an indexed Job alone; restarts by exit code.

A Job fails for the first of the rules of its podFailurePolicy that matches, and says in its message which that was
(`... matching FailJob rule at index 0`): that is how the rules of a JobSet (0.10 or newer: onJobFailureMessagePatterns)
tell a mistake from a preemption. jobset.sigs.k8s.io/docs and kubernetes.io/docs/tasks/job/pod-failure-policy, 2026-11.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.train.config import resolved_yaml
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.launchers.job import IN_IMAGE, Job, check_mounted, yaml_text
from mixtral_jax.train.plan import NODE_GPUS, Topology

CONTAINER, PORT = "train", 8476
RUN_FILE = "/etc/mixtral-jax/run.yaml"
# GKE's names of TPU machines: cloud.google.com/kubernetes-engine/docs/how-to/tpus
_TPU_KINDS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
_HOST_CHIPS = 4  # of a slice of several hosts
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_CONFIG_MAP_BYTES = 1 << 20
_FINAL = [int(code) for code in ExitCode.final() if code]
AGAIN = [int(code) for code in ExitCode.again()]


class Kubernetes(NamedTuple):
    """What the cluster is told beside the run."""

    image: str
    namespace: str = "default"
    queue: str | None = None  # of Kueue
    volumes: tuple[str, ...] = ()  # CLAIM:/PATH, persistent volume claims
    grace_seconds: int = 300
    max_restarts: int = 10
    plain: bool = False  # a Job without JobSet


def hosts(topology: Topology) -> tuple[int, int]:
    """Machines of one TPU slice, or of all GPUs, and the chips of each."""
    chips = topology.chips_per_slice
    if topology.libtpu is None:
        return -(-chips // NODE_GPUS), min(chips, NODE_GPUS)
    alone = 8 if topology.chip.torus == 2 else _HOST_CHIPS
    return (1, chips) if chips <= alone else (chips // _HOST_CHIPS, _HOST_CHIPS)


def gke_shape(libtpu: str) -> str:
    """`v5p:8x4x4` as GKE writes it: the sides in ascending order, but 2x2x1."""
    sides = libtpu.partition(":")[2].split("x")
    return "x".join(sides if "1" in sides else sorted(sides, key=int))


def manifest(job: Job, how: Kubernetes, topology: Topology | None = None) -> str:
    """All objects of one run as YAML. With `topology` on TPU slices, else on the job's nodes of GPUs.

    Raises:
        UserError: a volume that is none, a path of the run that no volume holds, a plain Job of several slices.
    """
    run = resolved_yaml(job.config)
    _check(job, how, topology, len(run.encode()))
    pod = _pod(job, how, topology)
    count, slices = (job.machine.nodes, 1) if topology is None else (hosts(topology)[0], topology.slices)
    work = {
        "parallelism": count, "completions": count, "completionMode": "Indexed", "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules(how.plain)}, "template": pod,
    }  # fmt: skip
    labels = {"kueue.x-k8s.io/queue-name": how.queue} if how.queue else {}
    about = {"name": job.name, "namespace": how.namespace, "labels": labels}
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": about,
        "data": {"run.yaml": run},
    }
    if how.plain:
        work["backoffLimit"] = 3 * count  # what ends otherwise than by a known code: each process three times
        alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": work}
        return yaml_text(settings, _service(about, job.name), alone)
    if topology is not None:  # one child a node pool, which is a slice
        about = about | {
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        }
    spec = {
        "network": {"enableDNSHostnames": True},
        "failurePolicy": {"maxRestarts": how.max_restarts, "rules": _set_rules()},
        "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": work}}],
    }
    return yaml_text(
        settings, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": about, "spec": spec}
    )


def _pod_rules(plain: bool) -> list[dict[str, Any]]:
    """In this order; `_set_rules` counts on it. A plain Job replaces the pod itself where it does not fail."""

    def codes(action: str, values: list[int]) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": values}}

    moved = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    again = "Ignore" if plain else "FailJob"
    return [codes("FailJob", _FINAL), {"action": again, **moved}, codes(again, AGAIN)]


def _set_rules() -> list[dict[str, Any]]:
    """By the number of the pod's rule: mistakes end the set, disruptions do not count. Everything else restarts it."""

    def rule(name: str, action: str, index: int) -> dict[str, Any]:
        pattern = f".*matching FailJob rule at index {index}.*"
        failed = {"onJobFailureReasons": ["PodFailurePolicy"], "onJobFailureMessagePatterns": [pattern]}
        return {"name": name, "action": action, **failed}

    return [rule("final", "FailJobSet", 0), rule("disrupted", "RestartJobSetAndIgnoreMaxRestarts", 1)]


def _pod(job: Job, how: Kubernetes, topology: Topology | None) -> dict[str, Any]:
    device, each = ("nvidia.com/gpu", job.machine.devices)
    selector: dict[str, str] = {}
    if topology is not None:
        device, each = "google.com/tpu", hosts(topology)[1]
        selector = {
            "cloud.google.com/gke-tpu-accelerator": _TPU_KINDS[topology.chip.name],
            "cloud.google.com/gke-tpu-topology": gke_shape(str(topology.libtpu)),
        }
    mounts = [{"name": "run", "mountPath": RUN_FILE.rpartition("/")[0]}]
    volumes: list[dict[str, Any]] = [{"name": "run", "configMap": {"name": job.name}}]
    for number, (claim, path) in enumerate(map(_volume, how.volumes)):
        mounts.append({"name": f"volume-{number}", "mountPath": path})
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
    if topology is None:  # NCCL and the workers of data preparation want more than 64 MB of it
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    container = {
        "name": CONTAINER, "image": how.image, "command": job.command(IN_IMAGE, RUN_FILE),
        "env": [{"name": name, **value} for name, value in _variables(job, how, topology).items()],
        "ports": [{"containerPort": PORT}], "volumeMounts": mounts,
        "resources": {"limits": {device: each}, "requests": {device: each}},
    }  # fmt: skip
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": how.grace_seconds}
    spec |= {"nodeSelector": selector} if selector else {}
    spec |= {"subdomain": job.name} if how.plain else {}
    return {"spec": spec | {"containers": [container], "volumes": volumes}}


def _variables(job: Job, how: Kubernetes, topology: Topology | None) -> dict[str, dict[str, Any]]:
    """What a process cannot know. GKE tells those of a slice who they are; several slices find each other by this."""
    first = f"{job.name}-0.{job.name}" if how.plain else f"{job.name}-slice-0-0.{job.name}"
    if topology is None:
        return {
            "JAX_COORDINATOR_ADDRESS": {"value": f"{first}:{PORT}"},
            "JAX_NUM_PROCESSES": {"value": str(job.machine.nodes)},
        }
    if topology.slices == 1:
        return {}
    label = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    return {
        "MEGASCALE_NUM_SLICES": {"value": str(topology.slices)},
        "MEGASCALE_SLICE_ID": {"valueFrom": {"fieldRef": {"fieldPath": label}}},
        "MEGASCALE_COORDINATOR_ADDRESS": {"value": first},
    }


def _service(about: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A headless one, which gives the pods of a plain Job their names."""
    spec = {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True}
    return {"apiVersion": "v1", "kind": "Service", "metadata": dict(about), "spec": spec}


def _volume(text: str) -> tuple[str, str]:
    claim, colon, path = text.partition(":")
    if not (claim and colon and path.startswith("/")):
        raise UserError(f"--volume {text}: CLAIM:/PATH is expected, a persistent volume claim and where it is mounted")
    return claim, path.rstrip("/")


def _check(job: Job, how: Kubernetes, topology: Topology | None, size: int) -> None:
    if how.plain and topology is not None and topology.slices > 1:
        raise UserError("--plain-job: a Job alone has no slices: leave it out, and use JobSet")
    for option, name in (("--namespace", how.namespace), ("--queue", how.queue)):
        if name is not None and not _LABEL.fullmatch(name):
            raise UserError(f"{option} {name!r}: small letters, digits and hyphens are expected, at most 63")
    if size > _CONFIG_MAP_BYTES:
        raise UserError(f"the run file has {size} bytes, and a ConfigMap holds {_CONFIG_MAP_BYTES}: shorten it")
    mounted = [path for _, path in map(_volume, how.volumes)]
    if len(set(mounted)) < len(mounted):
        raise UserError("--volume: two are mounted at the same path")
    check_mounted(job.config, mounted, "put it on a volume with --volume CLAIM:/PATH")


def files(job: Job, how: Kubernetes, topology: Topology | None) -> dict[Path, str]:
    """The manifest, in the launch directory of the run (here, where it is submitted from)."""
    return {job.here / "job.yaml": manifest(job, how, topology)}
