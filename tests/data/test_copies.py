"""Copies of what lies elsewhere stay while they are read; caches that others share heal, and are not removed in use."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mixtral_jax import launch
from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare import PreparedData, entries, prepare
from mixtral_jax.data.prepare.cache import use_file
from mixtral_jax.data.prepare.tokenise import process_tokenizer
from mixtral_jax.data.reader import RowReader
from mixtral_jax.data.records import file_size, staging_room, text_size_estimate
from mixtral_jax.data.records.files import local_copy
from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train.commands import evaluate
from mixtral_jax.train.preference import references
from tests.prepared import MODEL

LINES = "".join(json.dumps({"text": f"document {i} says {i % 7}"}) + "\n" for i in range(60)).encode()


class Counted(MemoryFileSystem):
    """Memory that counts who looks, and may not say how long a file is."""

    protocol = "counted"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    looks: Counter[str] = Counter()
    silent = False

    def info(self, path: str, **options: Any) -> Any:
        self.looks[path] += 1
        known = super().info(path, **options)
        return {**known, "size": None} if self.silent and known["type"] == "file" else known


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_STAGING", json.dumps([str(tmp_path / "staging"), None]))
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.silent = False
    for kind in (Counted, MemoryFileSystem):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Counted.looks.clear()


def prepared(tmp_path: Path, cache: str, seed: int = 0, host: str = "", path: str = "") -> PreparedData:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    config = DataConfig(
        tokenizer=str(MODEL), train=[{"name": "s", "path": path or str(tmp_path / "a.jsonl")}], cache_dir=cache,
        staging_dir=str(tmp_path / f"staging{host}"), workers=1,
    )  # fmt: skip
    return prepare(config, 32, seed, progress=False)


def put(address: str, content: bytes) -> str:
    with fsspec.open(address, "wb") as out:
        out.write(content)
    return address


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with less than a tenth free."""
    usage = SimpleNamespace(total=10**9, used=0, free=10**7)
    monkeypatch.setattr("mixtral_jax.data.records.staging.shutil.disk_usage", lambda _: usage)


@pytest.mark.usefixtures("full")
def test_a_tokenizer_of_several_files_is_read_on_a_full_disk() -> None:
    put("memory://tok/tokenizer.model", MODEL.read_bytes())
    put("memory://tok/tokenizer_config.json", b"{}")
    put("memory://tok/generation_config.json", b'{"eos_token_id": 2}')
    assert load_tokenizer("memory://tok").fingerprint() == load_tokenizer(MODEL).fingerprint()


@pytest.mark.usefixtures("full")
def test_a_copy_stays_while_it_is_used_and_may_go_then() -> None:
    first, second, third = (put(f"memory://many/{i}", b"12345") for i in range(3))
    with local_copy(first) as copy:
        with local_copy(second) as other:
            assert Path(copy).read_bytes() == b"12345"
        with local_copy(third):
            assert not Path(other).exists()
        assert Path(copy).exists()
    with local_copy(second):
        assert not Path(copy).exists()


def test_a_tokenizer_that_is_another_one_by_now_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was changed while"):
        process_tokenizer(str(MODEL), "of another one")


def test_a_shard_that_is_gone_from_a_bucket_heals_by_the_remedy(tmp_path: Path) -> None:
    name = Path(prepared(tmp_path, "memory://cache").train[0].directory).name
    fs = fsspec.filesystem("memory")
    [shard] = [path for path in fs.find(f"/cache/{name}") if path.endswith("array_record")]
    fs.rm_file(shard)
    reader = RowReader(prepared(tmp_path, "memory://cache", host="-b").train)
    with pytest.raises(OSError, match=f"data cache rm {name} --cache-dir memory://cache,"):
        reader.read(0, 0)
    reader.close()
    assert launch.main(["data", "cache", "rm", name, "--cache-dir", "memory://cache", "--yes"]) == 0
    again = RowReader(prepared(tmp_path, "memory://cache", host="-b").train)
    assert again.read(0, 0).tokens.size
    again.close()


def test_documents_that_are_not_what_they_were_are_removed_wherever_they_are(tmp_path: Path) -> None:
    prepared(tmp_path, "memory://cache")
    fs = fsspec.filesystem("memory")
    for path in fs.find("/cache"):
        if path.endswith("meta.json") and (meta := json.loads(fs.cat_file(path)))["kind"] == "documents":
            meta["census"]["counts"]["stored"] += 1
            fs.pipe_file(path, json.dumps(meta).encode())
    with pytest.raises(ValueError, match="run again"):
        prepared(tmp_path, "memory://cache", seed=1, host="-b")
    assert prepared(tmp_path, "memory://cache", seed=1, host="-b").train[0].rows


def test_the_remedy_for_a_damaged_shard_names_the_cache(tmp_path: Path) -> None:
    source = prepared(tmp_path, str(tmp_path / "cache")).train[0]
    Path(source.paths[0]).write_bytes(b"nothing")
    reader = RowReader([source])
    with pytest.raises(OSError, match=f"rm {Path(source.directory).name} --cache-dir {tmp_path}/cache,"):
        reader.read(0, 0)
    reader.close()


def test_uploads_underway_are_not_taken_for_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = put("memory://cache/0123456789abcdef01234567/rows.array_record", b"half of it")
    assert launch.main(["data", "cache", "rm", "--unfinished", "--cache-dir", "memory://cache", "--yes"]) == 2
    assert "uploaded at this moment" in capsys.readouterr().err
    assert fsspec.filesystem("memory").exists(part)


def test_rows_of_a_run_that_starts_are_in_use(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    data = prepared(tmp_path, cache)
    remove = ["data", "cache", "rm", "--all", "--cache-dir", cache, "--yes"]
    assert launch.main(remove) == 2
    assert Path(data.train[0].directory).exists()
    place = data.train[0].directory
    del data
    assert launch.main(remove) == 0
    assert not Path(place).exists()


def test_hashes_and_references_have_a_last_use(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = prepared(tmp_path, str(cache)).train[0]
    old = time.time() - 90 * 86400

    def numbers() -> dict[str, np.ndarray]:
        ask = lambda batch: SimpleNamespace(ref_logps=np.zeros((1, 4, 0, 2), np.float32))  # noqa: E731 - one answer
        return references.precomputed([source], ask, {"of": 1}, str(cache), 4, (0, 1), lambda _: None)

    numbers()
    for path in [*cache.rglob("*")]:
        os.utime(path, (old, old))
    assert all(time.time() - (e.used or 0) > 86400 for e in entries(str(cache)))
    prepared(tmp_path, str(cache))
    numbers()
    recent = {e.kind for e in entries(str(cache)) if time.time() - (e.used or 0) < 600}
    assert recent == {"hashes", "references", "rows"}
    assert use_file(cache, next(e.id for e in entries(str(cache)) if e.kind == "references")).exists()


def test_a_server_that_does_not_say_how_long_a_file_is(tmp_path: Path) -> None:
    Counted.silent = True
    path = put("counted://web/a.jsonl", LINES)
    assert text_size_estimate([path]) == file_size(path) == len(LINES)


def test_a_file_elsewhere_is_looked_up_once_a_start(tmp_path: Path) -> None:
    path = put("counted://web/a.jsonl", LINES)
    Counted.looks.clear()
    prepared(tmp_path, str(tmp_path / "cache"), path=path)
    assert sum(Counted.looks.values()) <= 3  # at first, and whether it was changed while it was read
    Counted.looks.clear()
    prepared(tmp_path, str(tmp_path / "cache"), path=path)
    assert sum(Counted.looks.values()) == 1


def test_evaluation_stages_where_the_run_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(staging_dir=str(tmp_path / "elsewhere"), staging_bytes=None, validation=())
    monkeypatch.setattr(evaluate, "with_tokenizer", lambda config, _: config)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate.measure("none", SimpleNamespace(data=data))  # type: ignore[arg-type] - as far as it is read
    assert staging_room()[0] == tmp_path / "elsewhere"
