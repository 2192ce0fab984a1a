"""Real processes on this machine, with gloo between them: what they compute, read, write, and how they end.

`alone` is one process with four devices; the others are as many devices in two and in four processes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mixtral_jax.parallel.mesh import make_mesh
from mixtral_jax.train import feed
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.commands import evaluate
from mixtral_jax.train.config.load import load_config
from tests.processes import record_rows, without_gloo
from tests.tiny import metrics_of, write_run_file
from tests.tuning import write_tuning_file

# Compiling would take most of the time; and a busy machine may hold one process up for long.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_collective_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=300"
)
MESH = "mesh={data: 1, fsdp: 2, expert: 2}"
CHANGES = {
    "global_batch_size": 8, "micro_batch_size": 4, "optimizer": {"schedule": "constant"},
    "log": {"every": 1}, "eval": {"every": 4}, "checkpoint": {"every": 4, "keep_last": 9},
}  # fmt: skip


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_processes(count, devices, file, name, *overrides, event="none", of_each=lambda i: []):
    """(exit codes, outputs, seconds from the first end to the last) of `count` processes of one run.

    Args:
        of_each: the overrides that process i alone has.
    """
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}",
        "JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count),
    }  # fmt: skip
    logs = [file.parent / f"{name}.{i}.out" for i in range(count)]
    command = [sys.executable, "-m", "tests.processes", str(records(file, name)), event, str(file), f"run_name={name}"]
    processes = []
    for i, log in enumerate(logs):
        with log.open("w") as out:
            own = env | {"JAX_PROCESS_ID": str(i)}
            words = [*command, *overrides, *of_each(i)]
            processes.append(subprocess.Popen(words, env=own, stdout=out, stderr=subprocess.STDOUT))
    ends = [0.0] * count
    deadline = time.monotonic() + 400
    while not all(ends) and time.monotonic() < deadline:
        time.sleep(0.05)
        ends = [
            end or (process.poll() is not None) * time.monotonic() for end, process in zip(ends, processes, strict=True)
        ]
    for process in processes:
        process.kill()
        process.wait()
    outputs = [log.read_text() for log in logs]
    assert all(ends), "\n".join(outputs)
    return [process.returncode for process in processes], outputs, max(ends) - min(ends)


def records(file, name):
    return file.parent / "rows" / name


def run_alone(file, name, devices, *overrides):
    """In this process, on some of its devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        patch.setattr(feed.Feed, "__init__", feed.Feed.__init__)  # put back what the next line changes
        record_rows(records(file, name))
        config, provenance = load_config(file, [f"run_name={name}", *overrides])
        assert loop.run(config, provenance) == 0


def place(file, name):
    return file.parent / "runs" / name


def begin_from(file, source, step, name):
    """A run directory that holds checkpoint `step` of another run, and nothing else."""
    shutil.copytree(place(file, source) / f"checkpoints/{step}", place(file, name) / f"checkpoints/{step}")


def series(file, name, key):
    return {line["step"]: line[key] for line in metrics_of(place(file, name)) if key in line}


def status(file, name):
    return json.loads((place(file, name) / "STATUS").read_text())


def assert_same_numbers(file, name, steps):
    """Loss, gradient norm and evaluation of these steps as in the run of one process.

    An evaluation that a signal has broken off is owed to the next start.
    """
    ended = status(file, name)
    stopped = ended["step"] if ended["state"] == "preempted" else None
    for key in ("train/loss", "train/grad_norm", "train/tokens", "eval/loss", "eval/words/bits_per_byte"):
        found, wanted = series(file, name, key), series(file, "alone", key)
        wanted = {step: value for step, value in wanted.items() if step in steps}
        if key.startswith("eval/") and stopped not in found:
            wanted.pop(stopped, None)
        assert wanted and {step: found[step] for step in wanted} == pytest.approx(wanted, rel=1e-5), key


def rows_of(file, name, process, numbers):
    """(steps, A, rows of this process, T)."""
    return np.stack([np.load(records(file, name) / f"{process}-{number}.npy") for number in numbers])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_run_file(tmp_path_factory.mktemp("processes"), **CHANGES)


@pytest.fixture(scope="module")
def alone(file):
    run_alone(file, "alone", 4, MESH)


@pytest.fixture(scope="module")
def two(file, alone):
    """Two processes that train for as long as one lets them: it gets SIGTERM after step 8."""
    return run_processes(2, 2, file, "two", MESH, "steps=400", event="SIGTERM:1:8")


def test_two_processes_compute_what_one_does(file, two):
    assert_same_numbers(file, "two", range(1, 9))


def test_each_row_is_read_once_and_in_the_same_order(file, two):
    whole = rows_of(file, "alone", 0, range(8))
    parts = [rows_of(file, "two", process, range(8)) for process in range(2)]
    assert [part.shape for part in parts] == [(8, 2, 2, 32)] * 2
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), whole)
    assert len({row.tobytes() for row in whole.reshape(-1, 32)}) == 64


def test_sigterm_on_one_of_two_processes_stops_both_with_one_checkpoint(file, two):
    codes, outputs, _ = two
    ended = status(file, "two")
    assert codes == [75, 75], "\n".join(outputs)
    assert (ended["state"], ended["exit_code"]) == ("preempted", 75) and 8 <= ended["step"] < 400
    saved = sorted(int(p.name) for p in (place(file, "two") / "checkpoints").iterdir())
    assert saved == sorted({*range(4, ended["step"], 4), ended["step"]})  # whole ones: no other names


def test_only_process_0_writes_but_each_has_its_log(file, two):
    _, outputs, _ = two
    top = {p.name for p in place(file, "two").iterdir()}
    assert top == {
        "STATUS", "config.yaml", "config.input.yaml", "env.json", "metrics.jsonl", "moe.jsonl", "logs", "checkpoints",
        "attempts", "report.html", "tokenizer",
    }  # fmt: skip
    steps = list(series(file, "two", "train/loss"))
    assert steps == sorted(set(steps))
    logs = [(place(file, "two") / f"logs/process_{i}.log").read_text() for i in range(2)]
    assert all(" 8/400 |" in log and "exit 75" in log for log in logs)
    # jax's warning of a cache entry that the other process is still writing
    theirs = ("persistent compilation cache", "warnings.warn(")
    lines = [without_gloo(output).splitlines() for output in outputs]
    said = [[line for line in own if line.strip() and not any(t in line for t in theirs)] for own in lines]
    assert any(" 8/400 |" in line for line in said[0]) and not said[1], said[1]


def test_one_process_goes_on_where_two_stopped_and_the_reverse(file, two):
    begin_from(file, "two", 4, "one_of_two")
    run_alone(file, "one_of_two", 1, "mesh={data: 1}")
    assert_same_numbers(file, "one_of_two", range(5, 9))
    begin_from(file, "alone", 4, "two_of_one")
    nodes = "mesh={data: 1, fsdp: 2, dcn_data: 2}"  # each process is one
    sample = "sample={every: 8, prompts: [the router], max_new_tokens: 4}"
    codes, outputs, _ = run_processes(2, 2, file, "two_of_one", nodes, sample)
    assert codes == [0, 0], "\n".join(outputs)
    ended = status(file, "two_of_one")
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("done", 8, 0)
    assert_same_numbers(file, "two_of_one", range(5, 9))
    assert (place(file, "two_of_one") / "samples/8.jsonl").exists()


@pytest.mark.slow
def test_a_signal_amid_an_evaluation_stops_both_at_the_same_batch_and_the_evaluation_is_made_up_for(file, two):
    begin_from(file, "two", 4, "evaluated")
    small = ["eval={every: 6, batch_size: 4}", held_out(file.parent / "train.jsonl")]
    codes, outputs, _ = run_processes(2, 2, file, "evaluated", MESH, *small, event="SIGUSR1:1:eval")
    assert codes == [75, 75], "\n".join(outputs)
    ended = status(file, "evaluated")
    assert (ended["state"], ended["step"]) == ("preempted", 6)
    assert ended["reason"].startswith("SIGUSR1 after step 6; checkpoint 6 is saved")
    assert not series(file, "evaluated", "eval/loss")
    codes, outputs, _ = run_processes(2, 2, file, "evaluated", MESH, *small)
    assert codes == [0, 0], "\n".join(outputs)
    assert list(series(file, "evaluated", "eval/loss")) == [6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_that_compiles_ends_both_at_once(file, two, victim):
    begin_from(file, "two", 4, f"compiled{victim}")
    codes, outputs, seconds = run_processes(2, 2, file, f"compiled{victim}", MESH, event=f"SIGTERM:{victim}:compile")
    assert codes == [75, 75] and seconds < 20, "\n".join(outputs)
    ended = status(file, f"compiled{victim}")
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("preempted", 4, 75)
    assert "SIGTERM while compiling, " in ended["reason"]


@pytest.mark.slow
def test_four_processes_with_tensor_across_them_and_ctrl_c_on_one(file, two):
    """From a checkpoint of two processes, on another mesh. Processes that share heads read the same rows."""
    begin_from(file, "two", 4, "four")
    codes, outputs, _ = run_processes(
        4, 1, file, "four", "mesh={data: 1, expert: 2, tensor: 2}", "steps=400", event="SIGINT:2:8"
    )
    assert codes == [75] * 4, "\n".join(outputs)
    assert_same_numbers(file, "four", range(5, 9))
    parts = [rows_of(file, "four", process, range(4)) for process in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts[::2], axis=2), rows_of(file, "alone", 0, range(4, 8)))
    np.testing.assert_array_equal(parts[0::2], parts[1::2])


def test_a_process_that_fails_ends_the_others_and_says_why(file, two):
    """Long before jax would notice (100 s), and without waiting for the dead at the end (300 s)."""
    begin_from(file, "two", 4, "failed")
    codes, outputs, seconds = run_processes(2, 2, file, "failed", MESH, event="fail:1:6")
    assert codes == [74, 74] and seconds < 60, "\n".join(outputs)
    reason = "process 1 failed: StorageError: No space left on device; checkpoint 4 stands: "
    ended = status(file, "failed")
    assert (ended["state"], ended["exit_code"]) == ("failed", 74) and ended["step"] >= 5
    assert ended["reason"].startswith(reason)
    assert outputs[0].splitlines()[-1] == f"exit 74: {ended['reason']}"


def launch_two(arguments):
    """(exit codes, outputs, errors) of two processes of one device each with the command line arguments(i)."""
    code = "import sys, launch; sys.exit(launch.main(sys.argv[1:]))"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {XLA_FLAGS}"}
    joining = ["--coordinator", free_address(), "--num-processes", "2", "--process-id"]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments(i), *joining, str(i)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    return [process.returncode for process in both], *zip(*said, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_two_processes_evaluate_what_one_does(stage, tmp_path, monkeypatch):
    """The same figures, printed once; and one that finds no file ends both."""
    file = write_run_file(tmp_path) if stage == "pretrain" else write_tuning_file(tmp_path, stage)
    run_alone(file, "run", 2, "steps=3", "mesh={data: 1, fsdp: 2}")
    checkpoint = str(place(file, "run"))
    monkeypatch.setattr(evaluate, "make_mesh", lambda config: None)
    expected = evaluate.measure(checkpoint, load_config(file).config)
    shutil.rmtree(tmp_path / "cache")
    common = ["eval", checkpoint, str(file), "--json", "mesh={data: 1, fsdp: 2}"]
    codes, outputs, errors = launch_two(lambda i: [*common, f"data.cache_dir={tmp_path / str(i)}"])
    assert codes == [0, 0], errors
    assert without_gloo(outputs[1]).strip() == ""
    found = json.loads(without_gloo(outputs[0]))
    assert found.pop("checkpoint") == checkpoint and found == pytest.approx(expected, rel=1e-5)
    codes, _, errors = launch_two(lambda i: [*common, f"data.tokenizer={('gone', file)[i]}"])
    assert codes == [2, 2], errors


def held_out(path):
    return f'data.validation=[{{"name":"words","path":"{path}"}}]'  # without a space, at which settings are cut


@pytest.mark.slow
def test_a_save_that_one_process_cannot_write_is_made_again_by_all(file, alone):
    """The others wait for its part in Orbax's barrier, for minutes; they are told, and leave it."""
    codes, outputs, apart = run_processes(2, 2, file, "full", MESH, "steps=12", event="full:1:4")
    assert codes == [0, 0] and apart < 60, "\n".join(outputs)
    assert "process 1: " in outputs[0] and "it is made again in" in outputs[0]
    saved = {int(p.name) for p in (place(file, "full") / "checkpoints").iterdir() if p.name.isdigit()}
    assert 4 not in saved and {8, 12} <= saved
    assert_same_numbers(file, "full", range(1, 9))


@pytest.mark.parametrize(
    ("setting", "differ"),
    [
        (lambda i, place: [f"seed={i}"], "configuration"),
        (lambda i, place: ["steps=null", "data.epochs=1"][2 * i :], "configuration"),
        (lambda i, place: [held_out(place / ("val.jsonl", "train.jsonl")[i])], "validation"),
        (lambda i, place: [held_out(place / "val.jsonl") if i else "data.validation=[]"], "validation"),
    ],
    ids=[
        "another seed",
        "epochs for steps",
        "other held-out data",
        "held-out data for one only",
    ],
)
def test_processes_of_different_runs_say_so(file, setting, differ):
    """Each of the two has another setting: nothing is trained, and nobody waits for the other."""
    codes, _, errors = launch_two(lambda i: ["pretrain", str(file), "run_name=different", *setting(i, file.parent)])
    assert codes == [2, 2], errors
    for i, text in enumerate(errors):
        assert f"error: the processes of this run differ in {differ} (process {i} has {differ.split()[0]} " in text


@pytest.mark.slow
def test_a_run_whose_processes_do_not_share_its_directory(file):
    """New to process 0, whose listing counts; the other one sees a checkpoint."""
    (file.parent / "unshared/1/run/checkpoints/4").mkdir(parents=True)
    codes, _, errors = launch_two(lambda i: ["pretrain", str(file), f"output_dir={file.parent / 'unshared' / str(i)}"])
    assert codes == [2, 2], errors
    for text in errors:
        assert "checkpoint.directory: " in text and "is not one directory for all processes: process 1 does not" in text
    assert not list((file.parent / "unshared").rglob(".seen*"))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["precomputed", "frozen"])
def test_pairs_with_a_reference_that_both_processes_ask(tmp_path, reference):
    """The reference's numbers are computed over both, and kept by process 0 for both."""
    changes = {"dpo": {"reference": reference}, "log": {"every": 1}, "eval": {"every": 2}}
    file = write_tuning_file(tmp_path, "dpo", **changes)
    run_alone(file, "alone", 2, "mesh={data: 1, fsdp: 2}")
    shutil.rmtree(tmp_path / "cache" / "references", ignore_errors=True)
    codes, outputs, _ = run_processes(2, 1, file, "two", "mesh={data: 1, fsdp: 2}")
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_pairs(file, "two")


def assert_same_pairs(file, name):
    for key in ("train/loss", "train/grad_norm", "rewards/margins", "eval/loss"):
        assert series(file, name, key) == pytest.approx(series(file, "alone", key), rel=1e-5, abs=1e-6), key


@pytest.mark.slow
def test_what_is_not_finite_on_one_process_takes_all_back_to_one_checkpoint_and_past_the_same_rows(file):
    codes, outputs, _ = run_processes(2, 2, file, "back", MESH, "on_nonfinite=rollback", event="nan:1:48")
    assert codes == [0, 0], "\n".join(outputs)
    assert status(file, "back")["step"] == 8 and sorted(series(file, "back", "train/loss")) == list(range(1, 9))
    (note,) = [line for line in metrics_of(place(file, "back")) if "rollback/step" in line]
    assert (note["step"], note["rollback/step"], note["rollback/next_row"]) == (5, 7, 56)
    for process in range(
        2
    ):  # what was read ahead behind the bad step is what training went on with: the first read then
        ahead, first = rows_of(file, "back", process, (7, 0))
        np.testing.assert_array_equal(ahead, first)


@pytest.mark.slow
def test_a_fork_on_two_processes_is_the_continuation_of_a_run_of_one(file, alone):
    """What was read of each source is counted by each process for itself; process 0 writes it."""
    trunk = place(file, "alone")
    codes, outputs, _ = run_processes(2, 2, file, "fork", MESH, f"resume_from={trunk}@4")
    assert codes == [0, 0], "\n".join(outputs)
    for key in ("rows", "epoch", "tokens", "bytes"):
        ours, theirs = (series(file, name, f"data/words/{key}") for name in ("fork", "alone"))
        assert ours == {step: value for step, value in theirs.items() if step > 4} and len(ours) == 4
    assert series(file, "fork", "train/loss").keys() == {5, 6, 7, 8}
    assert series(file, "fork", "train/loss")[8] == pytest.approx(series(file, "alone", "train/loss")[8], rel=1e-5)


@pytest.mark.slow
def test_processes_with_a_cache_of_their_own_each(tmp_path):
    """Each prepares its rows; numbers of the reference are computed over both, and one that lost them is told."""
    file = write_tuning_file(tmp_path, "dpo", dpo={"reference": "precomputed"}, log={"every": 1}, eval={"every": 2})
    run_alone(file, "alone", 2, "mesh={data: 1, fsdp: 2}")
    caches = [tmp_path / f"cache-{i}" for i in range(2)]
    for name, lost in (("first", []), ("again", [1, 0]), ("third", [0])):
        for number, i in enumerate(lost):
            sorted(caches[i].rglob("part-*.npy"))[number].unlink()
        codes, outputs, _ = run_processes(
            2, 1, file, name, "mesh={data: 1, fsdp: 2}", of_each=lambda i: [f"data.cache_dir={caches[i]}"]
        )
        assert codes == [0, 0], "\n".join(outputs)
        assert_same_pairs(file, name)
        assert ("computing" in outputs[0]) == (name == "first")
        first, second = (sorted(p.relative_to(c) for p in c.rglob("references/*/*")) for c in caches)
        assert first == second and len(first) == 4  # two files each of training and validation
