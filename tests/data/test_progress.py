"""Progress where stderr is no terminal: plain lines, not many."""

import pytest

from mixtral_jax.data import progress
from mixtral_jax.data.progress import meter


def test_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with meter("Working", 100) as advance:
        for _ in range(25):
            clock[0] += 1
            advance(5, "fr")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Working: 55 % fr", "Working: 99 % fr"]  # the size was only an estimate


def test_nothing_when_not_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1.0)
    with meter("Working", 100, show=False) as advance:
        advance(50, "")
    assert capsys.readouterr().err == ""
