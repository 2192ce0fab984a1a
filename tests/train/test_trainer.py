"""Whole runs of a tiny model: what they write, how they end, what they refuse. On one device unless said."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint import trees
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.checkpoints import checkpointer
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import AGAIN, UserError
from tests.documented import undocumented
from tests.tiny import TINY, metrics_of, write_run_file


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)


@pytest.fixture
def start(one_device, tmp_path, capsys):
    """Runs the tiny run with changes; returns (exit code, what it printed)."""

    def start(force=False, overrides=(), **changes):
        config, provenance = load_config(write_run_file(tmp_path, **changes), overrides)
        capsys.readouterr()
        code = loop.run(config, provenance, force=force)
        return code, capsys.readouterr().out

    return start


@pytest.fixture
def place(tmp_path):
    return tmp_path / "runs" / "run"


def status(place):
    return json.loads((place / "STATUS").read_text())


def test_a_run_learns_and_leaves_what_it_promises(start, place):
    sample = {"every": 8, "prompts": ["the router", ""], "max_new_tokens": 8, "temperature": 2.0}
    code, out = start(eval={"every": 4}, sample=sample)
    assert code == 0
    ended = status(place)
    assert (ended["state"], ended["step"], ended["exit_code"], ended["attempt"]) == ("done", 8, 0, 1)
    assert ended["reason"] == f"8 steps are done; everything is in {place}"
    assert out.strip().splitlines()[-1] == f"exit 0: 8 steps are done; everything is in {place}"
    for title in ("versions", "devices", "mesh", "kernels", "model", "batch", "data", "router"):
        assert f"{title}  " in out
    for name in ("config.yaml", "config.input.yaml", "env.json", "metrics.jsonl", "moe.jsonl", "logs/process_0.log"):
        assert (place / name).stat().st_size > 0, name
    lines = metrics_of(place)
    assert undocumented(lines) == set()
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8]
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    assert training[-1]["train/tokens"] == pytest.approx(8 * 8 * 32, rel=0.1)
    assert {"perf/tokens_per_second", "perf/mfu", "perf/data_wait_seconds", "moe/balance", "train/param_norm"} <= set(
        training[0]
    )
    assert training[0]["perf/mfu"] is None  # no peak is known for a CPU
    evals = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evals] == [4, 8]
    assert evals[0]["eval/loss"] > evals[1]["eval/loss"]
    assert {"eval/words/bits_per_byte", "eval/words/perplexity"} <= set(evals[0])
    assert [line["step"] for line in lines if "checkpoint/seconds" in line] == [3, 6, 8]
    assert sorted(p.name for p in (place / "checkpoints").iterdir()) == ["6", "8"]
    counts = [json.loads(line) for line in (place / "moe.jsonl").read_text().splitlines()]
    assert np.array(counts[-1]["counts"]).shape == (TINY["num_hidden_layers"], TINY["num_local_experts"])
    samples = [json.loads(line) for line in (place / "samples" / "8.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in samples] == sample["prompts"]
    assert load_config(place / "config.yaml").config.steps == 8


def test_nothing_left_to_do_force_and_never(start, place):
    assert start()[0] == 0
    before = (place / "metrics.jsonl").read_text()
    code, out = start()
    assert code == 0 and "nothing left to do: 8 of 8 steps are done" in out
    assert (place / "metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match=r"resume: never, but .* holds checkpoint 8"):
        start(resume="never")
    assert (status(place)["state"], status(place)["exit_code"]) == ("done", 0)  # a refused attempt changes nothing
    with pytest.raises(UserError, match=r"resume: 6, but .* holds newer checkpoints \(8\)"):
        start(resume=6)
    code, out = start(force=True)
    assert code == 0 and "step 1 done" in out
    assert [line["step"] for line in metrics_of(place) if "train/loss" in line] == [2, 4, 6, 8]


def test_more_steps_and_another_rate_go_on_and_say_so(start, place):
    start()
    code, out = start(steps=10, optimizer={"learning_rate": 0.005})
    assert code == 0
    assert "resuming from checkpoint 8 at row 64" in out
    assert "changed steps: 8 -> 10" in out and "changed optimizer.learning_rate: 0.01 -> 0.005" in out
    assert [line["step"] for line in metrics_of(place) if "train/loss" in line] == [2, 4, 6, 8, 10]


def test_another_shape_and_other_data_are_refused(start):
    more = {"steps": 10, "optimizer": {"learning_rate": 0.005}}
    start()
    with pytest.raises(UserError, match=r"was trained with model\.intermediate_size 24, which is now 32"):
        start(**more, model={"intermediate_size": 32})
    with pytest.raises(UserError, match=r'data\.packing: "\w+" -> "best_fit", .*Set data\.restart=true'):
        start(**more, data={"packing": "best_fit"})
    with pytest.raises(UserError, match=r"checkpoint 8 was made with seed: 0 -> 7, which now is another order of rows"):
        start(**more, seed=7)
    code, out = start(**more, data={"packing": "best_fit", "restart": True})
    assert code == 0 and "from checkpoint 8 at row 64" in out
    assert "source words has other rows than those that were read of it: it begins at its first" in out


def test_divergence_ends_with_3_and_the_last_good_checkpoint(start, place):
    code, out = start(optimizer={"learning_rate": 1e30, "warmup_steps": 0}, checkpoint={"every": 1})
    assert code == 3
    ended = status(place)
    assert ended["state"] == "diverged" and ended["exit_code"] == 3
    bad = ended["step"] + 1
    assert f"step {bad} has loss" in ended["reason"] and f"checkpoint {ended['step']} stands" in ended["reason"]
    assert out.strip().splitlines()[-1] == f"exit 3: {ended['reason']}"
    last = [line for line in metrics_of(place) if "train/loss" in line][-1]
    assert last["step"] == bad and not (np.isfinite(last["train/loss"]) and np.isfinite(last["train/grad_norm"]))


def test_the_step_compiles_once_and_nothing_compiles_after_warm_up(start, monkeypatch):
    """From the second interval on no jax function is compiled, though evaluation and checkpoints go on."""
    compiled = []
    steps = []

    def listen(event, duration, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(steps))

    original = loop.Log.run
    monkeypatch.setattr(loop.Log, "run", lambda self, moment: (steps.append(moment.step), original(self, moment)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        start(eval={"every": 4}, checkpoint={"every": 4})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert steps == [2, 4, 6, 8]
    assert compiled and max(compiled) <= 2  # by the log after step 4 all had been compiled


def test_a_failing_tracker_does_not_stop_the_run(start, monkeypatch):
    from mixtral_jax.train.hooks import sinks as metrics

    def fail(self, step, values):
        raise RuntimeError("no room in the event file")

    monkeypatch.setattr(metrics.TensorBoard, "write", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out = start(log={"tensorboard": True})
    assert code == 0
    assert out.count("TensorBoard failed (no room in the event file); training goes on without it") == 1


@pytest.fixture
def refuse(monkeypatch):
    """Saves of these steps leave what a full file system does: nothing under the final name."""
    original = trees.PendingSave.result
    monkeypatch.setattr(checkpointer, "PAUSES", (0.001, 0.001, 0.001))

    def refuse(*steps):
        def result(self):
            written = original(self)
            if self._path.name in steps:
                self._path.rmtree()
                raise OSError(28, "No space left on device")
            return written

        monkeypatch.setattr(trees.PendingSave, "result", result)

    return refuse


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stands(start, place, refuse):
    refuse("6", "7", "8")
    with pytest.raises(UserError, match=r"could not be written to .*: No space left on device; checkpoint 3 stands"):
        start()
    ended = status(place)
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("failed", 8, 74) and AGAIN in ended["reason"]


def test_a_save_that_is_refused_is_made_again_with_the_rows_of_its_own_step(one_device, tmp_path, place, refuse):
    """It was noticed at the next save, which was then not made. A run that goes on from there is the same."""
    refuse("3")
    options = {"checkpoint": {"every": 3, "keep_last": 9}, "log": {"every": 1}}
    with loop.Trainer(load_config(write_run_file(tmp_path, **options)).config) as trainer:
        for moment in trainer.steps():
            if moment.step in (3, 5):
                trainer._checkpoint._checkpointer._under_way._future.exception()  # until it has ended
    saved = checkpointer.saved_steps(place / "checkpoints")
    assert saved == [5, 6, 8]
    found = checkpointer.find(place / "checkpoints", 5, print)
    assert (found.dataset["next_row"], found.meta["step"]) == (40, 5)
    losses = {line["step"]: line["train/loss"] for line in metrics_of(place) if "train/loss" in line}
    checkpointer.discard(place / "checkpoints", [6, 8])
    loop.run(load_config(write_run_file(tmp_path, **options)).config)
    assert {line["step"]: line["train/loss"] for line in metrics_of(place) if "train/loss" in line} == losses


def test_a_directory_that_cannot_be_written_is_one_sentence(start, tmp_path):
    (tmp_path / "runs").write_text("a file where a directory should be")
    with pytest.raises(UserError, match=r"output_dir: .* is not writable"):
        start()


def test_accumulation_does_not_change_the_run(start, place):
    """NUMERICS D1 through the whole loop; the router terms are off, since they are means of each micro-batch."""
    router = {"router_aux_loss_coef": 0, "router_z_loss_coef": 0}
    start(router=router, log={"every": 1})
    whole = [line["train/loss"] for line in metrics_of(place) if "train/loss" in line]
    start(force=True, router=router, log={"every": 1}, micro_batch_size=2)
    parts = [line["train/loss"] for line in metrics_of(place) if "train/loss" in line]
    np.testing.assert_allclose(parts, whole, rtol=1e-4)  # eight updates apart


def test_a_run_of_one_device_goes_on_on_eight(tmp_path, one_device, monkeypatch):
    """NUMERICS G3: on another mesh the same data order, and the losses within 1e-5 of themselves."""
    changes = {"log": {"every": 1}, "checkpoint": {"every": 6}}
    config, _ = load_config(write_run_file(tmp_path, **changes), ["run_name=one"])
    assert loop.run(config) == 0
    monkeypatch.undo()
    shutil.copytree(tmp_path / "runs/one/checkpoints/6", tmp_path / "runs/eight/checkpoints/6")
    mesh = ["mesh={data: 2, fsdp: 2, expert: 2}", "run_name=eight"]
    config, _ = load_config(write_run_file(tmp_path, **changes), mesh)
    assert loop.run(config) == 0
    one, eight = (
        {line["step"]: line["train/loss"] for line in metrics_of(tmp_path / "runs" / name) if "train/loss" in line}
        for name in ("one", "eight")
    )
    assert sorted(eight) == [7, 8]
    for step, loss in eight.items():
        assert loss == pytest.approx(one[step], rel=1e-5)
