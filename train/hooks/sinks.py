"""Where metrics go: metrics.jsonl always; TensorBoard and W&B as asked."""

import contextlib
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mixtral_jax.data.prepare import write_atomically

Metrics = Mapping[str, float | None]


class Sink(Protocol):
    """Where metrics go."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One object a line, `step` first. NaN and infinities are written as NaN, Infinity, -Infinity."""

    def __init__(self, path: Path, start_step: int = 0, attempt: int | None = None, again: tuple[str, ...] = ()):
        """Goes on behind `start_step`, of which lines with a key that begins like `again` will be written again.

        With an `attempt` each line says it, and the `time` in seconds since 1970.
        """
        _keep_lines_until(path, start_step, again)
        self._attempt = attempt
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        stamp = {} if self._attempt is None else {"time": round(time.time(), 3), "attempt": self._attempt}
        try:
            self._file.write(json.dumps({"step": step, **stamp, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)  # a full disk names no file
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that `write` has raised for
            self._file.close()


class TensorBoard:
    """Events in a directory; those of later steps that an earlier attempt left there are not shown.

    Written here and not by tensorboardX's own thread: where a disk is full that ends, and who waits for it hangs.
    """

    FLUSH_SECONDS = 60.0

    def __init__(self, directory: Path, start_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter  # 0.3 s to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"  # else two files of one second have one name, and the second replaces the first
        self._event, self._file = Event, EventsWriter(str(directory / "events"), filename_suffix=suffix)
        started = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=started))
        self._flushed = -math.inf

    def write(self, step: int, metrics: Metrics) -> None:
        event = self._event(wall_time=time.time(), step=step)
        for name, value in metrics.items():
            if value is not None:
                event.summary.value.add(tag=name, simple_value=value)
        self._file.write_event(event)
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


class Wandb:
    """Weights & Biases: one run for one run directory, however often that is started again.

    W&B drops a row whose own step is not behind all before it, offline too, where each start has a file of its own. So
    its step counts rows, over all starts, and ours is a value of the row that the charts are drawn over.
    """

    AHEAD = 1000  # rows whose numbers are taken before they are used, so that the file is seldom written

    def __init__(self, directory: Path, settings: Mapping[str, Any], run_name: str, config: Mapping[str, Any]):
        import wandb  # 1 s to import, and off by default

        os.environ.setdefault("WANDB_SILENT", "true")
        self._file = directory / "wandb" / "resume.json"
        self._file.parent.mkdir(exist_ok=True)
        try:
            known = json.loads(self._file.read_text())
            self._id, self._rows = str(known["id"]), int(known["rows"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._id, self._rows = secrets.token_hex(4), 0
        self._taken = self._rows
        self._take()
        self._run = wandb.init(
            dir=str(directory), id=self._id, resume="allow", name=run_name, config=dict(config), **settings
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Metrics) -> None:
        if self._rows == self._taken:
            self._take()
        row = {"step": step} | {k: v for k, v in metrics.items() if v is not None}
        self._run.log(row, step=self._rows, commit=True)
        self._rows += 1

    def close(self) -> None:
        self._run.finish()

    def _take(self) -> None:
        self._taken += self.AHEAD
        write_atomically(self._file, json.dumps({"id": self._id, "rows": self._taken}) + "\n")


class Writer:
    """metrics.jsonl, which must work (None: not on this process), and trackers; one that fails is dropped."""

    def __init__(self, jsonl: JsonLines | None, trackers: Iterable[Sink] = ()):
        self._jsonl, self._trackers = jsonl, list(trackers)

    def write(self, step: int, metrics: Metrics) -> None:
        """One line in metrics.jsonl, and the same values to every tracker."""
        if self._jsonl is not None:
            self._jsonl.write(step, metrics)
        for tracker in list(self._trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.write(step, metrics)

    def close(self) -> None:
        for tracker in list(self._trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.close()
        if self._jsonl is not None:
            self._jsonl.close()

    @contextlib.contextmanager
    def _dropped_if_it_fails(self, tracker: Sink) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.remove(tracker)
            name = type(tracker).__name__
            warnings.warn(f"{name} failed ({error}); training goes on without it", stacklevel=2)


def open_trackers(makers: Iterable[Callable[[], Sink]]) -> list[Sink]:
    """Those that can be opened; of the others a warning."""
    trackers = []
    for make in makers:
        try:
            trackers.append(make())
        except Exception as error:
            warnings.warn(f"a tracker failed ({error}); training goes on without it", stacklevel=2)
    return trackers


def _keep_lines_until(path: Path, step: int, again: tuple[str, ...]) -> None:
    """Drop what a killed run logged after the checkpoint that is resumed from, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
            comes_again = found["step"] == step and any(key.startswith(again) for key in found)
            if found["step"] <= step and not comes_again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))
