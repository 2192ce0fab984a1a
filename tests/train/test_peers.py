"""What STATUS says of a failure is what the command line makes of it; who is lost ends the others."""

import json
import threading
import time

import jax
import pytest

from mixtral_jax.train.errors import StorageError, UserError
from mixtral_jax.train.run import peers
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.fork import trunk_of
from mixtral_jax.train.run.peers import failures_reported


def our_mistake():
    trunk_of("nowhere")


def library_mistake():
    json.loads("{")


def not_allowed():
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("fail", "exit_code", "reason"),
    [
        (our_mistake, 2, "UserError: resume_from: nowhere is no directory"),
        (library_mistake, 1, "JSONDecodeError: "),
        (not_allowed, 2, "PermissionError: "),
    ],
)
def test_status_has_the_exit_code_of_the_process(tmp_path, fail, exit_code, reason):
    place = RunDirectory(tmp_path)
    with pytest.raises((ValueError, OSError)), failures_reported(place):
        fail()
    status = json.loads((tmp_path / "STATUS").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", exit_code)
    assert status["reason"].startswith(reason)
    assert (tmp_path / "report.html").exists()


def test_the_log_keeps_what_was_behind_a_sentence(tmp_path):
    place = RunDirectory(tmp_path)
    place.create()
    with pytest.raises(StorageError), failures_reported(place):
        try:
            raise RuntimeError("503")
        except RuntimeError as error:
            raise StorageError("a checkpoint could not be written") from error
    said = place.log.read_text()
    assert "RuntimeError: 503" in said and __file__ in said
    with pytest.raises(UserError), failures_reported(place):
        raise UserError("a name")
    assert place.log.read_text() == said


class Store:
    """The key-value store of two processes: `answer` is asked before each call, and may raise or wait."""

    def __init__(self, answer=lambda calls: None, beat_of_0=None):
        self.answer, self.beat_of_0, self.calls, self.said = answer, beat_of_0, 0, {}

    def _ask(self):
        self.calls += 1
        self.answer(self.calls)

    def key_value_set(self, key, value, allow_overwrite=False):
        self._ask()
        self.said[key] = value

    def key_value_try_get(self, key):
        self._ask()
        if key == peers._KEY or self.beat_of_0 is None:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.beat_of_0(self.calls)

    def key_value_dir_get(self, prefix):
        self._ask()
        return list(self.said.items())


def refuse(calls):
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")


def ended_with(monkeypatch, tmp_path, store, seconds, process=1):
    """The exit code with which the watch ends `process` within `seconds` of the run; None: it did not."""
    codes, over = [], threading.Event()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(peers, "store", lambda: store)
    monkeypatch.setattr(peers, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(peers, "_GRACE_SECONDS", 5.0)
    monkeypatch.setattr(peers, "_SILENT_POLLS", 20)
    monkeypatch.setattr(peers, "_end", lambda code: (codes.append(code), over.set()))
    with failures_reported(RunDirectory(tmp_path)):
        over.wait(seconds)
    return codes[0] if codes else None


@pytest.mark.parametrize("answer", [refuse, lambda calls: time.sleep(1)], ids=["refused", "no answer"])
def test_a_process_that_the_coordinator_does_not_answer_ends(answer, monkeypatch, tmp_path, capsys):
    assert ended_with(monkeypatch, tmp_path, Store(answer), 20) == 76
    assert "process 0, which coordinates the run, has not answered for 20 s" in capsys.readouterr().err


def test_a_process_whose_coordinator_does_not_beat_ends(monkeypatch, tmp_path, capsys):
    assert ended_with(monkeypatch, tmp_path, Store(beat_of_0=lambda calls: "7"), 20) == 76
    assert "process 0 of the run has not been heard of for 20 s" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["7", None], ids=["no longer", "not once"])
def test_process_0_ends_where_another_does_not_beat(last, monkeypatch, tmp_path):
    """jax's own service would abort it (-6) after 100 s."""
    store = Store()
    store.said |= {} if last is None else {f"{peers._ALIVE}1": last}
    assert ended_with(monkeypatch, tmp_path, store, 20, process=0) == 76


@pytest.mark.parametrize("last", ["beats", peers._LEFT, "nothing yet"])
def test_a_process_that_is_answered_now_and_then_goes_on(last, monkeypatch, tmp_path):
    beat = {"beats": str, peers._LEFT: lambda calls: peers._LEFT, "nothing yet": None}[last]
    store = Store(lambda calls: calls % 5 and refuse(calls), beat)  # the set, then the get: each in its turn
    assert ended_with(monkeypatch, tmp_path, store, 1.0) is None
    assert store.calls > 40
