"""`data cache ls` and `rm`: what is shown, what goes, and what stays because somebody uses it."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax import launch
from mixtral_jax.data.prepare import PreparedSource, entries
from mixtral_jax.data.prepare.cache import locked, use_file
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.reader import RowReader
from tests.prepared import ROOT, config_of, prepare_one
from tests.tiny import write_run_file

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXTRAL_JAX_STAGING", json.dumps([str(tmp_path / "staging"), None]))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def source(cache: Path) -> PreparedSource:
    return prepare_one(config_of(cache))


@pytest.fixture
def call(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = launch.main(["data", "cache", *words, "--cache-dir", str(cache)])
        return (code, *capsys.readouterr())

    return run


def listed(call: Call) -> dict[str, dict[str, Any]]:
    """Entries by kind."""
    code, out, _ = call("ls", "--json")
    assert code == 0
    return {entry["kind"]: entry for entry in json.loads(out)["entries"]}


def test_what_a_cache_holds_is_listed(cache: Path, source: PreparedSource, call: Call) -> None:
    found = listed(call)
    assert set(found) == {"rows", "documents", "hashes"}
    rows = found["rows"]
    assert rows["id"] == source.fingerprint[:24]
    assert rows["state"] == "whole"
    for words in ("source fr", "fr.val.jsonl.gz", "tokenizer.model", "seq_len 64", "seed 0", "packing concat"):
        assert words in rows["made_of"]
    assert rows["bytes"] == sum(f.stat().st_size for f in Path(source.directory).iterdir())
    assert abs(rows["made"] - time.time()) < 600
    code, out, _ = call("ls")
    assert code == 0
    assert f"{source.fingerprint[:8]}" in out
    assert out.splitlines()[-1].startswith(f"{cache}: 3 entries, ")


def test_the_cache_of_a_run_file_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    file = write_run_file(tmp_path)
    assert launch.main(["data", "cache", "ls", str(file)]) == 2
    assert "there is no cache in" in capsys.readouterr().err
    cache.mkdir(exist_ok=True)
    assert launch.main(["data", "cache", "ls", str(file)]) == 0
    assert "nothing is there" in capsys.readouterr().out


def test_an_entry_is_removed_by_the_beginning_of_its_id(source: PreparedSource, call: Call) -> None:
    prefix = source.fingerprint[:8]
    code, out, _ = call("rm", prefix, "--dry-run")
    assert code == 0 and "would free 1 entries" in out and Path(source.directory).exists()
    code, _, err = call("rm", prefix)
    assert code == 2 and "say --yes" in err and Path(source.directory).exists()
    code, out, _ = call("rm", prefix, "--yes")
    assert code == 0 and "freed 1 entries" in out
    assert not Path(source.directory).exists()
    assert set(listed(call)) == {"documents", "hashes"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name ids of entries (mixtral-jax data cache ls), or say"),
        (["zz"], "has no entry 'zz'"),
        (["--unused-for", "soon"], "'soon' is no time such as 30d"),
    ],
)
def test_bad_words_remove_nothing(source: PreparedSource, call: Call, words: list[str], said: str) -> None:
    code, _, err = call("rm", *words, "--yes")
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert Path(source.directory).exists()


def test_a_beginning_of_several_ids_is_refused(cache: Path, source: PreparedSource, call: Call) -> None:
    other = cache / (source.fingerprint[:20] + "0000")
    other.mkdir()
    code, _, err = call("rm", source.fingerprint[:8], "--yes")
    assert code == 2 and "is the beginning of 2 ids" in err and other.exists()


def test_what_a_process_reads_stays(source: PreparedSource, call: Call) -> None:
    reader = RowReader([source])
    assert listed(call)["rows"]["state"] == "in use"
    code, _, err = call("rm", source.fingerprint[:8], "--yes")
    assert code == 2 and "is used by a process that lives" in err
    code, _, err = call("rm", "--all", "--yes")
    assert code == 2 and f"{source.fingerprint[:24]} of" in err and "stays" in err
    assert Path(source.directory).exists()
    assert set(listed(call)) == {"rows"}
    reader.read(0, 0)
    reader.close()
    assert call("rm", "--all", "--yes")[0] == 0
    assert listed(call) == {}


def test_what_another_process_reads_stays_until_it_is_killed(source: PreparedSource, call: Call) -> None:
    program = (
        "import sys, time; from mixtral_jax.data.loader import RowReader\n"
        "from mixtral_jax.data.prepare.cache import PreparedSource\n"
        "reader = RowReader([PreparedSource.model_validate_json(sys.argv[1])]); print('reads', flush=True)\n"
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", program, source.model_dump_json()]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "reads\n"
    assert call("rm", source.fingerprint[:8], "--yes")[0] == 2
    process.kill()
    process.communicate()
    assert call("rm", source.fingerprint[:8], "--yes")[0] == 0


def test_what_is_being_prepared_stays_and_what_was_left_behind_goes(cache: Path, call: Call) -> None:
    prepare(config_of(cache), 64, 0, part=(1, 2), progress=False)
    (parts,) = cache.glob("*.parts-of-2")
    left = cache / f"{parts.name[:24]}.part-2-of-2.tmp-00000000-1234"
    left.mkdir()
    with locked(cache / "locks" / f"{parts.name[:24]}.part-2-of-2"):
        assert call("rm", "--unfinished", "--yes")[0] == 0
        assert parts.exists() and left.exists()
    found = listed(call)
    assert found["documents"]["state"] == "unfinished" and "parts 1 of 2" in found["documents"]["made_of"]
    assert call("rm", "--unfinished", "--yes")[0] == 0
    assert not parts.exists() and not left.exists()


def test_what_was_not_used_for_long_goes(cache: Path, source: PreparedSource, call: Call) -> None:
    other = prepare_one(config_of(cache), seed=1)
    long_ago = time.time() - 40 * 86400
    for path in (use_file(cache, source.fingerprint[:24]), Path(source.directory) / "meta.json"):
        os.utime(path, (long_ago, long_ago))
    code, out, _ = call("rm", "--unused-for", "30d", "--yes", "--json")
    assert code == 0 and json.loads(out)["removed"] == [source.fingerprint[:24]]
    assert Path(other.directory).exists()


def test_use_is_noted_and_a_cache_that_cannot_be_written_is_read(cache: Path, source: PreparedSource) -> None:
    stamp = use_file(cache, source.fingerprint[:24])
    os.utime(stamp, (0, 0))
    RowReader([source]).close()
    assert time.time() - stamp.stat().st_mtime < 600
    stamp.unlink()
    stamp.mkdir()  # nothing can be opened there
    reader = RowReader([source])
    reader.read(0, 0)
    reader.close()


def test_what_is_no_entry_is_left_alone_and_other_formats_are_named(cache: Path, call: Call) -> None:
    prepare_one(config_of(cache))
    for name in ("compiled", "notes"):
        (cache / name).mkdir()
    old = cache / ("ab" * 12)
    old.mkdir()
    (old / "meta.json").write_text(json.dumps({"version": 1, "fingerprint": "ab" * 32, "format": {"seq_len": 8}}))
    code, out, _ = call("ls", "--json")
    found = {entry["id"]: entry["state"] for entry in json.loads(out)["entries"]}
    assert code == 0 and found[old.name] == "of format 1"
    assert "compiled" not in found
    assert call("rm", "--all", "--yes")[0] == 0
    assert sorted(p.name for p in cache.iterdir()) == ["compiled", "locks", "notes"]


def test_entries_that_others_remove_meanwhile_are_passed_over(
    cache: Path, source: PreparedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each look at an entry: another process removes it just before."""
    shutil.copytree(cache, cache.with_name("all"))
    whole, looks = len(entries(str(cache))), [(Path, "stat"), (Path, "read_bytes"), (os, "walk"), (os, "stat")]
    for owner, name in looks:
        original, done = getattr(owner, name), []

        def look(at: Any, *a: Any, _original: Any = original, _done: list[Any] = done, **k: Any) -> Any:
            if source.directory in str(at) and not _done:
                _done.append(at)
                shutil.rmtree(source.directory)
            return _original(at, *a, **k)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, look)
            assert whole - 1 <= len(entries(str(cache))) <= whole
        assert done
        shutil.rmtree(cache)
        shutil.copytree(cache.with_name("all"), cache)


def test_an_entry_that_is_a_link_to_another_disk_goes(tmp_path: Path, source: PreparedSource, call: Call) -> None:
    place = Path(source.directory)
    place.rename(tmp_path / "disk")
    place.symlink_to(tmp_path / "disk")
    assert call("rm", place.name, "--yes")[0] == 0
    assert not [other for other in place.parent.iterdir() if other.name.startswith(place.name)]
    assert (tmp_path / "disk" / "meta.json").exists()


def test_one_entry_that_may_not_be_read_hides_no_other(
    cache: Path, source: PreparedSource, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(at: Path) -> bytes:
        if source.directory in str(at):
            raise PermissionError(errno.EACCES, "Permission denied", str(at))
        return original(at)

    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", refuse)
    states = {entry.id: entry.state for entry in entries(str(cache))}
    assert states.pop(Path(source.directory).name) == "not readable"
    assert set(states.values()) == {"whole"}
    code, out, _ = call("rm", "--unused-for", "0d", "--dry-run")
    assert (code, source.directory[-24:] in out) == (0, False)
