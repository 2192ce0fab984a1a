"""Fixed moments to die at, without randomness (`make soak` draws its own): the run goes on as if nothing had been.

Killed processes are real in the last test. In the first one a run is copied at every file that it opens for writing,
moves or removes: what `kill -9` would leave at that moment, as the system keeps what was written.
"""

import shutil
import sys
import threading

import pytest

import mixtral_jax as mj
from mixtral_jax.train import trainer as training
from mixtral_jax.train.checkpoints import checkpointer
from mixtral_jax.train.config.load import load_config
from tests.conftest import ROOT
from tests.soak.attempt import Attempt, World
from tests.soak.checks import History, Reference, lines_of, numbers, whole_steps
from tests.soak.faults import NONE, Fault, forget_prepared
from tests.soak.victim import phase_of
from tests.tiny import write_run_file

STEPS, KEEP_LAST = 8, 1
CHANGES = {
    "steps": STEPS, "log": {"every": 1}, "eval": {"every": 3, "batches": 1}, "micro_batch_size": 4,
    "checkpoint": {"every": 2, "keep_last": KEEP_LAST, "asynchronous": False},
}  # fmt: skip
listeners = []  # an audit hook stays for as long as the process
sys.addaudithook(lambda event, arguments: [listen(event, arguments) for listen in listeners])


class Copies:
    """The run directory before each change of a file in it."""

    def __init__(self, run, to):
        self._run, self._to, self._lock, self._busy = run, to, threading.Lock(), threading.local()
        self.made = []  # (phase, copy)

    def __call__(self, event, arguments):
        if getattr(self._busy, "yes", False):  # our own files
            return
        self._busy.yes = True
        try:
            phase = phase_of(event, arguments)
            if phase in ("save", "prune", "status", "owner") and self._run.exists():
                with self._lock:
                    self._copy(phase)
        finally:
            self._busy.yes = False

    def _copy(self, phase):
        copy = self._to / str(len(self.made))
        for _ in range(5):
            try:
                shutil.copytree(self._run, copy / "run", symlinks=True)
                self.made.append((phase, copy))
                return
            except (OSError, shutil.Error):  # tensorstore's own threads went on: a file is no longer there
                shutil.rmtree(copy)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A run from its first step to its last, and what it looked like before each change."""
    place = tmp_path_factory.mktemp("points")
    file = write_run_file(place, **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: None)
        made = Copies(place / "runs" / "run", place / "copies")
        listeners.append(made)
        train(file)
        listeners.remove(made)
        yield file, made.made, Reference.of(place / "runs" / "run", STEPS)


def train(file, *overrides):
    with mj.Trainer(load_config(file, list(overrides)).config, quiet=True) as trainer:
        for _ in trainer.steps():
            pass


def newest_in(run):
    return max(whole_steps(run / "checkpoints"), default=0)


def test_at_every_change_of_a_file_the_newest_whole_checkpoint_and_its_rows_are_there(copies):
    _, made, reference = copies
    assert {phase for phase, _ in made} >= {"save", "prune", "status"} and len(made) > 50
    newest = 0
    for phase, copy in made:
        assert newest_in(copy / "run") >= newest, (phase, copy, "a whole one is gone")
        newest = newest_in(copy / "run")
        found = checkpointer.find(copy / "run" / "checkpoints", "auto", lambda line: None)
        assert (found.step if found else 0) == newest, (phase, copy)
        for name, rows in reference.rows.items():
            there = numbers(lines_of(copy / "run" / name))
            assert [key for key in rows if key[0] <= newest and key not in there] == [], (phase, copy, name)
    assert newest >= STEPS - 2


@pytest.mark.parametrize(("phase", "newest"), [("save", 2), ("save", 4), ("prune", 4), ("prune", 6)])
def test_a_run_goes_on_from_there_bit_for_bit(copies, phase, newest, tmp_path):
    file, made, reference = copies
    there = [copy for kind, copy in made if kind == phase and newest_in(copy / "run") == newest]
    shutil.copytree(there[len(there) // 2] / "run", tmp_path / "run", symlinks=True)
    history = History(tmp_path / "run", reference, KEEP_LAST)
    history.before()
    train(file, f"output_dir={tmp_path}")
    assert history.after([0], full=False) == []


POINTS = [
    Fault("SIGKILL", "prepare", 20, cold=True),
    Fault("SIGTERM", "compile", 1),
    Fault("SIGKILL", "save", 40),
    Fault("SIGUSR1", "evaluation", 1),
    Fault("SIGKILL", "restore", 1),
    Fault("SIGKILL", "prune", 5),
    NONE,
]


def test_killed_on_purpose_in_each_phase_it_ends_as_if_left_alone(tmp_path):
    """Prepare, compile, save, evaluation, restore, prune: the same run, killed in each and started again."""
    world = World(tmp_path / "run.yaml", tmp_path, tmp_path / "out", ROOT / ".cache" / "jax-tests")
    world.outputs.mkdir()
    changes = CHANGES | {"data": {"cache_dir": str(world.cache)}, "steps": 14}
    write_run_file(tmp_path, output_dir=str(world.runs), **changes)
    ended = Attempt(world, "undisturbed", NONE, 1, 0.0, "undisturbed").finish()
    assert ended.codes == [0], ended.outputs
    history = History(world.runs / "killed", Reference.of(world.runs / "undisturbed", 14), KEEP_LAST)
    for number, fault in enumerate(POINTS):
        if fault.cold:
            forget_prepared(world.cache)
        history.before()
        ended = Attempt(world, "killed", fault, 1, 0.0, str(number)).finish()
        assert ended.struck == (fault is not NONE) and ended.problems == [], (fault, ended)
        assert history.after(ended.codes, full=False) == [], (fault, ended)
