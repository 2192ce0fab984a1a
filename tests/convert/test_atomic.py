"""A killed conversion leaves nothing that looks finished, and the next one works."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from mixtral_jax.convert import hf2orbax, orbax2hf
from mixtral_jax.convert.atomic import new_directory
from tests.convert_files import TINY, assert_same_bytes, random_tensors, read_hub, write_hub

# The child slows every piece down, says when it is in the middle, and is then killed.
CHILD = """
import sys, time
from mixtral_jax.convert import pipeline, stream
inner = stream.copy
def slow(source, sink, dtype_of, advance, **options):
    def tell(n):
        advance(n)
        print("piece", flush=True)
        time.sleep(0.05)
    return inner(source, sink, dtype_of, tell, **options)
pipeline.copy = slow
getattr(pipeline, sys.argv[1])(sys.argv[2], sys.argv[3], force=True, progress=False)
"""


@pytest.mark.parametrize("way", ["hf2orbax", "orbax2hf"])
@pytest.mark.parametrize("replaces", [False, True])
def test_kill_and_rerun(tmp_path, root, way, replaces):
    tensors = random_tensors(TINY)
    hub = write_hub(tmp_path / "hf", TINY, tensors)
    hf2orbax(hub, tmp_path / "orbax", progress=False)
    src, dst = (hub, tmp_path / "dst") if way == "hf2orbax" else (tmp_path / "orbax", tmp_path / "dst")
    if replaces:
        dst.mkdir()
        (dst / "old").write_text("whole")
    before = set(os.listdir(tmp_path))
    command = [sys.executable, "-c", CHILD, way, str(src), str(dst)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        for _ in range(5):
            assert child.stdout.readline() == "piece\n"
        child.send_signal(signal.SIGKILL)
    assert set(os.listdir(tmp_path)) - before == {".dst.incomplete"}
    assert os.listdir(dst) == ["old"] if replaces else not dst.exists()
    assert not (tmp_path / ".dst.incomplete" / "config.json").exists()
    (hf2orbax if way == "hf2orbax" else orbax2hf)(src, dst, force=replaces, progress=False)
    assert set(os.listdir(tmp_path)) == before | {"dst"}
    if way == "hf2orbax":
        orbax2hf(dst, tmp_path / "back", progress=False)
    assert_same_bytes(read_hub(tmp_path / "back" if way == "hf2orbax" else dst), tensors)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "dst", needed_bytes=1, force=False) as work:
        work.write_bytes("half", b"done")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_the_old_directory_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "old").touch()
    with new_directory(tmp_path / "dst", needed_bytes=1, force=True) as work:
        work.write_bytes("new", b"")
        assert os.listdir(tmp_path / "dst") == ["old"]
    assert os.listdir(tmp_path / "dst") == ["new"]
    assert os.listdir(tmp_path) == ["dst"]


def test_without_exchange_the_old_one_is_removed_first(tmp_path, monkeypatch):
    from mixtral_jax.convert import atomic

    def refuse(a, b):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(atomic, "_exchange", refuse)
    (tmp_path / "dst").mkdir()
    with new_directory(tmp_path / "dst", needed_bytes=1, force=True) as work:
        work.write_bytes("new", b"")
    assert os.listdir(tmp_path / "dst") == ["new"]


def test_two_writers_of_one_destination(tmp_path):
    work = tmp_path / ".dst.incomplete"
    work.mkdir()
    other = os.open(work, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with (
        pytest.raises(ValueError, match="is being written by another process"),
        new_directory(tmp_path / "dst", needed_bytes=1, force=False),
    ):
        pass
    os.close(other)


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = tmp_path / ".dst.incomplete"
    (left / "params").mkdir(parents=True)
    (left / "config.json").write_text("{}")
    with new_directory(tmp_path / "dst", needed_bytes=1, force=False) as work:
        assert work.names() == [] and os.listdir(left) == []
    assert os.listdir(tmp_path / "dst") == []
