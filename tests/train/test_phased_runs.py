"""A run in phases: bit for bit the same over kills and roll backs, within a phase and across its border."""

import json
import shutil

import numpy as np
import pytest

from mixtral_jax import checkpoint
from mixtral_jax.checkpoint.slices import ArrayReader
from mixtral_jax.data import loader
from mixtral_jax.train import build
from mixtral_jax.train import trainer as training
from mixtral_jax.train.config.load import load_config
from tests.documented import undocumented
from tests.tiny import WORDS, metrics_of, write_run_file

ROWS = 8  # of a step
PHASES = [
    {"from_step": 0, "weights": {"web": 3, "code": 1}},
    {"from_step": 4, "weights": {"code": 1, "chat": 1}, "learning_rate": {"schedule": "linear"}},
]
SETTINGS = {
    "log": {"every": 1, "tensorboard": False}, "checkpoint": {"every": 3, "asynchronous": False, "keep_last": 9},
    "optimizer": {"schedule": "wsd", "learning_rate": 0.01, "warmup_steps": 2}, "on_nonfinite": "rollback",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("phases")
    rng = np.random.default_rng(2)
    for name in ("web", "code", "chat"):
        lines = [json.dumps({"text": f"{name} {i} " + " ".join(rng.choice(WORDS, 30))}) for i in range(20)]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return place


@pytest.fixture
def train(files, monkeypatch):
    """Trains; rows in `bad` are not finite. Returns the run's directory, how it ended, and the tokens of each batch."""
    monkeypatch.setattr(training, "make_mesh", lambda config: None)

    def train(name, bad=(), stop_after=None, phases=PHASES, **changes):
        data = {
            "train": [{"name": n, "path": str(files / f"{n}.jsonl")} for n in ("web", "code", "chat")],
            "validation": [], "phases": phases, **changes.pop("data", {}),
        }  # fmt: skip
        config = load_config(write_run_file(files, **{**SETTINGS, "run_name": name, "data": data, **changes})).config
        batches = []

        class Loader(loader.Loader):
            def __init__(self, *args, start_row, **more):
                super().__init__(*args, start_row=start_row, **more)
                self.row, self.size = start_row, more["global_batch_size"]

            def __next__(self):
                batch, rows = super().__next__(), range(self.row, self.row + self.size)
                self.row += self.size
                batches.append((rows.start, batch.tokens.reshape(-1, batch.tokens.shape[-1])))
                return batch._replace(weights=batch.weights * np.float32(np.nan)) if {*bad} & {*rows} else batch

        monkeypatch.setattr(build, "Loader", Loader)
        monkeypatch.setattr(training.Interrupts, "requested", lambda self, step: {stop_after: "SIGTERM"}.get(step))
        with training.Trainer(config, quiet=True) as trainer:
            for _ in trainer.steps():
                pass
        return trainer.run.path, trainer.outcome, batches

    return train


def said(place):
    """What belongs to the steps: no times."""
    keys = ("train/loss", "train/learning_rate", "train/tokens")
    lines = [line for line in metrics_of(place) if "train/loss" in line and np.isfinite(line["train/loss"])]
    return [
        {k: v for k, v in line.items() if k in ("step", *keys) or k.startswith("data/")} for line in lines
    ]  # fmt: skip


def log_of(place):
    return (place / "logs" / "process_0.log").read_text()


def left(place, step=8):
    reader, path = ArrayReader(place / "checkpoints" / str(step)), place / "checkpoints" / str(step)
    arrays = {name: np.asarray(reader.read(name, ())).tobytes() for name in sorted(reader.names)}
    return arrays, checkpoint.read_item(path, "dataset")


def test_kills_within_a_phase_and_at_its_border_change_nothing(train, files):
    whole, outcome, _ = train("whole")
    assert outcome.exit_code == 0 and undocumented(metrics_of(whole)) == set()
    lines = said(whole)
    assert [line["data/phase"] for line in lines] == [1] * 4 + [2] * 4
    rates = [0.005, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025, 0.0]
    assert [line["train/learning_rate"] for line in lines] == pytest.approx(rates)
    assert lines[3]["data/chat/rows"] == 0 < lines[4]["data/chat/rows"]
    assert lines[-1]["data/web/rows"] == lines[3]["data/web/rows"]
    assert sum(lines[-1][f"data/{name}/rows"] for name in ("web", "code", "chat")) == 8 * ROWS
    log = log_of(whole)
    assert "phase 2 of 2 begins behind step 4, with row 32: code 50 %, chat 50 %" in log
    assert "phase 2 of 2, steps 4 to 8: mixture" in log  # on the first screen, with the epochs of each source
    status = json.loads((whole / "STATUS").read_text())
    assert status["data"]["chat"]["rows"] == lines[-1]["data/chat/rows"]
    for stop in (4, 5):
        place, outcome, _ = train(f"stopped-{stop}", stop_after=stop)
        assert outcome.exit_code == 75
        if stop == 5:  # kill -9 saves nothing
            shutil.rmtree(place / "checkpoints" / "5")
        place, outcome, _ = train(f"stopped-{stop}")
        assert outcome.exit_code == 0 and said(place) == lines and left(place) == left(whole)


def test_a_roll_back_over_the_border_is_the_same_after_every_kill(train):
    """Step 5, the first of phase 2, is bad: back to checkpoint 3 in phase 1, whose last step reads the rows behind."""
    bad = [4 * ROWS + 3]
    whole, outcome, _ = train("bad", bad)
    assert outcome.exit_code == 0
    dataset = left(whole)[1]
    assert dataset["passed"] == [{"after_step": 3, "bad_step": 5, "next_row": 40}]
    assert dataset["next_row"] == 40 + 5 * ROWS
    lines = said(whole)
    assert [(line["step"], line["data/phase"]) for line in lines] == [(i, 1 + (i > 4)) for i in range(1, 9)]
    assert lines[3]["data/chat/rows"] > 0 == lines[3]["data/chat/tokens"]  # drawn by the bad step, and passed over
    assert lines[-1]["data/web/rows"] + lines[-1]["data/code/rows"] + lines[-1]["data/chat/rows"] == 80
    place, _, _ = train("killed", bad, stop_after=5)  # behind the roll back, and before a checkpoint that says so
    shutil.rmtree(place / "checkpoints" / "5")
    place, outcome, _ = train("killed", bad)
    assert outcome.exit_code == 0 and said(place) == lines and left(place) == left(whole)
    place, outcome, _ = train("forked", [64], resume_from=f"{whole}@6")  # before it has a checkpoint of its own
    assert outcome.exit_code == 0 and f"back to checkpoint 6 of {whole}, then row 72" in log_of(place)
    assert left(place)[1]["passed"] == [*dataset["passed"], {"after_step": 6, "bad_step": 7, "next_row": 72}]
    assert left(place)[1]["next_row"] == 72 + 2 * ROWS


def test_another_batch_size_midway_reads_every_row_of_an_epoch_once(train):
    """15.4, 15.5: and data.restart with other weights behind it reads nothing that was read before."""
    epoch = {"phases": None, "steps": 0, "optimizer": {**SETTINGS["optimizer"], "schedule": "constant"}}
    place, _, first = train("batch", stop_after=3, data={"epochs": 1}, global_batch_size=4, **epoch)
    first = [tokens for row, tokens in first if row < 12]
    place, outcome, more = train("batch", data={"epochs": 1}, **epoch)
    assert outcome.exit_code == 0
    rows = np.concatenate([*first, *(tokens for _, tokens in more)])
    status = json.loads((place / "STATUS").read_text())["data"]
    epochs = {name: found["epoch"] for name, found in status.items()}
    assert all(1 <= epoch < 1.3 for epoch in epochs.values()), epochs
    total = sum(round(found["rows"] / found["epoch"]) for found in status.values())
    assert len(rows) - total < 8 and len({row.tobytes() for row in rows[:total]}) == total
    assert "changed global_batch_size: 4 -> 8" in log_of(place)
