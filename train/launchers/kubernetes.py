"""Kubernetes: a JobSet (one child a TPU slice, or one of GPU nodes), or an indexed Job alone; restarts by exit code.

A Job fails for the first of the rules of its podFailurePolicy that matches, and says in its message which that was
(`... matching FailJob rule at index 0`): that is how the rules of a JobSet (0.10 or newer: onJobFailureMessagePatterns)
tell a mistake from a preemption. jobset.sigs.k8s.io/docs and kubernetes.io/docs/tasks/job/pod-failure-policy, 2026-11.
"""

import re
from typing import Any, NamedTuple

from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.launchers.job import IN_IMAGE, RUN_FILE, Job, check_mounted, mounts, yaml_text
from mixtral_jax.train.plan import NODE_GPUS, Topology

CONTAINER, PORT = "train", 8476
# GKE's names of TPU machines: cloud.google.com/kubernetes-engine/docs/how-to/tpus
_TPU_KINDS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
_HOST_CHIPS = 4  # of a slice of several hosts
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_VOLUME = r"(?P<source>[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?):(?P<path>/[^:]*)"
_CONFIG_MAP_BYTES = 1 << 20


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


def manifest(job: Job, how: Kubernetes, topology: Topology | None) -> str:
    """All objects of one run as YAML, for the slices of a `topology` of TPUs, or for nodes of GPUs.

    Raises:
        UserError: a volume that is none, a path of the run that no volume holds, a plain Job of several slices, a name
            or a run file that the cluster does not take.
    """
    tpu = topology if topology is not None and topology.libtpu is not None else None
    slices = tpu.slices if tpu else 1
    _check(job, how, slices)
    count = job.nodes.count // slices
    labels = {"kueue.x-k8s.io/queue-name": how.queue}
    about: dict[str, Any] = {"name": job.name, "namespace": how.namespace, "labels": labels}
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"run.yaml": job.text}}
    work = {
        "parallelism": count, "completions": count, "completionMode": "Indexed",
        "backoffLimit": how.max_restarts * count if how.plain else 0,  # one that ends takes the others with it
        "podFailurePolicy": {"rules": _pod_rules(how.plain)}, "template": _pod(job, how, tpu),
    }  # fmt: skip
    if how.plain:
        head = {"clusterIP": "None", "selector": {"job-name": job.name}, "publishNotReadyAddresses": True}
        service = {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": head}  # gives its pods their names
        return yaml_text(settings, service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": work})
    spec = {
        "network": {"enableDNSHostnames": True},
        "failurePolicy": {"maxRestarts": how.max_restarts, "rules": _set_rules()},
        "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": work}}],
    }
    if tpu:  # one child a node pool, which is a slice
        alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        about = about | {"annotations": alone}
    whole = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": about, "spec": spec}
    return yaml_text(settings, whole)


def _pod_rules(plain: bool) -> list[dict[str, Any]]:
    """In this order; `_set_rules` counts on it. A plain Job replaces the pod itself where it does not fail."""

    def codes(action: str, *values: ExitCode) -> dict[str, Any]:
        told = {"containerName": CONTAINER, "operator": "In", "values": [int(code) for code in values]}
        return {"action": action, "onExitCodes": told}

    final = codes("FailJob", *(code for code in ExitCode.final() if code))
    again = "Ignore" if plain else "FailJob"
    moved = {"action": again, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    # of the pods that a disrupted one has told to save, one may be the first to end
    stopped = codes(again, ExitCode.STOPPED)
    others = [code for code in ExitCode.again() if code != ExitCode.STOPPED]
    return [final, moved, stopped, *([] if plain else [codes(again, *others)])]


def _set_rules() -> list[dict[str, Any]]:
    """By the number of the pod's rule: mistakes end the set, disruptions do not count. Everything else restarts it."""
    told = (("final", "FailJobSet", "0"), ("disrupted", "RestartJobSetAndIgnoreMaxRestarts", "[12]"))
    return [{
        "name": name, "action": action, "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f".*matching FailJob rule at index {index}.*"],
    } for name, action, index in told]  # fmt: skip


def _pod(job: Job, how: Kubernetes, tpu: Topology | None) -> dict[str, Any]:
    held = [("run", RUN_FILE.rpartition("/")[0], {"configMap": {"name": job.name}})]
    for number, (path, claim) in enumerate(_claims(how).items()):
        held.append((f"volume-{number}", path, {"persistentVolumeClaim": {"claimName": claim}}))
    if tpu is None:  # NCCL and the workers of data preparation want more than 64 MB of it
        held.append(("shm", "/dev/shm", {"emptyDir": {"medium": "Memory"}}))
    devices = {"google.com/tpu" if tpu else "nvidia.com/gpu": job.nodes.devices}
    container = {
        "name": CONTAINER, "image": how.image, "command": job.command(IN_IMAGE, RUN_FILE),
        "env": [{"name": name, **value} for name, value in _variables(job, how, tpu).items()] or None,
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [{"name": name, "mountPath": path} for name, path, _ in held],
        "resources": {"limits": devices, "requests": devices},
    }  # fmt: skip
    selector = tpu and {
        "cloud.google.com/gke-tpu-accelerator": _TPU_KINDS[tpu.chip.name],
        "cloud.google.com/gke-tpu-topology": gke_shape(str(tpu.libtpu)),
    }
    return {"spec": {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": how.grace_seconds, "nodeSelector": selector,
        "subdomain": job.name if how.plain else None, "containers": [container],
        "volumes": [{"name": name, **what} for name, _, what in held],
    }}  # fmt: skip


def _variables(job: Job, how: Kubernetes, tpu: Topology | None) -> dict[str, dict[str, Any]]:
    """What a process cannot know. GKE tells those of a slice who they are; several slices find each other by this."""
    first = f"{job.name}-0.{job.name}" if how.plain else f"{job.name}-slice-0-0.{job.name}"
    if tpu is None:
        told = {"JAX_COORDINATOR_ADDRESS": f"{first}:{PORT}", "JAX_NUM_PROCESSES": str(job.nodes.count)}
        return {name: {"value": value} for name, value in told.items()}
    if tpu.slices == 1:
        return {}
    label = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    return {
        "MEGASCALE_NUM_SLICES": {"value": str(tpu.slices)},
        "MEGASCALE_SLICE_ID": {"valueFrom": {"fieldRef": {"fieldPath": label}}},
        "MEGASCALE_COORDINATOR_ADDRESS": {"value": first},
    }


def _claims(how: Kubernetes) -> dict[str, str]:
    """Persistent volume claims by their paths."""
    return mounts("--volume", how.volumes, _VOLUME, "CLAIM:/PATH, a claim and its place,")


def _check(job: Job, how: Kubernetes, slices: int) -> None:
    if how.plain and slices > 1:
        raise UserError("--plain-job: a Job alone has no slices: leave it out, and use JobSet")
    for option, name in (("--namespace", how.namespace), ("--queue", how.queue)):
        if name is not None and not _LABEL.fullmatch(name):
            raise UserError(f"{option} {name!r}: small letters, digits and hyphens are expected, at most 63")
    size = len(job.text.encode())
    if size > _CONFIG_MAP_BYTES:
        raise UserError(f"the run file has {size} bytes, and a ConfigMap holds {_CONFIG_MAP_BYTES}: shorten it")
    check_mounted(job.config, _claims(how), "put it on a volume with --volume CLAIM:/PATH")
