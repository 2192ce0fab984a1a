"""Fingerprints of files, small atomic files, and the lock."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from mixtral_jax.data.prepare.cache import digest, load_prepared, locked, write_atomically
from mixtral_jax.data.prepare.hashes import content_hash

ROOT = Path(__file__).resolve().parents[2]


def test_content_hash_names_the_content_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"text")
    expected = [["", 4, sha256(b"text").hexdigest()]]
    assert content_hash(str(tmp_path / "a"), tmp_path / "cache") == expected
    assert content_hash(str(tmp_path / "b"), tmp_path / "cache") == expected


def test_content_hash_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "set" / "sub" / "x").write_bytes(b"1")
    (tmp_path / "set" / "a").write_bytes(b"2")
    found = content_hash(str(tmp_path / "set"), tmp_path / "cache")
    assert [name for name, _, _ in found] == ["a", "sub/x"]


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = content_hash(str(path), tmp_path / "cache")
    opened = []
    original = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a[0]) or original(*a, **k))
    assert content_hash(str(path), tmp_path / "cache") == first
    assert str(path) not in opened
    path.write_bytes(b"two")
    assert content_hash(str(path), tmp_path / "cache") != first
    assert str(path) in opened


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_writing_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for text in ("old", "néw"):
        write_atomically(tmp_path / "f", text)
        assert (tmp_path / "f").read_text() == text
    assert os.listdir(tmp_path) == ["f"]


def test_nothing_is_no_prepared_source(tmp_path: Path) -> None:
    assert load_prepared(tmp_path, "a", "0" * 64) is None
    (tmp_path / ("0" * 24)).mkdir()
    (tmp_path / ("0" * 24) / "meta.json").write_text("[]")
    assert load_prepared(tmp_path, "a", "0" * 64) is None


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from mixtral_jax.data.prepare.cache import locked\n"
        "with locked(Path(sys.argv[1]), '', print): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    said: list[str] = []

    def say_and_kill(message: str) -> None:
        said.append(message)
        process.kill()

    with locked(tmp_path / "lock", "waiting", say_and_kill):
        assert said == ["waiting"]
    process.communicate()
    with locked(tmp_path / "lock", "waiting", said.append):
        assert said == ["waiting"]
