"""Signals that ask a run to stop, and those that are none of its business."""

import os
import signal

import pytest

from mixtral_jax.train.run.signals import Interrupts


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_each_of_them_stops_after_the_step(name, monkeypatch):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)  # whoever started the tests may ignore it: nohup
    monkeypatch.setattr(os, "write", closed_terminal)
    try:
        with Interrupts() as interrupts:
            assert interrupts.requested(1) is None
            signal.raise_signal(number)
            assert interrupts.requested(2) == name
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def closed_terminal(*_):
    raise OSError(5, "Input/output error")


def test_what_is_ignored_or_taken_stays_so():
    """`nohup` ignores SIGHUP, and somebody else may listen to SIGUSR1."""
    heard = []
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))]
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            assert interrupts.requested(1) is None and heard == [1]
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])
