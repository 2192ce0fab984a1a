"""Joining the other processes of a run within a time, or one sentence about who is missing.

jax's own client would end this process by an abort where nobody answers, and its server by a segmentation fault where
the port is taken: so both are tried by hand first.
"""

import contextlib
import ctypes
import errno
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mixtral_jax.train.errors import AGAIN, ExitCode, PeerLost, UserError

_GONE_SECONDS = 2.0  # a process that is killed still holds its port for a moment
_RETRY_SECONDS, _PORT_SECONDS = 0.5, 10.0  # the coordinator of a run that has just ended may still hold the port
_DEVICES_SECONDS = 30.0  # the least in which all processes see each other's devices
# what every client of HTTP/2 begins with, and the type of the frame that a server answers with
_HELLO, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), 4


def join(address: str, count: int, process_id: int, timeout: float, local_device_ids: Any = None) -> None:
    """Call `jax.distributed.initialize` once it is known that it can succeed.

    Raises:
        UserError: the address is none.
        PeerLost: the coordinator's port is taken, it does not answer within `timeout` seconds, or others do not come.
    """
    host, port = parse_address(address)
    began = time.monotonic()
    if process_id == 0:
        check_free(port, min(timeout, _PORT_SECONDS))
    else:
        check_answers(host, port, timeout)
    import jax  # after the environment was read: importing it takes a second that a usage error need not wait for
    from jax._src.lib import _jax  # has no public name

    left = max(1, round(timeout - (time.monotonic() - began)) - 5)  # jax waits for 5 s longer
    make = _jax.get_distributed_runtime_client
    # With a callback of Python's the client raises where it would abort; which one does not matter, it is not reached.
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda status: None)
    try:
        jax.distributed.initialize(
            address, count, process_id, local_device_ids=local_device_ids, initialization_timeout=left
        )
    except RuntimeError as error:
        raise PeerLost(
            f"not all {count} processes of this run came to {address} within {timeout:g} s (--timeout): "
            "start all of them, with the same address and number"
        ) from error
    finally:
        _jax.get_distributed_runtime_client = make
    if process_id:
        _end_in_order(host, port)
    with _ended_after(max(timeout, _DEVICES_SECONDS), f"a process that had come to {address} is lost; {AGAIN}"):
        jax.devices()  # all wait here for each other's


@contextlib.contextmanager
def _ended_after(seconds: float, reason: str) -> Iterator[None]:
    """What waits in jax, which nothing interrupts, ends with 76 by then; jax itself would abort after 100 s."""

    def end() -> None:
        os.write(2, f"\nexit {ExitCode.PEER_LOST}: {reason}\n".encode())
        os._exit(ExitCode.PEER_LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, [IPV6]:PORT too."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    strange = any(c.isspace() or c in "/[]" or (c == ":" and bare == host) for c in bare)
    if not bare or strange or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"the coordinator's address is {address!r}: HOST:PORT is expected, with a port below 65536")
    return bare, int(port)


def check_free(port: int, timeout: float) -> None:
    """Bind the port as the coordinator will, for a moment."""

    def bind() -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            pass

    if (error := _until(bind, timeout)) is not None:
        what = "is taken by another process" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"
        raise PeerLost(f"the coordinator's port {port} {what} on this machine: choose another one for all processes")


def check_answers(host: str, port: int, timeout: float) -> None:
    """Speak to what should be the coordinator until it answers as one would."""

    def speak() -> None:
        with socket.create_connection((host, port), timeout=min(timeout, 10.0)) as peer:
            peer.sendall(_HELLO)
            answer = peer.recv(9)
        if len(answer) < 4 or answer[3] != _SETTINGS:
            raise OSError(errno.EPROTO, "what answers there is no coordinator")

    if (error := _until(speak, timeout)) is not None:
        raise PeerLost(
            f"process 0, the coordinator, did not answer at {host}:{port} within {timeout:g} s (--timeout; the last "
            f"attempt: {error.strerror or error}): is it started, and the address right?"
        )


def _until(attempt: Callable[[], None], timeout: float) -> OSError | None:
    """Try again and again; what was wrong the last time, if it never went well."""
    end = time.monotonic() + timeout
    while True:
        try:
            attempt()
            return None
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > end:
                return error
            time.sleep(_RETRY_SECONDS)


def _end_in_order(host: str, port: int) -> None:
    """Where the coordinator goes, jax's client aborts at once, from a thread that no Python code sees: end with 76."""

    def aborted(number: int) -> None:
        try:
            check_answers(host, port, _GONE_SECONDS)  # then something else is wrong, and the abort goes on
        except PeerLost:
            os.write(2, f"\nexit {ExitCode.PEER_LOST}: process 0, the coordinator at {host}:{port}, is gone\n".encode())
            os._exit(ExitCode.PEER_LOST)

    global _handler  # the system keeps its address only
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


_handler: Any = None
