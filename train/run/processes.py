"""How the processes of one run find each other.

`detect` reads an environment and says what it means; it touches nothing, so every scheduler is tested without one.
Half an answer is an error that names the missing half: guessing would start N separate runs into one directory.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run.joining import join

DEFAULT_PORT = 8476
_GOOGLE_PCI_VENDOR = "0x1ae0"
# PCI device ids of TPU chips: v2/v3, v4, v5p, v5e, v6e, v7. Google's network cards share the vendor id.
_TPU_PCI_DEVICES = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


@dataclass(frozen=True)
class ProcessSetup:
    """One process among several. With source `tpu` the runtime's own metadata says the rest, and it is None here."""

    source: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def detect(
    env: Mapping[str, str], *, coordinator: str | None = None, num_processes: int | None = None,
    process_id: int | None = None, tpu_chips: int = 0,
) -> ProcessSetup | None:  # fmt: skip
    """What this process is part of; None means that it is alone.

    In order: explicit settings, JAX_* variables, TPU variables (GKE), Kubernetes indexed jobs and JobSets, SLURM,
    SkyPilot, and TPU chips in this machine (`tpu_chips`), whose metadata server the runtime asks by itself.

    Raises:
        UserError: some of a scheme's settings are there and others are missing (named), or one makes no sense.
    """
    explicit = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    given = {key: str(value) for key, value in explicit.items() if value is not None}
    if given == {"--num-processes": "1"}:
        return None
    if given:
        return _from_three(given, tuple(explicit), "explicit settings")
    indexed = "JOB_COMPLETION_INDEX" in env
    tasks = any((env.get(key) or "1") != "1" for key in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    slurm = tasks or (env.get("SLURM_PROCID") or "0") != "0"
    # both know count and number by themselves; the address may be given, where names do not resolve
    known = ("JAX_COORDINATOR_ADDRESS",) if slurm else _JAX_THREE if indexed else ()
    if "JAX_PROCESS_ID" in env or any(key in env for key in _JAX_THREE if key not in known):
        return _from_three(env, _JAX_THREE, "environment")
    tpu = _tpu_variables(env)
    if tpu:
        return tpu
    if indexed:
        return None if _is_lone_tpu_host(env) else _kubernetes(env)
    if slurm:
        return _slurm(env)
    if any(key in env for key in _SKYPILOT_THREE):
        return _skypilot(env)
    return ProcessSetup("tpu") if tpu_chips and _may_use_tpu(env) else None


def initialize(
    *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
    timeout: float = 60.0,
) -> None:  # fmt: skip
    """Join the other processes within `timeout` seconds, if there are any; call before the first jax computation.

    Raises:
        UserError: see `detect`; or the coordinator's address is none.
        PeerLost: they are not all there in time, or the coordinator's port is taken.
    """
    setup = detect(
        os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id,
        tpu_chips=count_tpu_chips(),
    )  # fmt: skip
    if setup is None:
        return
    if setup.coordinator is not None:
        assert setup.num_processes is not None and setup.process_id is not None
        join(setup.coordinator, setup.num_processes, setup.process_id, timeout, setup.local_device_ids)
        return
    import jax  # after the environment was read: importing it takes a second that a usage error need not wait for

    jax.distributed.initialize()


def count_tpu_chips(sys_root: Path = Path("/sys")) -> int:
    """TPU chips on this machine's PCI bus; 0 where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        return 0
    chips = 0
    for vendor in sys_root.glob("bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == _GOOGLE_PCI_VENDOR:
            chips += (vendor.parent / "device").read_text().strip() in _TPU_PCI_DEVICES
    return chips


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `a`, `a,b`, `a[001-003,7],b`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if not match:
        raise UserError(f"SLURM's node list {node_list!r} cannot be read")
    return match[1] + (match[2] or "") + (match[3] or "")


_JAX_THREE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_MEGASCALE_THREE = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
_SKYPILOT_THREE = ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS")


def _from_three(env: Mapping[str, str], keys: tuple[str, ...], source: str) -> ProcessSetup | None:
    """Coordinator, process count and process id under the three given names."""
    address, count, index = _require(env, keys, source)
    port = env.get("JAX_COORDINATOR_PORT")
    return _setup(source, address, _number(keys[1], count), _number(keys[2], index), port=port)


def _require(env: Mapping[str, str], keys: tuple[str, ...], source: str, hint: str = "") -> list[str]:
    missing = [key for key in keys if not env.get(key)]
    if missing:
        present = [key for key in keys if env.get(key)]
        raise UserError(
            f"{source}: {' and '.join(present) or 'part of the setting'} {'is' if len(present) < 2 else 'are'} set "
            f"but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            f"{hint or ': set all of them or none'}"
        )
    return [env[key] for key in keys]


def _number(key: str, text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"{key} must be a whole number, not {text!r}")
    return int(text)


def _setup(
    source: str, address: str, num_processes: int, process_id: int, *, port: str | None = None,
    local_device_ids: tuple[int, ...] | None = None,
) -> ProcessSetup | None:  # fmt: skip
    if not 0 <= process_id < num_processes:
        raise UserError(f"{source}: process id {process_id} is not below the number of processes, {num_processes}")
    if num_processes == 1:
        return None
    if not re.search(r":\d+$", address):
        address = f"{address}:{port or DEFAULT_PORT}"
    return ProcessSetup(source, address, num_processes, process_id, local_device_ids)


def _may_use_tpu(env: Mapping[str, str]) -> bool:
    platforms = env.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms.split(",")


def _tpu_variables(env: Mapping[str, str]) -> ProcessSetup | None:
    """GKE gives each TPU worker its host names and number; several slices add MEGASCALE_*."""
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    sliced = env.get("MEGASCALE_NUM_SLICES") != "1" and any(env.get(key) for key in _MEGASCALE_THREE)
    alone = len(hosts.split(",")) < 2 and (env.get("TPU_WORKER_ID") or "0") == "0"
    if not _may_use_tpu(env) or (alone and not sliced):
        return None
    _require({**env, "TPU_WORKER_HOSTNAMES": hosts}, ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), "TPU")
    if sliced:
        _require(env, _MEGASCALE_THREE, "TPU with several slices")
    return ProcessSetup("tpu")


def _is_lone_tpu_host(env: Mapping[str, str]) -> bool:
    """The one pod of a slice of one host, as GKE tells it, where nobody speaks of other processes."""
    told = any(env.get(key) for key in (*_JAX_THREE, "JAX_PROCESS_COUNT", "JOB_INDEX", "PROCESSES_IN_JOB"))
    sliced = env.get("MEGASCALE_NUM_SLICES", "1") != "1"
    named = (env.get("TPU_WORKER_HOSTNAMES", ""), env.get("TPU_WORKER_ID"), env["JOB_COMPLETION_INDEX"])
    return not (told or sliced) and named[0] != "" and "," not in named[0] and named[1:] == ("0", "0")


def _kubernetes(env: Mapping[str, str]) -> ProcessSetup | None:
    """An indexed Job, or a JobSet of several: id = JOB_INDEX * PROCESSES_IN_JOB + JOB_COMPLETION_INDEX."""
    env = {"JAX_NUM_PROCESSES": env.get("JAX_PROCESS_COUNT", ""), **env}
    if env.get("JAX_NUM_PROCESSES") == "1":
        return None
    keys = ("JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
    index, address, count = _require(
        env, keys, "Kubernetes", ": set them in the manifest (JAX_NUM_PROCESSES=1 for a single process)"
    )
    process_id = _number(keys[0], index)
    if env.get("JOB_INDEX") or env.get("PROCESSES_IN_JOB"):
        job, size = _require(env, ("JOB_INDEX", "PROCESSES_IN_JOB"), "Kubernetes JobSet")
        process_id += _number("JOB_INDEX", job) * _number("PROCESSES_IN_JOB", size)
    port = env.get("JAX_COORDINATOR_PORT")
    return _setup("kubernetes", address, _number(keys[2], count), process_id, port=port)


def _slurm(env: Mapping[str, str]) -> ProcessSetup | None:
    """One process per task of a step that srun started."""
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or ""
    if tasks == "1":
        return None
    hint = ": start the processes with srun, or say --num-processes 1"
    keys = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    job, nodes, index, local, tasks = _require({**env, "SLURM_NTASKS": tasks}, keys, "SLURM", hint)
    port = str(65535 - 4095 + _number("SLURM_JOB_ID", job) % 4096)  # two jobs on one node rarely share it
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0]  # "2(x3)": 2 on each of 3
    sees_one = len(env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    devices = None if per_node == "1" or sees_one else (_number("SLURM_LOCALID", local),)
    count, process_id = _number("SLURM_NTASKS", tasks), _number("SLURM_PROCID", index)
    address = env.get("JAX_COORDINATOR_ADDRESS") or first_host(nodes)
    return _setup("slurm", address, count, process_id, port=port, local_device_ids=devices)


def _skypilot(env: Mapping[str, str]) -> ProcessSetup | None:
    """One process per node; the first node of the list coordinates."""
    count, rank, hosts = _require(env, _SKYPILOT_THREE, "SkyPilot")
    num_processes, process_id = _number("SKYPILOT_NUM_NODES", count), _number("SKYPILOT_NODE_RANK", rank)
    return _setup("skypilot", hosts.split()[0], num_processes, process_id)
