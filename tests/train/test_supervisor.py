"""The supervisor of local processes, on a stand-in for the run that does what it is told; and its command line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_jax import launch
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.launchers import local
from mixtral_jax.train.launchers.job import Nodes
from mixtral_jax.train.launchers.local import Local, Supervisor

# argv: the run's directory, the plan of each attempt by process (`75` ends so, `wait` waits, `deaf` hears no SIGTERM)
PROCESS = """
import json, os, signal, sys, time
from pathlib import Path
run, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
index = int(sys.argv[sys.argv.index("--process-id") + 1]) if "--process-id" in sys.argv else 0
attempts = run / "attempts"
number = max([int(p.name) for p in attempts.glob("*")], default=0) + (index == 0) or 1
if index == 0:
    (attempts / str(number)).mkdir(parents=True)
    (run / "STATUS").write_text(json.dumps({"state": "training", "attempt": number, "exit_code": None}))
(run / f"pid{index}").write_text(str(os.getpid()))
what = plan[min(number, len(plan)) - 1][index]
if what not in ("wait", "deaf"):
    sys.exit(int(what))
signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "deaf" else lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
(run / f"ready{index}").touch()
time.sleep(60)
"""


class Stub(SimpleNamespace):
    def command(self):
        return [sys.executable, "-c", PROCESS, str(self.run), json.dumps(self.plan)]


def stub(run, *plan):
    return Stub(run=run, nodes=Nodes(1, len(plan[0]), len(plan[0])), plan=plan)


def until(what, seconds=30):
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.02)


def lives(run, index):
    try:
        return Path(f"/proc/{(run / f'pid{index}').read_text()}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_it_starts_again_by_the_table_and_ends_with_the_last_word(tmp_path):
    said = []
    assert Supervisor(stub(tmp_path, ["75"], ["1"], ["0"]), Local(), said.append).run() == 0
    assert [line[:12] for line in said[:3]] == ["attempt 1: 7", "attempt 2: 1", "attempt 3: 0"]


def test_it_gives_up_without_a_new_checkpoint(tmp_path):
    said = []
    assert Supervisor(stub(tmp_path, ["74"]), Local(), said.append).run() == 74 and said[-1].startswith("4 attempts")


def test_a_mistake_of_one_process_is_final_though_the_others_had_to_be_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_PEERS", 0.5)
    said = []
    assert Supervisor(stub(tmp_path, ["deaf", "2"]), Local(), said.append).run() == 2
    assert said[0].startswith("attempt 1: 2")


def test_one_that_dies_ends_those_that_hang_and_all_start_again(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_PEERS", 0.5)
    assert Supervisor(stub(tmp_path, ["deaf", "76"], ["0", "0"]), Local(), lambda line: None).run() == 0


def test_kills_take_turns_and_come_only_in_training(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_PEERS", 0.5)
    said, how = [], Local(kill_every="0.3s", kills=2)
    job = stub(tmp_path, ["wait", "wait"], ["wait", "wait"], ["0", "0"])
    assert Supervisor(job, how, said.append).run() == 0
    assert [line for line in said if line.startswith("kill")] == ["kill 1: process 0", "kill 2: process 1"]


def signalled(run, *numbers):
    """Send them to this process, the first once the stand-in is ready, the others a second apart."""
    until(lambda: (run / "ready0").exists())
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_run_ends_with_75(tmp_path, number):
    sender = threading.Thread(target=signalled, args=(tmp_path, number))
    sender.start()
    supervisor = Supervisor(stub(tmp_path, ["wait"]), Local(), lambda line: None)
    assert supervisor.run() == 75 and supervisor.asked == 1
    sender.join()


def test_a_second_one_ends_it_at_once(tmp_path):
    sender = threading.Thread(target=signalled, args=(tmp_path, signal.SIGINT, signal.SIGINT))
    sender.start()
    assert Supervisor(stub(tmp_path, ["deaf"]), Local(), lambda line: None).run() == 130
    sender.join()


def test_one_that_comes_between_two_starts_is_heard(tmp_path, monkeypatch):
    judged = local.verdict
    monkeypatch.setattr(local, "verdict", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), judged(*args))[1])
    assert Supervisor(stub(tmp_path, ["75"], ["wait"]), Local(), lambda line: None).run() == 75
    assert not (tmp_path / "attempts" / "2").exists()


def test_a_sweep_that_is_stopped_has_not_done_its_work(tmp_path, monkeypatch):
    judged = local.verdict
    monkeypatch.setattr(local, "verdict", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), judged(*args))[1])
    first, second = stub(tmp_path / "a", ["0"]), stub(tmp_path / "b", ["0"])
    assert local.supervise([first, second], Local()) == 75 and not (tmp_path / "b").exists()
    assert local.supervise([first], Local()) == 0


def test_one_process_is_alone_in_an_allocation_of_many(tmp_path):
    (tmp_path / "plan").write_text("import sys; sys.exit(sys.argv[1:] != ['--num-processes', '1'])")
    job = SimpleNamespace(run=tmp_path, nodes=Nodes(1, 1), command=lambda: [sys.executable, str(tmp_path / "plan")])
    assert Supervisor(job, Local(), lambda line: None).run() == 0


SUPERVISE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.train.test_supervisor import stub
from mixtral_jax.train.launchers.local import Local, Supervisor
Supervisor(stub(Path(sys.argv[1]), ["wait", "wait"]), Local()).run()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_supervisor_that_is_killed_leaves_no_orphans(tmp_path):
    code = SUPERVISE.format(root=str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.DEVNULL)
    until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), 90)
    process.kill()
    process.wait()
    until(lambda: not lives(tmp_path, 0) and not lives(tmp_path, 1))


def test_an_error_of_the_supervisor_leaves_no_orphans(tmp_path, monkeypatch):
    def broken(self):
        until(lambda: (tmp_path / "ready0").exists())
        raise RuntimeError("no disk")

    monkeypatch.setattr(Supervisor, "_is_due", broken)
    with pytest.raises(RuntimeError, match="no disk"):
        Supervisor(stub(tmp_path, ["deaf"]), Local(), lambda line: None).run()
    assert not lives(tmp_path, 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--kill-every", "soon"], "--kill-every 'soon' is no time such as 30s or 2m"),
        (["--kill-every", "0s"], "more than 0"),
        (["--kill-every", "30s", "--kills", "0"], "more than 0"),
        (["--kills", "3"], "without --kill-every"),
        (["--kills", "0"], "--kills is 0"),
        (["--accelerators", "--processes", "2"], "--accelerators: one process has them all"),
        (["--processes", "0"], "is 0"),
        (["--devices", "-1"], "is -1"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, capsys, words, sentence):
    assert launch.main(["submit", "local", "configs/sft/tiny.yaml", f"output_dir={tmp_path}", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_time_is_seconds():
    assert [local_time("30s"), local_time("2m"), local_time("0.5h")] == [30, 120, 1800]
    with pytest.raises(UserError, match="30s"):
        local_time("30")


def local_time(text):
    from mixtral_jax.train.console import duration

    return duration(text, "--kill-every", "30s or 2m")
