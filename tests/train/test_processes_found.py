"""Every scheduler's environment, whole and half; then two real processes that find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import processes as distributed
from mixtral_jax.train.run.processes import ProcessSetup, count_tpu_chips, detect, first_host
from tests.processes import without_gloo

JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4099", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "JAX_COORDINATOR_ADDRESS": "job-0.svc", "JAX_NUM_PROCESSES": "4"}
JOBSET = {**KUBERNETES, "JAX_NUM_PROCESSES": "8", "JOB_INDEX": "1", "PROCESSES_IN_JOB": "4"}
SKYPILOT = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n"}
LONE = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a"}


@pytest.mark.parametrize(
    ("env", "setup"),
    [
        ({}, None),
        (JAX, ProcessSetup("environment", "10.0.0.1:1234", 4, 3)),
        (
            JAX | {"JAX_COORDINATOR_ADDRESS": "h", "JAX_COORDINATOR_PORT": "99"},
            ProcessSetup("environment", "h:99", 4, 3),
        ),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "h"}, ProcessSetup("environment", "h:8476", 4, 3)),
        (JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, ProcessSetup("slurm", "gpu007:61443", 8, 5, (1,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, ProcessSetup("slurm", "gpu007:61443", 8, 5)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, ProcessSetup("slurm", "gpu007:61443", 8, 5)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, None),
        (KUBERNETES, ProcessSetup("kubernetes", "job-0.svc:8476", 4, 2)),
        (JOBSET, ProcessSetup("kubernetes", "job-0.svc:8476", 8, 6)),
        ({"JOB_COMPLETION_INDEX": "0", "JAX_NUM_PROCESSES": "1"}, None),
        (SKYPILOT, ProcessSetup("skypilot", "10.0.0.7:8476", 2, 1)),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, None),
        (GKE, ProcessSetup("tpu")),
        (GKE | SLICES, ProcessSetup("tpu")),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"} | SLICES, ProcessSetup("tpu")),
        (GKE | {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}, ProcessSetup("tpu")),
        (GKE | {"JAX_PLATFORMS": "cpu"}, None),
        (LONE, None),
        (LONE | {"JOB_COMPLETION_INDEX": "0"}, None),
        (LONE | {"JOB_COMPLETION_INDEX": "0"} | SLICES, ProcessSetup("tpu")),
        (LONE | JOBSET, ProcessSetup("kubernetes", "job-0.svc:8476", 8, 6)),
        (GKE | {"JOB_COMPLETION_INDEX": "1"}, ProcessSetup("tpu")),
        (SLURM | JAX, ProcessSetup("environment", "10.0.0.1:1234", 4, 3)),
    ],
)
def test_a_whole_environment(env: dict[str, str], setup: ProcessSetup | None) -> None:
    assert detect(env) == setup


@pytest.mark.parametrize(
    ("env", "missing"),
    [(JAX, key) for key in JAX]
    + [(SLURM, key) for key in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")]
    + [(KUBERNETES, key) for key in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")]
    + [(JOBSET, key) for key in ("JOB_INDEX", "PROCESSES_IN_JOB")]
    + [(LONE | KUBERNETES, key) for key in KUBERNETES if key.startswith("JAX")]
    + [(SKYPILOT, key) for key in SKYPILOT]
    + [(GKE, key) for key in GKE]
    + [(GKE | SLICES, key) for key in SLICES]
    + [(GKE | {"TPU_WORKER_HOSTNAMES": "a"} | SLICES, key) for key in SLICES],
)
def test_half_an_environment_names_what_is_missing(env: dict[str, str], missing: str) -> None:
    half = {key: value for key, value in env.items() if key != missing}
    with pytest.raises(UserError, match=rf"are? set but {missing} is missing|is set but {missing} is missing"):
        detect(half)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (JAX | {"JAX_PROCESS_ID": "4"}, "process id 4 is not below the number of processes, 4"),
        (JAX | {"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES must be a whole number, not 'many'"),
        (JAX | {"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is missing"),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "1"}, "SLURM_NTASKS are missing: start the processes with srun"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "start the processes with srun, or say --num-processes 1"),
        (JAX | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a whole number"),
    ],
)
def test_what_makes_no_sense(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect(env)


def test_explicit_settings_come_first() -> None:
    found = detect(SLURM, coordinator="h:1", num_processes=2, process_id=0)
    assert found == ProcessSetup("explicit settings", "h:1", 2, 0)
    assert detect(SLURM, num_processes=1) is None
    with pytest.raises(UserError, match="--coordinator and --process-id are missing"):
        detect({}, num_processes=2)


def test_tpu_chips_ask_the_metadata_server_unless_told_otherwise() -> None:
    assert detect({}, tpu_chips=4) == ProcessSetup("tpu")
    assert detect({"JAX_PLATFORMS": "cpu"}, tpu_chips=4) is None
    assert detect({"JAX_PLATFORMS": "tpu,cpu"}, tpu_chips=4) == ProcessSetup("tpu")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("node-1,b", "node-1"), ("n[001-003],m", "n001"), ("n[7,9-11]", "n7"), ("n[1-2]-ib", "n1-ib")],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_chips_are_counted_by_their_pci_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, (vendor, device) in enumerate([("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063")]):
        directory = tmp_path / "bus/pci/devices" / str(i)
        directory.mkdir(parents=True)
        (directory / "vendor").write_text(vendor + "\n")
        (directory / "device").write_text(device + "\n")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    assert count_tpu_chips(tmp_path) == 1
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert count_tpu_chips(tmp_path) == 0


def test_two_processes_find_each_other() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = (
        "from mixtral_jax.train.run.processes import initialize\n"
        "initialize()\n"
        "import jax\n"
        "from jax.experimental import multihost_utils\n"
        "print(jax.process_count(), jax.device_count(), multihost_utils.process_allgather(jax.process_index()).sum())\n"
    )
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        lines = [line for line in without_gloo(out).splitlines() if line]
        assert lines == ["2 4 1"]


def test_gloo_may_write_a_line_inside_another() -> None:
    rest = " is connected to 3 peer ranks. Expected number of connected peer ranks is : 3\n"
    line = f"[Gloo] Rank 0{rest}"
    for noise in (line, f"[Gloo] Rank 0[Gloo] Rank 1{rest}{rest}", f"[Gloo] Rank [Gloo] Rank 01{rest}3\n\n"):
        assert without_gloo(noise + "2 4 1\n").split("\n")[-1] == "2 4 1"
        assert not without_gloo(noise).strip()
