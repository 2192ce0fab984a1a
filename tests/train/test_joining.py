"""Processes that do not find each other: one sentence within the time, and the exit code says what kind it is."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from mixtral_jax import launch
from mixtral_jax.train.errors import PeerLost, UserError
from mixtral_jax.train.run import joining, peers
from mixtral_jax.train.run.joining import check_answers, check_free, parse_address
from tests.tiny import write_run_file


@pytest.fixture
def listener():
    """A port that is taken by something that says nothing, or what `says` holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = SimpleNamespace(port=server.getsockname()[1], says=b"")

        def serve():
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(64)
                    peer.sendall(taken.says)

        threading.Thread(target=serve, daemon=True).start()
        yield taken
        server.shutdown(socket.SHUT_RDWR)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:port", "host:0", "host:65536", "a:b:1", "http://h:1", "a b:1", "h:-1"]
)
def test_no_address(address):
    with pytest.raises(UserError, match=r"the coordinator's address is .*HOST:PORT is expected"):
        parse_address(address)


def test_addresses():
    assert parse_address("node-1.svc:8476") == ("node-1.svc", 8476)
    assert parse_address("[::1]:1") == ("::1", 1)


def test_what_fails_by_itself_is_not_ended_later(monkeypatch):
    ended = []
    monkeypatch.setattr(joining.os, "_exit", ended.append)
    with pytest.raises(RuntimeError, match="no device"), joining._ended_after(0.1, "too late"):
        raise RuntimeError("no device")
    time.sleep(0.3)
    assert not ended


def test_a_coordinator_is_told_from_what_only_listens(listener):
    with pytest.raises(PeerLost, match=r"did not answer at 127\.0\.0\.1:\d+ within 1 s .*no coordinator"):
        check_answers("127.0.0.1", listener.port, 1)
    listener.says = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with pytest.raises(PeerLost, match="no coordinator"):
        check_answers("127.0.0.1", listener.port, 1)
    listener.says = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    check_answers("127.0.0.1", listener.port, 1)


def test_it_may_come_late():
    port, opened = free_port(), []
    answer = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

    def serve():
        with socket.create_server(("127.0.0.1", port)) as server:
            opened.append(server)
            peer, _ = server.accept()
            with peer:
                peer.sendall(answer)

    threading.Timer(0.6, serve).start()
    check_answers("127.0.0.1", port, 5)
    assert opened


def test_a_port_that_is_taken(listener):
    with pytest.raises(PeerLost, match=rf"port {listener.port} is taken by another process on this machine"):
        check_free(listener.port, 0.1)
    check_free(free_port(), 0.1)


@pytest.mark.parametrize(
    ("where", "process", "code", "says"),
    [
        ("free", "1", 76, "exit 76: process 0, the coordinator, did not answer at 127.0.0.1:"),
        ("taken", "1", 76, "exit 76: process 0, the coordinator, did not answer at 127.0.0.1:"),
        ("taken", "0", 76, "exit 76: the coordinator's port "),
        ("nowhere", "1", 2, "error: the coordinator's address is 'nowhere:99999'"),
    ],
)
def test_the_exit_code(where, process, code, says, listener, tmp_path, capsys):
    address = {"free": f"127.0.0.1:{free_port()}", "taken": f"127.0.0.1:{listener.port}"}.get(where, "nowhere:99999")
    options = ["--coordinator", address, "--num-processes", "2", "--process-id", process, "--timeout", "0.5"]
    assert launch.main(["pretrain", str(write_run_file(tmp_path)), *options]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(says)
    assert not (tmp_path / "runs").exists()


def test_what_waits_in_jax_ends_with_76():
    """As a process does that has joined, where another is killed before all have seen each other's devices."""
    code = (
        "import time; from mixtral_jax.train.run import joining\nwith joining._ended_after(0.2, 'lost'): time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (ended.returncode, ended.stderr) == (76, "\nexit 76: lost\n")


def test_silence_is_counted_in_polls():
    heard, beats = {}, {"1": 0, "2": 0, "3": "left"}
    for poll in range(peers._SILENT_POLLS + 1):
        beats["1"] = poll
        lost = peers._silent([(f"mixtral_jax/alive/{i}", str(beat)) for i, beat in beats.items()], heard)
        assert lost == ("2" if poll == peers._SILENT_POLLS else "")


MEMBER = """
import os, sys, time
from mixtral_jax.train.meetings import meet
from mixtral_jax.train.run import joining, peers
from mixtral_jax.train.run.directory import RunDirectory
from pathlib import Path
process, port, killed, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[5])
joining.join(f"127.0.0.1:{port}", 2, process, 60)
peers._SILENT_POLLS, peers._LAST_SECONDS = 3, 0.0
place = RunDirectory(Path(sys.argv[4]))
place.create()
place.step = 7
with peers.failures_reported(place):
    meet("start")
    time.sleep(1.5)
    if process == killed:
        os.kill(os.getpid(), number)
    meet("never")  # as a save does that waits for its partner
"""


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_or_stopped_while_the_other_waits(killed, number, tmp_path):
    """Neither an abort nor a wait of minutes; the coordinator's end too, and its silence."""
    command = [sys.executable, "-c", MEMBER]
    arguments = [str(free_port()), str(killed), str(tmp_path), str(int(number))]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    both = [
        subprocess.Popen([*command, str(i), *arguments], stderr=subprocess.PIPE, text=True, env=env) for i in (0, 1)
    ]
    error = both[1 - killed].communicate(timeout=120)[1]
    both[killed].kill()  # it is stopped yet
    both[killed].communicate()
    assert [both[killed].returncode, both[1 - killed].returncode] == [-signal.SIGKILL, 76], error
    last = error.strip().splitlines()[-1]
    assert last.startswith("exit 76: process ") and ("1 of the run" if killed else "0, ") in last
    if killed:
        assert '"step": 7' in (tmp_path / "STATUS").read_text()
