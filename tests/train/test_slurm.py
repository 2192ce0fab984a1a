"""A real controller with two nodes on this machine: the limit and its signal, 75, requeue; a killed task; a cancel.

Needs SLURM (Debian's slurmctld, slurmd and slurm-client: tests/slurm_cluster.sh install), and about twelve minutes.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="SLURM is not installed: slurm_cluster.sh install"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Its environment; the nodes' names do not resolve, so the address is given."""
    directory = tmp_path_factory.mktemp("slurm")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",  # of the tests, which give each process several devices
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "SLURM_TEST_PORT": str(20000 + os.getpid() % 5000 * 3),
    }  # fmt: skip
    subprocess.run([CLUSTER, "start", directory], env=environment, check=True)
    yield environment
    subprocess.run([CLUSTER, "stop", directory], check=True)


@pytest.fixture(scope="module")
def folder():
    """Of a place that is shared by the rules of `submit`, as /tmp is not; with marks that a shell would read."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slurm's 100% ", dir=ROOT / "runs") as name:
        yield Path(name)


def submitted(cluster, folder, name, steps, *words):
    """Submit the tiny run on two nodes; its directory and the job's number."""
    overrides = [
        f"steps={steps}", f"output_dir={folder}", f"run_name={name}", f"data.cache_dir={folder / 'cache'}",
        "eval.every=null", "data.validation=[]", "checkpoint.every=20", "log.every=1", "optimizer.warmup_steps=2",
    ]  # fmt: skip
    command = [sys.executable, "launch.py", "submit", "slurm", "configs/pretrain/quickstart.yaml", "--nodes", "2",
               "--devices", "1", "--no-gpus", "--go", *words, *overrides]  # fmt: skip
    said = subprocess.run(command, cwd=ROOT, env=cluster, check=True, capture_output=True, text=True).stdout
    subprocess.run(["sbatch", "--test-only", folder / name / "launch" / "job.sbatch"], env=cluster, check=True)
    return folder / name, re.search(r"Submitted batch job (\d+)", said)[1]


def until(what, seconds):
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(1)


def status(run):
    try:
        return json.loads((run / "STATUS").read_text())
    except (OSError, ValueError):
        return {}


def said(run):
    return "".join(p.read_text() for p in (run / "launch").glob("slurm-*.log"))


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.parametrize("how", ["limit", "killed"])
def test_it_is_requeued_and_its_curve_is_that_of_one_start(cluster, folder, how):
    limit = ["--time", "6", "--warn-seconds", "60"] if how == "limit" else ["--time", "30"]
    run, job = submitted(cluster, folder, how, 10_000 if how == "limit" else 400, *limit)
    until(lambda: status(run).get("state") == "training" and status(run)["step"] > 25, 600)
    if how == "limit":
        until(lambda: status(run).get("state") == "preempted", 400)
        assert status(run)["exit_code"] == 75
        until(lambda: "again 75" in said(run), 60)
    else:
        step = f"{job}.0"
        subprocess.run(["scancel", "--signal=KILL", step], env=cluster, check=True)
        until(lambda: re.search(r"again (76|137|-9)", said(run)), 400)
    until(
        lambda: status(run).get("attempt") == 2 and status(run).get("state") == "training", 900
    )  # a requeue waits 121 s
    count = json.loads((run / "env.json").read_text())["flags"]["SLURM_RESTART_COUNT"]
    assert count == "1"
    subprocess.run(["scancel", job], env=cluster, check=True)
    found = losses(run)
    assert list(found) == list(range(1, len(found) + 1))


def test_a_cancelled_job_is_not_started_again(cluster, folder):
    run, job = submitted(cluster, folder, "cancelled", 10_000, "--time", "30")
    until(lambda: status(run).get("state") == "training", 600)
    subprocess.run(["scancel", job], env=cluster, check=True)
    until(lambda: not _queue(cluster, job), 120)
    time.sleep(5)
    assert not _queue(cluster, job) and status(run)["attempt"] == 1


def _queue(cluster, job):
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], env=cluster, capture_output=True, text=True)
    return done.stdout.split()


def test_a_mistake_is_final(cluster, folder):
    run, job = submitted(cluster, folder, "mistake", 100, "--time", "5", "data.tokenizer=/no/such.model")
    until(lambda: (run / "launch" / "final").exists(), 400)
    assert (run / "launch" / "final").read_text().startswith("2 ")
    until(lambda: not _queue(cluster, job), 60)
