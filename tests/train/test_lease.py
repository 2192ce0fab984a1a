"""The lease of a directory: who meets a living owner is refused, who meets a dead one goes on, nobody is thrown out.

Other processes are played by leases whose ids this process does not know as its own.
"""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import lease as leases
from mixtral_jax.train.run.lease import FILE, Lease, read


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("BEAT", 0.05), ("PATIENCE", 1.0), ("_POLL", 0.01)):
        monkeypatch.setattr(leases, f"{name}_SECONDS", seconds)


@pytest.fixture
def lost():
    return []


@pytest.fixture
def take(tmp_path, lost, monkeypatch):
    made = []

    def take(*, of_another=False):
        lease = Lease(tmp_path, lost.append)
        made.append(lease)
        lease.said = lease.take()
        if of_another:
            leases._ours.discard(lease._said["id"])
        return lease

    yield take
    for each in made:
        each.release()


def leave(tmp_path, **changes):
    """A lease that nobody moves: of this system's own init, unless said otherwise."""
    said = {**leases._this_process(), "pid": 1, "started": leases._started(1), "id": "theirs", "beat": 7, **changes}
    (tmp_path / FILE).write_text(json.dumps(said))


def gone():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def seconds_to(take, *arguments, **options):
    began = time.monotonic()
    take(*arguments, **options)
    return time.monotonic() - began


def test_an_owner_whose_counter_moves_is_named_at_once_and_stays(take, lost, tmp_path):
    owner = take(of_another=True)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*: one process at a time"):
        take()
    assert time.monotonic() - began < 0.5  # no patience is needed with the living
    assert owner._is_ours(read(tmp_path)) and not lost
    owner.release()
    assert not (tmp_path / FILE).exists()
    take()


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"boot": "before"}, {"namespaces": "a container"}, {}])
def test_a_counter_that_stands_still_is_taken_over_after_a_while(take, tmp_path, changes):
    """On another machine, before a restart, in another container, or here, but in the hands of a process that hangs."""
    leave(tmp_path, **({"pid": gone()} if changes else {}), **changes)
    began = time.monotonic()
    assert take().said.startswith(f"the lease of {tmp_path} is taken over from process ")
    assert 0.9 < time.monotonic() - began < 2


@pytest.mark.parametrize("other", [{"started": "long ago"}, {"pid": None}])
def test_a_process_that_is_known_to_have_ended_is_not_waited_for(take, tmp_path, other):
    leave(tmp_path, **({"pid": gone()} if other == {"pid": None} else other))
    assert seconds_to(take) < 0.5


def test_a_process_that_nobody_has_waited_for_has_ended_too(take, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    started = leases._started(child.pid)
    while leases._started(child.pid) not in ("ended", None):
        time.sleep(0.01)
    leave(tmp_path, pid=child.pid, started=started)
    assert seconds_to(take) < 0.5
    child.wait()


@pytest.mark.parametrize("text", ["", '{"host": "a", "id', "[]", "\x00\x00"])
def test_a_file_that_is_cut_off_is_watched_and_taken_over(take, tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert seconds_to(take) > 0.9
    assert read(tmp_path)["pid"] == os.getpid()


def test_a_number_that_is_none_of_a_process_is_watched_too(take, tmp_path):
    leave(tmp_path, pid=10**12)
    assert seconds_to(take) > 0.9


def test_a_link_to_nothing_is_not_waited_for_for_ever(take, tmp_path):
    (tmp_path / FILE).symlink_to("nowhere")
    began = time.process_time()
    with pytest.raises(UserError, match="can be neither made nor read: remove it"):
        take()
    assert time.process_time() - began < 1  # of two seconds


def test_its_owner_mends_what_was_cut_off_or_removed(take, lost, tmp_path):
    owner = take(of_another=True)
    (tmp_path / FILE).write_text("")
    with pytest.raises(UserError, match="is being written by"):
        take()
    (tmp_path / FILE).unlink()
    time.sleep(0.3)
    assert owner._is_ours(read(tmp_path)) and not lost


def test_an_owner_that_was_taken_over_says_so_once_and_leaves_the_other_alone(take, lost, tmp_path):
    owner = take(of_another=True)
    leave(tmp_path)
    before = (tmp_path / FILE).read_text()
    owner._thread.join(2)
    assert len(lost) == 1 and f"{tmp_path} was taken over by process 1 on" in lost[0]
    owner.release()
    assert (tmp_path / FILE).read_text() == before


def test_what_was_released_while_it_was_watched_is_taken_at_once(take, tmp_path):
    leave(tmp_path)
    threading.Timer(0.2, (tmp_path / FILE).unlink).start()
    assert 0.1 < seconds_to(take) < 0.6


class Strangers(set):
    def __contains__(self, item):
        return False


def test_of_many_that_wait_for_a_dead_one_one_goes_on(take, lost, tmp_path, monkeypatch):
    leave(tmp_path)
    monkeypatch.setattr(leases, "_ours", Strangers())
    ended = []

    def start():
        try:
            ended.append(take())
        except UserError as error:
            ended.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owners = [each for each in ended if isinstance(each, Lease)]
    assert [each._is_ours(read(tmp_path)) for each in owners] == [True] and not lost


def test_a_takeover_that_was_killed_in_the_middle_does_not_stand_in_the_way_for_ever(take, tmp_path):
    leave(tmp_path)
    (tmp_path / f"{FILE}.{leases.digest(read(tmp_path))[:16]}").touch()
    assert seconds_to(take) < 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE]


def test_this_process_takes_over_from_itself(take, lost, tmp_path):
    """A notebook that makes its trainer anew; and a job that meets its own lease."""
    first = take()
    assert seconds_to(take) < 0.5
    first._thread.join(2)
    assert not lost and not first._is_ours(read(tmp_path))


def test_a_lease_that_was_handed_over_does_not_come_back(take, tmp_path):
    """Nobody would let go of it: its trainer is forgotten."""
    first = take()
    take().release()
    time.sleep(0.2)
    assert first.handed_over and not (tmp_path / FILE).exists()


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # jax's: the child calls none of it
@pytest.mark.parametrize("does", ["take", "release"])
def test_a_child_that_was_forked_is_another_process(take, lost, tmp_path, does):
    """It neither takes the directory from its parent nor lets go of it when its copy of the trainer is closed."""
    owner = take()
    pid = os.fork()
    if pid == 0:
        try:
            owner.release() if does == "release" else Lease(tmp_path, lost.append).take()
        except UserError:
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (2 if does == "take" else 0)
    assert owner._is_ours(read(tmp_path)) and not lost


def test_what_could_not_be_made_is_not_removed(take, tmp_path, monkeypatch):
    """The lease that stands there may be another's."""
    leave(tmp_path)

    def refuse(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(OSError):
        take()
    monkeypatch.undo()
    assert (tmp_path / FILE).exists()


def test_a_disk_that_does_not_answer_for_a_while_costs_no_lease(take, lost, tmp_path, monkeypatch):
    owner = take(of_another=True)
    with monkeypatch.context() as broken:
        broken.setattr(Lease, "_beat", lambda self: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        time.sleep(0.2)
    with pytest.raises(UserError, match="is being written by"):
        take()
    assert not lost and owner._thread.is_alive()


def test_clocks_that_are_stepped_change_nothing(take, tmp_path, monkeypatch):
    owner = take(of_another=True)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    os.utime(tmp_path / FILE, (0, 0))
    with pytest.raises(UserError, match="is being written by"):
        take()
    owner.release()
