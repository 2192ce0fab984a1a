"""Files for engines, checked by their own tools; the verdict on an attempt; the script and the supervisor, on fakes."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from mixtral_jax import launch
from mixtral_jax.train.config import load_config
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.launchers import sky
from mixtral_jax.train.launchers.job import (
    Job,
    Nodes,
    check_mounted,
    check_shared,
    directories,
    engine_name,
    places,
    points,
    yaml_text,
)
from mixtral_jax.train.launchers.kubernetes import gke_shape, hosts
from mixtral_jax.train.launchers.verdict import MOST, MOST_UNSEEN, Verdict, verdict
from mixtral_jax.train.plan import parse_topology
from mixtral_jax.train.run.processes import detect
from mixtral_jax.train.run_files import last_attempt

PRESETS = {"pretrain": "mixtral-8x7b-v5p-64", "sft": "mixtral-8x7b-v5p-64", "dpo": "mixtral-8x7b-v5p-64"}
MOUNTED = ("--volume", "runs:/runs", "--volume", "data:/data")
PATHS = ("data.tokenizer=/data/tokenizer.model", "data.cache_dir=/runs/cache", "output_dir=/runs/all")


def submit(*words):
    return launch.main(["submit", *map(str, words)])


def attempt(run, number, status=None, checkpoints=()):
    """What a start of a run leaves behind."""
    (run / "attempts" / str(number)).mkdir(parents=True, exist_ok=True)
    if status is not None:
        (run / "STATUS").write_text(json.dumps({"attempt": number, **status}))
    (run / "config.yaml").write_text("checkpoint: {directory: null}\n")
    for step in checkpoints:
        (run / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("code", list(ExitCode))
def test_every_code_has_one_meaning_and_one_consequence(tmp_path, code):
    again = code in (1, 74, 75, 76, 124, 130)
    assert verdict(tmp_path, int(code), 0) == Verdict(again, int(code), code.meaning)


def test_status_is_believed_before_the_launcher(tmp_path):
    attempt(tmp_path, 3, {"exit_code": 76, "reason": "a peer is gone"})
    assert verdict(tmp_path, 137, before=2) == Verdict(True, 76, "a peer is gone")
    attempt(tmp_path, 4, {"exit_code": 3, "reason": "not finite"})
    assert verdict(tmp_path, 137, before=3) == Verdict(False, 3, "not finite")


@pytest.mark.parametrize("status", [{"exit_code": 3, "attempt": 2}, {"exit_code": None}, {"exit_code": "3"}, {}, None])
def test_a_status_of_another_start_or_of_none_says_nothing(tmp_path, status):
    attempt(tmp_path, 2, status)
    assert verdict(tmp_path, -9, before=2) == Verdict(True, -9, "ended by signal 9")
    (tmp_path / "STATUS").write_text("{")
    assert verdict(tmp_path, 137, before=0).reason.startswith("ended by signal 9")


@pytest.fixture
def _empty_ones_are_whole(monkeypatch):
    monkeypatch.setattr("mixtral_jax.checkpoint.damage", lambda path: None)


@pytest.mark.usefixtures("_empty_ones_are_whole")
def test_three_times_without_a_new_checkpoint_and_no_more(tmp_path):
    attempt(tmp_path, 1, checkpoints=[10])
    for _ in range(MOST):
        assert verdict(tmp_path, 75, 0).again
    assert not verdict(tmp_path, 75, 0).again
    attempt(tmp_path, 2, checkpoints=[20])
    assert verdict(tmp_path, 137, 0).again
    assert verdict(tmp_path, 0, 0) == Verdict(False, 0, "done")


@pytest.mark.usefixtures("_empty_ones_are_whole")
def test_checkpoints_elsewhere_count(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"checkpoint: {{every: 5, directory: '{tmp_path}/steps'}}\n")
    for step in range(2 * MOST):
        (tmp_path / "steps" / str(step)).mkdir(parents=True)
        assert verdict(tmp_path / "run", 76, 0).again
    assert last_attempt(tmp_path / "run") == 0


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path):
    attempt(tmp_path, 1)
    for step in range(MOST):
        attempt(tmp_path, 1, checkpoints=[step])
        assert verdict(tmp_path, 75, 0).again
    assert not verdict(tmp_path, 75, 0).again


def test_where_no_bucket_answers_it_goes_on_a_while(tmp_path):
    (tmp_path / "config.yaml").write_text("checkpoint: {directory: 'no-such-scheme://bucket/steps'}\n")
    assert not verdict(tmp_path, 2, 0).again
    found = [verdict(tmp_path, 75, 0) for _ in range(MOST_UNSEEN + 1)]
    assert [one.again for one in found] == [True] * MOST_UNSEEN + [False]
    assert all("checkpoints cannot be listed (" in one.note for one in found)


@pytest.mark.usefixtures("_empty_ones_are_whole")
def test_while_no_checkpoints_can_be_listed_the_count_stands(tmp_path, monkeypatch):
    attempt(tmp_path, 1, checkpoints=[10])
    assert [verdict(tmp_path, 75, 0).again for _ in range(MOST)] == [True] * MOST
    with monkeypatch.context() as broken:
        broken.setattr("mixtral_jax.train.launchers.verdict.whole_steps", _refused)
        assert all(verdict(tmp_path, 75, 0).again for _ in range(MOST + 1))
    assert not verdict(tmp_path, 75, 0).again
    attempt(tmp_path, 2, checkpoints=[20])  # since when the others are forgotten
    assert verdict(tmp_path, 75, 0).again and '"unseen": 0' in (tmp_path / "launch" / "restarts.json").read_text()


def _refused(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_verdict_is_found_on_a_full_disk(tmp_path, monkeypatch, where):
    attempt(tmp_path, 1)
    (tmp_path / "launch").mkdir()
    counted = tmp_path / "launch" / "restarts.json"
    counted.write_text("{}\n")  # as submit leaves it
    monkeypatch.setattr(where, _refused)
    for times in range(1, MOST + 1):
        assert verdict(tmp_path, 74, 0).again
        assert json.loads(counted.read_text())["times"] == times  # the next start is another process
    assert not verdict(tmp_path, 74, 0).again


def test_where_nothing_can_be_counted_only_storage_is_final(tmp_path):
    attempt(tmp_path, 1)
    (tmp_path / "launch").touch()  # no directory
    assert verdict(tmp_path, 75, 0).again
    assert "cannot be counted" in str(verdict(tmp_path, 74, 0)) and not verdict(tmp_path, 74, 0).again


def test_points_of_a_sweep():
    assert points([]) == [()]
    assert points(["a.b=1e-4,3e-4"]) == [("a.b=1e-4",), ("a.b=3e-4",)]
    assert points(["a=1,2", "b=[1,2],[3]"]) == [
        ("a=1", "b=[1,2]"),
        ("a=1", "b=[3]"),
        ("a=2", "b=[1,2]"),
        ("a=2", "b=[3]"),
    ]
    assert points(["a={b: 1, c: [2]},{b: [1], c: 3}"]) == [("a={b: 1, c: [2]}",), ("a={b: [1], c: 3}",)]
    for bad in (["a"], ["a="], ["=1"], ["a=1,1"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="--sweep"):
            points(bad)


def test_names_that_engines_take():
    assert engine_name("Mixtral_8x7B.v1") == "mixtral-8x7b-v1"
    assert engine_name("2runs") == "r-2runs" and len(engine_name("a" * 90)) <= 40
    assert engine_name("a" * 50) != engine_name("a" * 51) and len(engine_name("2" * 39)) <= 40
    with pytest.raises(UserError, match="letters"):
        engine_name("!!")


def test_a_name_stays_one_where_yaml_is_1_1():
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    told = {"names": ["on", "Yes", "n", "1", "null", "a-b", "2026-11-30"]}
    assert yaml.load(yaml_text(told)) == told


PLACES = [  # what a run names, what is mounted (None: not known), and what is said of it
    ("output_dir=/runs/../gone", ["/runs"], "output_dir: /gone is on nothing"),
    ("output_dir=/runs/../gone/../runs", ["/runs"], None),
    (f"data.tokenizer=../{Path.cwd().name}/README.md", ["/runs", "/data"], "/README.md is not in the project"),
    ("data.tokenizer=./runs/t.model", ["/runs", "/data"], "data.tokenizer: runs/t.model is not in the project"),
    ("data.train.0.path=file:///tmp/x", ["/runs", "/data"], ": /tmp/x is on nothing"),
    ("data.train.0.path=~/x", ["/runs", "/data"], "/x is on nothing"),
    ("output_dir=/tmp", None, "output_dir: /tmp is inside of the container"),
    ("output_dir=/mixtral-jax/runs", None, "output_dir: /mixtral-jax/runs is inside of the container"),
    ("data.train.0.path=/tmp/x", None, ": /tmp/x is on nothing"),
    ("data.train.0.path=/mixtral-jax/data/samples/sft.jsonl", None, None),
]


@pytest.mark.parametrize(("word", "mounted", "sentence"), PLACES, ids=[word for word, *_ in PLACES])
def test_a_path_is_judged_by_where_it_leads(word, mounted, sentence):
    file = Path("configs/sft/tiny.yaml")
    config = load_config(file, [*PATHS, "output_dir=/runs", *_sources(file), word]).config
    if sentence is None:
        return check_mounted(config, mounted and [*mounted, "/data"], "do")
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_mounted(config, mounted and [*mounted, "/data"], "do")


def test_directories_of_a_source_are_those_that_it_names(tmp_path):
    file = Path("configs/sft/tiny.yaml")
    config = load_config(file, ["data.train.0.path=[file:///tmp/a/x.jsonl,~/corpus/a.jsonl]"]).config
    assert {"/tmp/a", os.path.expanduser("~/corpus")} <= set(directories(Job(config, Nodes(1, 1))))


# --- SLURM ---

RUNS = "a b's 100%"


@pytest.fixture
def _shared(monkeypatch):
    """pytest's own place may be one of this machine."""
    monkeypatch.setattr("mixtral_jax.train.launchers.job._OF_ONE_MACHINE", ("/shm",))


@pytest.fixture
def config(tmp_path, _shared):
    """A file whose run lies in a directory of its own."""
    return ["configs/sft/tiny.yaml", f"output_dir={tmp_path / RUNS}"]


def test_the_script_of_a_run(config, tmp_path, capsys):
    words = ["--nodes", "2", "--devices", "4", "--time", "01:00:00", "--partition", "gpu", "--sbatch=--exclusive"]
    assert submit("slurm", *config, *words) == 0
    said = capsys.readouterr().out
    script = tmp_path / RUNS / "sft-tiny" / "launch" / "job.sbatch"
    text = script.read_text()
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=4", "#SBATCH --signal=B:USR1@180", "#SBATCH --requeue",
            "#SBATCH --exclusive", "#SBATCH --partition=gpu"} <= set(text.splitlines())  # fmt: skip
    assert "mesh data 8" in said and "--go" in said and f"=singleton {shlex.quote(str(script))}" in said
    assert "MiB a device before activations" in said
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)
    subprocess.run(["bash", "-n", script], check=True)


def test_a_sweep_is_an_array_of_runs(config, tmp_path, capsys):
    assert submit("slurm", *config, "--sweep", "optimizer.learning_rate=1e-4,3e-4", "--sweep", "seed=0,1") == 0
    script = tmp_path / RUNS / "sft-tiny-learning_rate.sweep" / "launch" / "job.sbatch"
    text = script.read_text()
    assert "#SBATCH --array=0-3" in text and "singleton" not in capsys.readouterr().out
    runs = sorted(p.name for p in (tmp_path / RUNS).iterdir() if [*p.glob("launch/run-*.yaml")])
    assert runs == [f"sft-tiny-learning_rate={rate}-seed={seed}" for rate in ("1e-4", "3e-4") for seed in (0, 1)]
    assert all(run in text for run in runs)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)


def test_points_of_a_sweep_differ_in_what_was_swept(config, tmp_path, capsys):
    words = ["--sweep", "optimizer.learning_rate=1e-4,3e-4", f"checkpoint.directory={tmp_path}/steps"]
    assert submit("slurm", *config, *words) == 0
    runs = [tmp_path / RUNS / f"sft-tiny-learning_rate={rate}" for rate in ("1e-4", "3e-4")]
    for run in runs:  # as the run writes it
        (run / "config.yaml").write_text(next(run.glob("launch/run-*.yaml")).read_text())
        (run / "STATUS").write_text("{}")
    capsys.readouterr()
    assert launch.main(["runs", "diff", *map(str, runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {
        "optimizer.learning_rate": [1e-4, 3e-4],
        "checkpoint.directory": [f"{tmp_path}/steps/learning_rate={rate}" for rate in ("1e-4", "3e-4")],
    }


def test_in_a_container_run_and_verdict_use_its_python_on_the_same_paths(config, tmp_path):
    config += [f"data.staging_dir={tmp_path}/copies"]
    assert submit("slurm", *config, "--container", "me/mixtral:1") == 0
    script = tmp_path / RUNS / "sft-tiny" / "launch" / "job.sbatch"
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)
    text = script.read_text()
    told = "--container-image=me/mixtral:1 "
    assert sys.executable not in text and text.count(told) == 2
    assert f"srun --nodes=1 --ntasks=1 {told}" in text and f"srun --kill-on-bad-exit=0 {told}" in text
    mounts = next(w for w in shlex.split(text[text.index(told) :]) if w.startswith("--container-mounts="))
    seen = mounts.partition("=")[2].split(",")
    mounted = (os.getcwd(), tmp_path / "copies", tmp_path / RUNS, Path("data/samples").absolute())
    assert {f"{place}:{place}" for place in mounted} <= set(seen)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--time", "soon"], "--time soon: minutes"),
        (["--time", "3"], "--time 3 is not longer than --warn-seconds 180"),
        (["--time", "0:1:0", "--warn-seconds", "60"], "not longer than --warn-seconds 60"),
        (["--warn-seconds", "0"], "--warn-seconds 0"),
        (["--partition", "a\nb"], "one line"),
        (["--sweep", "seed"], "--sweep seed: KEY=VALUE"),
        (["--nodes", "3", "--devices", "1", "mesh.data=2"], "3 nodes with 1 device"),
        (["--nodes", "0"], "nodes is 0"),
        (["--devices", "3", "--processes", "2"], "cannot be shared evenly"),
        (["--devices", "4", "--processes", "2"], "--processes 2: 1 is expected, or one a device: 4"),
        (["--chain", "2", "--sweep", "seed=0,1"], "a chain is of one run"),
        (["--sbatch", "exclusive"], "begins with -"),
        (["output_dir=/shm/runs"], "output_dir: /shm/runs is a place of this machine"),
        (["data.train.0.path=file:///shm"], ": /shm is a place of this machine"),
        (["data.no_such=1"], "data.no_such"),
        (["resume=never"], "resume is never, and a job that was stopped starts again: set resume=auto"),
        (["resume=5"], "resume is 5, and"),
    ],
)
@pytest.mark.usefixtures("_shared")
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, capsys, words, sentence):
    assert submit("slurm", "configs/sft/tiny.yaml", f"output_dir={tmp_path / 'runs'}", *words) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


FAKES = {
    "srun": """#!/bin/bash
trap 'echo told "${SRUN_CPUS_PER_TASK-}"; sleep 0.2; exit $(cat "$FAKE/later")' USR1
echo started "$@"
[ -e "$FAKE/waits" ] && while :; do sleep 0.05; done
exit "$(cat "$FAKE/code")"
""",
    "scontrol": '#!/bin/bash\necho scontrol "$@" >>"$FAKE/requeued"\n',
    "squeue": '#!/bin/bash\n[ "$3" = "$(cat "$FAKE/cancelled" 2>/dev/null)" ] && echo COMPLETING || echo RUNNING\n',
}


@pytest.fixture
def cluster(tmp_path, config, monkeypatch):
    """Runs the script of a run with SLURM's programs as we make them; returns its output and code, and the run."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, text in FAKES.items():
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert submit("slurm", *config, "--devices", "1") == 0
    run = tmp_path / RUNS / "sft-tiny"

    def go(code=0, told=None, by=signal.SIGUSR1):
        (fake / "code").write_text(str(code))
        process = subprocess.Popen([run / "launch" / "job.sbatch"], stdout=subprocess.PIPE, text=True)
        if told is not None:
            (fake / "later").write_text(str(told))
            (fake / "waits").write_text("")
            for line in process.stdout:
                if line.startswith("started"):
                    break
            time.sleep(0.3)
            process.send_signal(by)
        out, _ = process.communicate(timeout=120)
        return out, process.returncode, (fake / "requeued").exists()

    return go, run


def test_a_signal_ahead_of_the_limit_is_handed_on_and_the_job_requeued(cluster):
    go, _ = cluster
    out, code, requeued = go(told=75)
    assert "told 12\n" in out and "again 75" in out and code == 75 and requeued


@pytest.mark.parametrize(("by", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_cancelled_job_is_saved_and_not_requeued_but_one_behind_its_limit_is(cluster, tmp_path, by, requeued):
    go, _ = cluster
    (tmp_path / "fake" / "cancelled").write_text("7")
    out, code, again = go(told=75, by=by)
    assert code == 75 and again == requeued and ("does not start it again" in out) != requeued


def test_a_task_of_an_array_speaks_of_itself(cluster, tmp_path, monkeypatch):
    go, _ = cluster
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    (tmp_path / "fake" / "cancelled").write_text("7_0")
    assert not go(told=75, by=signal.SIGTERM)[2]
    (tmp_path / "fake" / "cancelled").unlink()
    assert go(told=75, by=signal.SIGTERM)[2]
    assert (tmp_path / "fake" / "requeued").read_text() == "scontrol requeue 7_0\n"


def test_a_signal_before_anything_has_begun_starts_nothing(cluster):
    go, run = cluster
    script = run / "launch" / "job.sbatch"
    script.write_text(script.read_text().replace("before=$(ask", "kill -USR1 $$\nbefore=$(ask"))
    out, code, requeued = go()
    assert "started" not in out and "again 75" in out and code == 75 and requeued


def test_without_a_verdict_a_job_ends_and_a_chain_goes_on(cluster):
    go, run = cluster
    script = run / "launch" / "job.sbatch"
    script.write_text(script.read_text().replace('said=$(ask "$code"', "said=$(false"))
    _, code, requeued = go(code=75)
    assert code != 0 and not requeued and not (run / "launch" / "final").exists()


def test_a_mistake_is_not_requeued_and_ends_a_chain(cluster):
    go, run = cluster
    out, code, requeued = go(code=2)
    assert "final 2 usage" in out and code == 2 and not requeued
    out, code, _ = go()
    assert "nothing is started: 2 usage" in out and code == 2  # what depends on this job starts nothing either
    assert (run / "launch" / "final").exists()


def test_one_that_is_refused_where_another_has_the_run_leaves_it_its_requeue(cluster):
    go, run = cluster
    script = run / "launch" / "job.sbatch"
    script.write_text(script.read_text().replace("ask() {", "ask() { echo final 2 refused; return; "))
    (run / "LEASE").touch()
    assert go(code=2)[1:] == (2, False) and not (run / "launch" / "final").exists()
    (run / "LEASE").unlink()
    assert go(code=2)[1:] == (2, False) and (run / "launch" / "final").read_text() == "2 refused\n"


def test_what_has_ended_for_good_stands_until_it_is_handed_over_anew(cluster, config, tmp_path, capsys):
    go, run = cluster
    go(code=2)
    (run / "launch" / "restarts.json").write_text('{"times": 3}')
    capsys.readouterr()
    assert submit("slurm", *config, "--devices", "1") == 0
    assert f"stands  {run}/launch/final" in capsys.readouterr().out and "nothing is started" in go()[0]
    assert "times" in (run / "launch" / "restarts.json").read_text()
    (made,) = (run / "launch").glob("run-*.yaml")
    (tmp_path / "fake" / "sbatch").symlink_to("/bin/true")
    assert submit("slurm", *config, "--devices", "1", "--go") == 0
    assert not (run / "launch" / "final").exists() and (run / "launch" / "restarts.json").read_text() == "{}\n"
    before = made.read_text()
    assert submit("slurm", *config, "--devices", "1", "seed=1") == 0  # what a job reads is not changed under it
    assert made.read_text() == before and len([*(run / "launch").glob("run-*.yaml")]) == 2


# --- Kubernetes ---

_RULE = {
    "type": "object", "additionalProperties": False, "required": ["name", "action"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
        "targetReplicatedJobs": {"type": "array"},
        "onJobFailureReasons": {"type": "array", "items": {"enum": ["BackoffLimitExceeded", "PodFailurePolicy"]}},
        "onJobFailureMessagePatterns": {"type": "array", "items": {"type": "string"}},
    },
}  # fmt: skip
JOBSET = {  # of jobset.x-k8s.io/v1alpha2: the fields that we use, as its reference has them; others are refused
    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"}, "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": {"type": "object", "additionalProperties": False, "required": ["replicatedJobs"], "properties": {
            "network": {"type": "object", "additionalProperties": False, "properties": {
                "enableDNSHostnames": {"type": "boolean"}, "subdomain": {"type": "string"},
                "publishNotReadyAddresses": {"type": "boolean"}}},
            "failurePolicy": {"type": "object", "additionalProperties": False, "properties": {
                "maxRestarts": {"type": "integer", "minimum": 0},
                "rules": {"type": "array", "maxItems": 20, "items": _RULE}}},
            "replicatedJobs": {"type": "array", "minItems": 1, "items": {
                "type": "object", "additionalProperties": False, "required": ["name", "template"], "properties": {
                    "name": {"type": "string"}, "replicas": {"type": "integer", "minimum": 1},
                    "template": {"type": "object"}}}},
        }},
    },
}  # fmt: skip


def objects(path):
    return list(YAML(typ="safe").load_all(path))


def check(found):
    """Each object by its own definition; the jobs of a JobSet as Jobs."""
    for one in found:
        if one["kind"] == "JobSet":
            jsonschema.validate(one, JOBSET)
            for job in one["spec"]["replicatedJobs"]:
                whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": one["metadata"], **job["template"]}
                kubernetes_validate.validate(whole, "1.34", strict=True)
        else:
            kubernetes_validate.validate(one, "1.34", strict=True)


@pytest.mark.parametrize("stage", PRESETS)
@pytest.mark.parametrize(
    "words", [["--topology", "v5p-64"], ["--nodes", "4"], ["--nodes", "4", "--plain-job"]], ids=str
)
def test_objects_are_valid(tmp_path, monkeypatch, stage, words):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs" / stage / f"{PRESETS[stage]}.yaml"
    changed = [*PATHS, *_sources(file)]
    assert (
        submit(
            "k8s", file, *changed, *words, "--image", "me/mixtral:1", "--volume", "runs:/runs", "--volume", "data:/data"
        )
        == 0
    )
    (path,) = tmp_path.glob("runs/*/launch/job.yaml")
    found = objects(path)
    check(found)
    kinds = [one["kind"] for one in found]
    assert kinds == (["ConfigMap", "Service", "Job"] if "--plain-job" in words else ["ConfigMap", "JobSet"])
    assert found[0]["data"]["run.yaml"].startswith("stage:")


def _sources(file):
    told = YAML(typ="safe").load(file)
    for kind in ("train", "validation"):
        for number, _ in enumerate(told["data"].get(kind) or []):
            yield f"data.{kind}.{number}.path=/data/{number}.jsonl"
    if told.get("init_from"):
        yield "init_from=/data/base"


def test_an_adapter_to_begin_with_is_a_place_and_copies_are_of_each_machine():
    file = Path("configs/sft/tiny.yaml")
    lora = "lora={rank: 4, alpha: 8, rslora: false, targets: [all-linear], modules_to_save: [], init_from: /adapter}"
    config = load_config(file, [*PATHS, *_sources(file), lora, "data.staging_dir=/tmp/copies"]).config
    found = dict(places(config))
    several = load_config(file, [*PATHS, *_sources(file), "data.train.0.path=[/data/a,/other/b]"]).config
    assert {"/data/a", "/other/b"} <= {place for _, place in places(several)}
    assert found["lora.init_from"] == "/adapter" and found["data.staging_dir"] == "/tmp/copies"
    check_shared(Job(config, Nodes(2, 1)))
    with pytest.raises(UserError, match=r"lora\.init_from: /adapter is on nothing that is mounted"):
        check_mounted(config, ["/runs", "/data"], "do")
    check_mounted(config, ["/runs", "/data", "/adapter"], "do")


GKE_TELLS = {"v5e-8": {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}}  # of a slice of one host


@pytest.mark.parametrize(
    ("topology", "count", "each"), [("h100-64", 8, {"nvidia.com/gpu": 8}), ("v5e-8", 1, {"google.com/tpu": 8})]
)
def test_a_machine_by_its_name(tmp_path, monkeypatch, topology, count, each):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/sft/tiny.yaml"
    words = [*PATHS, *_sources(file), "--topology", topology, "global_batch_size=64", "micro_batch_size=64"]
    assert submit("k8s", file, *words, "--image", "i", "--volume", "runs:/runs", "--volume", "d:/data") == 0
    work = objects(next(tmp_path.glob("runs/*/launch/job.yaml")))[1]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert work["completions"] == count
    container = work["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == each
    told = {one["name"]: one["value"] for one in container["env"]} if "env" in container else {}
    told |= {"JOB_COMPLETION_INDEX": "0"} | GKE_TELLS.get(topology, {})
    found = detect(told, tpu_chips=each.get("google.com/tpu", 0))
    assert found is None if count == 1 else found is not None and found.num_processes == count


def test_several_slices_find_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/pretrain/mixtral-8x7b-v5p-64.yaml"
    words = [*PATHS, *_sources(file), "--topology", "2xv5p-64", "mesh.dcn_data=2", "global_batch_size=1024"]
    assert (
        submit("k8s", file, *words, "--image", "i", "--volume", "runs:/runs", "--volume", "d:/data", "--queue", "q")
        == 0
    )
    found = objects(next(tmp_path.glob("runs/*/launch/job.yaml")))
    check(found)
    job = found[1]["spec"]["replicatedJobs"][0]
    names = {e["name"] for e in job["template"]["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 8
    assert names == {"MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"}
    assert found[1]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}


def test_rules_of_a_jobset_count_those_of_its_pods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/pretrain/mixtral-8x7b-v5p-64.yaml"
    words = [*PATHS, *_sources(file), "--nodes", "4", "--image", "i", "--volume", "runs:/runs", "--volume", "d:/data"]
    assert submit("k8s", file, *words) == 0
    spec = objects(next(tmp_path.glob("runs/*/launch/job.yaml")))[1]["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    by_name = {rule["name"]: rule for rule in spec["failurePolicy"]["rules"]}
    final = int(by_name["final"]["onJobFailureMessagePatterns"][0].rpartition("index ")[2].removesuffix(".*"))
    moved = by_name["disrupted"]["onJobFailureMessagePatterns"][0].rpartition("index ")[2].removesuffix(".*")
    assert pod[final]["onExitCodes"]["values"] == [2, 3, 4] and by_name["final"]["action"] == "FailJobSet"
    assert "onPodConditions" in pod[1]
    assert moved == "[12]" and pod[2]["onExitCodes"]["values"] == [75]
    assert pod[3]["onExitCodes"]["values"] == [74, 76, 124]  # no rule of the set: restarts, counted


def test_a_job_alone_counts_all_but_stops_and_disruptions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/pretrain/mixtral-8x7b-v5p-64.yaml"
    words = [*PATHS, *_sources(file), "--nodes", "4", "--image", "i", *MOUNTED, "--plain-job", "--max-restarts", "5"]
    assert submit("k8s", file, *words) == 0
    spec = objects(next(tmp_path.glob("runs/*/launch/job.yaml")))[2]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    ignored = [rule for rule in rules if rule["action"] == "Ignore"]
    assert spec["backoffLimit"] == 20 and len(ignored) == 2 and "onPodConditions" in ignored[0]
    assert ignored[1]["onExitCodes"]["values"] == [75]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--image"),
        (["--image", "i"], "on nothing that is mounted: put it on a volume with --volume CLAIM:/PATH"),
        (["--image", "", *MOUNTED], "a container image is expected"),
        (
            ["--image", "i", *MOUNTED, "data.cache_dir=cache"],
            "data.cache_dir: cache is inside of the container",
        ),
        (["--image", "i", *MOUNTED, "init_from=runs/x"], "init_from: runs/x is not in the project"),
        (["--image", "i", "--volume", "r:/runs", "--volume", "s:/runs/"], "at the same path"),
        (["--image", "i", *MOUNTED, "--namespace", "A_b"], "--namespace 'A_b'"),
        (["--image", "i", *MOUNTED, "--queue", "a b"], "--queue 'a b'"),
        (["--image", "i", *MOUNTED, "--grace-seconds", "-1"], "--grace-seconds is -1"),
        (
            ["--image", "i", *MOUNTED, "--plain-job", "--topology", "2xv5p-64", "--nodes", "16", "mesh.dcn_data=2"],
            "has no slices",
        ),
        (["--image", "i", "--volume", "runs"], "CLAIM:/PATH"),
        (["--image", "i", "--volume", "My_Claim:/runs"], "--volume My_Claim:/runs: CLAIM:/PATH"),
        (["--image", "i", "--volume", "r:/a:b"], "--volume r:/a:b: CLAIM:/PATH"),
        (["--image", "i", "--volume", "r:/dev/shm/"], "/dev/shm holds what a container needs"),
        (["--image", "i", "--volume", "r:/"], "/ holds what a container needs"),
        (["--image", "i", *MOUNTED, "--topology", "v5p-64"], "--nodes 4: --topology v5p-64 has 8"),
        (["--image", "i", *MOUNTED, "--topology", "v5p-64", "--nodes", "8", "--devices", "2"], "v5p-64 has 4"),
        (
            ["--image", "i", *MOUNTED, "data.staging_dir=/nvme/copies"],
            "data.staging_dir: /nvme/copies is on nothing that is mounted",
        ),
        (["--image", "i", *MOUNTED, "output_dir=runs"], "goes with it"),
        (["--image", "i", *MOUNTED, "--topology", "v9-1"], "unknown topology"),
        (["--image", "i", *MOUNTED, "--topology", "v5p-128", "--nodes", "16", "mesh.fsdp=4"], "devices"),
    ],
)
def test_a_cluster_that_could_not_run_it(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/pretrain/mixtral-8x7b-v5p-64.yaml"
    try:
        code = submit("k8s", file, "--nodes", "4", *PATHS, *_sources(file), *words)
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2 and sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shapes_of_slices_as_gke_has_them():
    assert gke_shape("v5p:4x4x2") == "2x4x4" and gke_shape("v5p:2x2x1") == "2x2x1" and gke_shape("v5e:16x16") == "16x16"
    assert hosts(parse_topology("v5p-64")) == (8, 4) and hosts(parse_topology("v5e-8")) == (1, 8)
    assert hosts(parse_topology("v6e-256")) == (64, 4) and hosts(parse_topology("v5p-8")) == (1, 4)


# --- SkyPilot, xpk ---


def test_a_managed_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/pretrain/mixtral-8x7b-v5p-64.yaml"
    words = [*PATHS, *_sources(file), "--nodes", "4", "--accelerators", "H100:8", "--mount", "/runs=s3://mine"]
    assert submit("sky", file, *words) == 2  # data on no mount
    words += ["--mount", "/data=s3://data"]
    assert submit("sky", file, *words) == 2  # nothing here that could be installed
    (tmp_path / "pyproject.toml").touch()
    assert submit("sky", file, *words) == 0
    task = YAML(typ="safe").load(next(tmp_path.glob("runs/*/launch/task.yaml")))
    assert task["resources"]["job_recovery"] == {
        "max_restarts_on_errors": 0,  # which would cover 2, 3 and 4
        "recover_on_exit_codes": [74, 75, 76, 124],
    }
    assert task["resources"]["use_spot"] is True
    assert task["num_nodes"] == 4 and task["run"].endswith("pretrain /etc/mixtral-jax/run.yaml")
    assert Path(task["file_mounts"]["/etc/mixtral-jax/run.yaml"]).exists()
    assert submit("sky", file, *words, "--image", "i", "--on-demand") == 0
    task = YAML(typ="safe").load(next(tmp_path.glob("runs/*/launch/task.yaml")))
    assert task["resources"]["use_spot"] is False and task["run"].startswith("cd /mixtral-jax && ")
    assert "\nWORKDIR /mixtral-jax\n" in (Path(__file__).parents[2] / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("accelerators", "nodes", "found"),
    [("H100:8", 4, Nodes(4, 8)), ("A100-80GB", 1, Nodes(1, 1)), ("tpu-v6e-16", 1, Nodes(4, 4)),
     ("tpu-v5p-64", 1, Nodes(8, 4)), ("tpu-v5litepod-8:1", 1, Nodes(1, 8))],
)  # fmt: skip
def test_what_skypilot_calls_a_machine(accelerators, nodes, found):
    assert sky.nodes(accelerators, nodes) == found


@pytest.mark.parametrize(("accelerators", "nodes"), [("tpu-v6e-16", 2), ("tpu-v9-8", 1), ("H100:x", 1), ("H100:0", 1)])
def test_what_skypilot_has_no_name_for(accelerators, nodes):
    with pytest.raises(UserError):
        sky.nodes(accelerators, nodes)


XPK = {  # of `xpk workload create --help`
    "cluster", "workload", "docker-image", "tpu-type", "num-slices", "restart-on-exit-codes", "max-restarts", "project",
    "zone", "command",
}  # fmt: skip


def test_an_xpk_workload(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/pretrain/mixtral-8x7b-v5p-64.yaml"
    words = ["--topology", "v5p-64", "--cluster", "c", "--image", "i", "--zone", "z"]
    told_by_shape = ["mesh.dcn_data=2", "global_batch_size=1024", "--topology", "2xv5p:4x4x2", *words[2:]]
    assert submit("xpk", file, *words) == 2  # its runs would be in the container
    assert submit("xpk", file, *PATHS, *_sources(file), *words) == 0
    script = next(tmp_path.glob("runs/*/launch/xpk.sh"))
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)
    words = script.read_text().splitlines()[1]
    (tmp_path / "xpk").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (tmp_path / "xpk").chmod(0o755)
    told = subprocess.run(
        ["sh", "-c", words], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True, check=True
    ).stdout
    options = dict(line[2:].split("=", 1) for line in told.splitlines() if line.startswith("--"))
    assert (
        set(options) <= XPK and options["restart-on-exit-codes"] == "74,75,76,124" and options["tpu-type"] == "v5p-64"
    )
    assert submit("xpk", file, *PATHS, *_sources(file), *told_by_shape) == 2
    assert "xpk: --topology 2xv5p:4x4x2: name the slice by its size" in capsys.readouterr().err
    decoding = options["command"].partition(" > ")[0]
    assert subprocess.run(["sh", "-c", decoding], capture_output=True, text=True, check=True).stdout.startswith(
        "stage:"
    )


# --- one example of each: GOLDEN=write makes the files anew ---

LAUNCHED = Path(__file__).parent / "launched"
HERE = ["output_dir=runs", "data.cache_dir=cache"]
BUCKETS = ["--mount", "/runs=s3://r", "--mount", "/data=s3://d"]
EXAMPLES = {
    "slurm.sbatch": ["slurm", "pretrain", "--nodes", "4", "--time", "24:00:00", *HERE],
    "sweep.sbatch": ["slurm", "sft", "--nodes", "4", "--account", "a", *HERE,
                     "--sweep", "optimizer.learning_rate=1e-5,3e-5"],
    "chain.sbatch": ["slurm", "dpo", "--nodes", "4", "--chain", "3", "--container", "me/mixtral:cuda", *HERE],
    "jobset.yaml": ["k8s", "pretrain", "--topology", "2xv5p-64", "mesh.dcn_data=2", "global_batch_size=1024",
                    "--image", "i", *MOUNTED],
    "job.yaml": ["k8s", "pretrain", "--nodes", "4", "--plain-job", "--image", "i", *MOUNTED],
    "sky.yaml": ["sky", "pretrain", "--accelerators", "tpu-v5p-64", "--image", "i", *BUCKETS],
    "sky-dpo.yaml": ["sky", "dpo", "--accelerators", "H100:8", "--nodes", "4", "--infra", "aws", *BUCKETS],
    "xpk.sh": ["xpk", "pretrain", "--topology", "v5p-64", "--cluster", "c", "--image", "i"],
    "xpk-sft.sh": ["xpk", "sft", "--topology", "v5p-64", "--cluster", "c", "--image", "i", "--zone", "z"],
}  # fmt: skip


@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    # which grows with every setting
    monkeypatch.setattr("mixtral_jax.train.launchers.job.resolved_yaml", lambda config: f"stage: {config.stage}\n...\n")
    (tmp_path / "pyproject.toml").touch()
    engine, stage, *words = EXAMPLES[name]
    file = Path(__file__).parents[2] / "configs" / stage / "mixtral-8x7b-v5p-64.yaml"
    assert submit(engine, file, *PATHS, *_sources(file), *words) == 0
    made = next(p for p in tmp_path.glob("runs/*/launch/*") if not re.match("run-|restarts", p.name)).read_text()
    made = made.replace(str(tmp_path), "/here").replace(sys.executable, "python")
    if os.environ.get("GOLDEN") == "write":
        (LAUNCHED / name).write_text(made)
    assert made == (LAUNCHED / name).read_text()
    if engine == "k8s":
        check(objects(LAUNCHED / name))
    for script in _scripts(LAUNCHED / name):
        checked = [Path(sys.executable).with_name("shellcheck"), "--shell", "bash", "-"]
        subprocess.run(checked, input=script, text=True, check=True)


def _scripts(path):
    """What a shell runs of it."""
    if path.suffix != ".yaml":
        return [path.read_text()]
    return [one[key] for one in objects(path) for key in ("setup", "run") if key in one]


SKY_CHECK = """
import sys, sky
for name in sys.argv[1:]:
    task = sky.Task.from_yaml(name)
    print(task.name, task.num_nodes, [one.job_recovery for one in task.resources])
"""


@pytest.mark.slow
@pytest.mark.skipif("SKY_PYTHON" not in os.environ, reason="SKY_PYTHON names no Python with skypilot 0.14")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("sky")])
def test_skypilot_takes_the_task(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    subprocess.run([os.environ["SKY_PYTHON"], "-c", SKY_CHECK, LAUNCHED / name], cwd=tmp_path, check=True)


# --- this machine ---


def test_go_without_the_engine_is_refused(config, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert submit("slurm", *config, "--devices", "1", "--go") == 2
    assert "sbatch is not installed here" in capsys.readouterr().err
