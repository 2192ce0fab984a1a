"""Sources, tokenizers and caches behind addresses: fetched once, whole or not at all, and told apart from mistakes."""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import PreparedData, entries, prepare
from mixtral_jax.data.reader import RowReader
from mixtral_jax.data.records import Census, choose, files, read_lumps, stage_in, staging_room
from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train.errors import ExitCode, failure_of
from tests.prepared import MODEL, SAMPLES, records_of
from tests.webserver import Web, serve

SEQ_LEN = 32
TEXTS = [f"document {i} says héllo {i % 7} times" for i in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Flaky(MemoryFileSystem):
    """Memory that does not answer a number of times."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    failures = 0

    @classmethod
    def fail(cls) -> None:
        if cls.failures:
            Flaky.failures -= 1
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    def info(self, path: str, **options: Any) -> Any:
        self.fail()
        return super().info(path, **options)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> Any:
        self.fail()
        return super().get_file(rpath, lpath, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        self.fail()
        return super().put_file(lpath, rpath, **options)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_STAGING", json.dumps([str(tmp_path / "staging"), None]))
    monkeypatch.setattr("mixtral_jax.data.records.staging.PAUSES", (0.0, 0.0, 0.0))
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    files.ask_anew()
    Flaky.failures = 0
    Flaky.store.clear()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "web").mkdir()
    with serve(tmp_path / "web") as found:
        yield found


def config_of(path: str, tmp_path: Path, host: str = "", **options: Any) -> DataConfig:
    values: dict[str, Any] = {
        "tokenizer": str(MODEL), "train": [{"name": "s", "path": path}], "cache_dir": str(tmp_path / f"cache{host}"),
        "staging_dir": str(tmp_path / f"staging{host}"), "workers": 1,
    }  # fmt: skip
    return DataConfig(**(values | options))


def prepared(config: DataConfig, seed: int = 0, **options: Any) -> PreparedData:
    return prepare(config, SEQ_LEN, seed, progress=False, **options)


def rows_of(data: PreparedData) -> list[list[int]]:
    """All rows, through the reader that a run has."""
    reader = RowReader(data.train)
    found = [reader.read(0, row).tokens.tolist() for row in range(data.train[0].rows)]
    reader.close()
    return found


def expected(tmp_path: Path) -> list[list[int]]:
    (tmp_path / "here.jsonl").write_bytes(LINES)
    return rows_of(prepared(config_of(str(tmp_path / "here.jsonl"), tmp_path, "-here")))


def texts_of(source: SourceConfig, column: str = "text") -> list[str]:
    census = Census(skip=False)
    return [
        record[column]
        for file in choose(source).files
        for lump in read_lumps(source, file, (column,), census)
        for _, record in lump.parse(census)
    ]


# --- sources ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "a.array_record", "a.jsonl?download=true"])
def test_a_source_on_a_web_server_is_read_whole_and_once(tmp_path: Path, web: Web, name: str) -> None:
    place = tmp_path / "web" / name.partition("?")[0]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": TEXTS}), place)
    elif name.endswith("array_record"):
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(place), "group_size:1")
        for text in TEXTS:
            writer.write(text.encode())
        writer.close()
    else:
        place.write_bytes(json.dumps([{"text": t} for t in TEXTS]).encode() if name.endswith(".json") else LINES)
    data = prepared(config_of(web / name, tmp_path))
    (tmp_path / "copy").mkdir()
    shutil.copy(place, tmp_path / "copy" / place.name)
    here = prepared(config_of(str(tmp_path / "copy" / place.name), tmp_path, "-here"))
    assert rows_of(data) == rows_of(here)
    assert data.train[0].fingerprint == here.train[0].fingerprint
    assert web.asked[f"GET /{name}"] == 1  # by looks, hash and tokeniser together


@pytest.mark.parametrize("faults", [["busy"], ["drop"], ["drop", "busy", "short"]], ids=" ".join)
def test_a_server_that_fails_for_a_while_is_asked_again(tmp_path: Path, web: Web, faults: list[str]) -> None:
    (tmp_path / "web" / "a.jsonl").write_bytes(LINES)
    web.faults += faults
    assert rows_of(prepared(config_of(web / "a.jsonl", tmp_path))) == expected(tmp_path)
    assert web.faults == []


def test_a_server_is_asked_little(tmp_path: Path, web: Web) -> None:
    (tmp_path / "web" / "a.jsonl").write_bytes(LINES)
    for looks in (2, 1):  # before and after it is read; and of one that is prepared already
        prepared(config_of(web / "a.jsonl", tmp_path))
        assert web.asked.pop("HEAD /a.jsonl") == looks
    assert web.asked == {"GET /a.jsonl": 1}


def test_a_server_that_fails_for_good_is_a_failure_of_storage(tmp_path: Path, web: Web) -> None:
    (tmp_path / "web" / "a.jsonl").write_bytes(LINES)
    web.faults += ["drop"] * 50
    with pytest.raises(OSError) as raised:
        prepared(config_of(web / "a.jsonl", tmp_path))
    failure = failure_of(raised.value)
    assert failure.exit_code == ExitCode.STORAGE
    assert f"{web / 'a.jsonl'}: does not answer" in failure.reason
    assert "again" in failure.remedy
    assert not list((tmp_path / "staging").rglob("*.jsonl*"))  # no half of it


def test_nobody_at_the_address_is_a_failure_of_storage_and_no_file_a_mistake(tmp_path: Path, web: Web) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        prepared(config_of(web / "nothing.jsonl", tmp_path))
    with pytest.raises(ValueError, match=r"nosuch://a/b.jsonl cannot be read: .*nosuch"):
        prepared(config_of("nosuch://a/b.jsonl", tmp_path))
    with pytest.raises(OSError) as raised:
        prepared(config_of("http://127.0.0.1:9/a.jsonl", tmp_path))
    assert failure_of(raised.value).exit_code == ExitCode.STORAGE


def test_directories_that_are_data_sets_are_read_from_an_address(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "set"))
    fsspec.filesystem("memory").put(str(tmp_path / "set"), "/set", recursive=True)
    assert texts_of(SourceConfig(name="s", path="memory://set")) == TEXTS


def test_a_tfds_directory_is_read_from_an_address(tmp_path: Path) -> None:
    from tests.data.test_layouts import WRITERS

    WRITERS["tfds"](tmp_path / "tfds", [{"prompt": text} for text in TEXTS])
    fsspec.filesystem("memory").put(str(tmp_path / "tfds"), "/tfds", recursive=True)
    here, there = (
        texts_of(SourceConfig(name="s", path=p), "prompt") for p in (str(tmp_path / "tfds"), "memory://tfds")
    )
    assert there == here
    assert sorted(here) == sorted(json.dumps(text) for text in TEXTS)


# --- tokenizers ---


@pytest.mark.parametrize("scheme", ["http", "memory"])
@pytest.mark.parametrize("name", ["", "tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_and_its_side_files_come_from_an_address(tmp_path: Path, web: Web, scheme: str, name: str) -> None:
    from tests.tiny import write_byte_tokenizer

    place = tmp_path / "web" / "tok"
    place.mkdir()
    shutil.copy(MODEL, place / "tokenizer.model")
    write_byte_tokenizer(place / "tokenizer.json")
    (place / "chat_template.jinja").write_text("{{ messages }}")
    (place / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    fsspec.filesystem("memory").put(str(place), "/tok", recursive=True)
    address = f"{web.address if scheme == 'http' else 'memory:/'}/tok"
    found, here = (load_tokenizer(f"{where}/{name}".rstrip("/")) for where in (address, place))
    assert found.fingerprint() == here.fingerprint()
    assert (found.files, found.ends, found.chat_template) == (here.files, here.ends, here.chat_template)
    assert all(str(tmp_path) not in note for note in found.notes)


def test_a_tokenizer_that_is_not_there_or_is_none_is_a_mistake(tmp_path: Path, web: Web) -> None:
    (tmp_path / "web" / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{web / 'none.json'} does not exist"):
        load_tokenizer(web / "none.json")
    with pytest.raises(ValueError, match=rf"{web / 'bad.json'} is not a tokenizer.json"):
        load_tokenizer(web / "bad.json")
    with pytest.raises(ValueError, match=rf"{web / 'dir'} holds neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(web / "dir")


# --- caches ---


def test_a_cache_behind_an_address_is_made_by_one_host_and_read_by_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    hosts = [config_of(str(tmp_path / "a.jsonl"), tmp_path, host, cache_dir="memory://cache") for host in "12"]
    first, second = map(prepared, hosts)
    assert (first.fresh, second.fresh) == (True, False)
    copies = tmp_path / "staging2" / "caches"
    assert not list(copies.rglob("*.array_record"))  # nothing before it is asked for
    assert rows_of(first) == rows_of(second) == expected(tmp_path)
    assert list(copies.rglob("*.array_record"))
    assert second.train[0].sizes().sum(axis=0).tolist()[1] == second.train[0].text_bytes


@pytest.mark.usefixtures("small_lumps")
def test_parts_of_machines_that_share_only_the_address(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    hosts = [config_of(str(tmp_path / "a.jsonl"), tmp_path, host, cache_dir="memory://cache") for host in "123"]
    assert prepared(hosts[0], part=(1, 3)).missing_parts == ("s: part-2 of 3", "s: part-3 of 3")
    assert prepared(hosts[1], part=(2, 3)).missing_parts == ("s: part-3 of 3",)
    last = prepared(hosts[2], part=(3, 3))
    here = prepared(config_of(str(tmp_path / "a.jsonl"), tmp_path, "-here"))
    assert rows_of(last) == rows_of(here)
    assert rows_of(prepared(hosts[0])) == rows_of(here)
    assert not [name for name in fsspec.filesystem("memory").find("/cache") if "parts-of" in name]


def test_half_an_upload_is_not_taken_and_is_finished_by_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    first, second = (config_of(str(tmp_path / "a.jsonl"), tmp_path, h, cache_dir="memory://cache") for h in "12")
    data = prepared(first)
    memory = fsspec.filesystem("memory")
    rows = f"/cache/{data.train[0].fingerprint[:24]}"
    for name in memory.find(rows):
        if not name.endswith("sizes.npy"):  # as a host leaves it that is killed while it uploads
            memory.rm_file(name)
    shutil.rmtree(tmp_path / "staging1")
    again = prepared(second)
    assert again.fresh
    assert rows_of(again) == expected(tmp_path)
    memory.rm_file(f"{rows}/meta.json")  # as if its own upload had not been finished
    Path(again.train[0].directory, ".copied").unlink()
    assert not prepared(second).fresh
    assert memory.exists(f"{rows}/meta.json")


def test_a_cache_that_fails_for_a_while_and_for_good(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    config = config_of(str(tmp_path / "a.jsonl"), tmp_path, cache_dir="flaky://cache")
    Flaky.failures = 3
    data = prepared(config)
    assert Flaky.failures == 0
    shutil.rmtree(tmp_path / "staging")
    data = prepared(config)
    Flaky.failures = 1000
    with pytest.raises(OSError) as raised:
        rows_of(data)
    assert failure_of(raised.value).exit_code == ExitCode.STORAGE
    Flaky.failures = 0
    assert rows_of(data) == expected(tmp_path)


def test_a_cache_on_a_web_server_is_read_and_never_written(tmp_path: Path, web: Web) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    made = prepared(config_of(str(tmp_path / "a.jsonl"), tmp_path, cache_dir=str(tmp_path / "web" / "cache")))
    remote = config_of(str(tmp_path / "a.jsonl"), tmp_path, "-2", cache_dir=web / "cache")
    web.faults += ["drop"]
    assert rows_of(prepared(remote)) == rows_of(made)
    with pytest.raises(ValueError, match="does not hold these rows, and web servers are only read from"):
        prepared(remote, seed=1)


def test_copies_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in "abcd":
        memory.pipe_file(f"/many/{name}.txt", name.encode() * 1000)
    stage_in(str(tmp_path / "bounded"), 2500)
    for name in "ababcabd":
        with files.open_file(f"memory://many/{name}.txt") as stream:
            assert stream.read() == name.encode() * 1000
            there = sorted(p.name for p in (tmp_path / "bounded").rglob("*.txt"))
            assert len(there) <= 2
            os.utime(next((tmp_path / "bounded").rglob(f"{name}.txt")))
    assert there == ["b.txt", "d.txt"]


def test_what_is_larger_than_the_bound_is_read_without_a_copy(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/large.txt", b"x" * 5000)
    stage_in(str(tmp_path / "bounded"), 2500)
    with files.open_file("memory://large.txt") as stream:
        assert stream.read() == b"x" * 5000
    assert not list((tmp_path / "bounded").rglob("*.txt"))


def test_a_killed_download_leaves_nothing_that_counts(tmp_path: Path, web: Web) -> None:
    (tmp_path / "web" / "a.txt").write_bytes(b"x" * 1000)
    web.faults += ["drop"] * 4
    with pytest.raises(OSError), files.open_file(web / "a.txt"):
        pass
    assert [p for p in staging_room()[0].rglob("*") if p.name.startswith("a.txt")] == []
    with files.open_file(web / "a.txt") as stream:
        assert len(stream.read()) == 1000


def test_entries_of_a_cache_behind_an_address_are_listed(tmp_path: Path) -> None:
    config = config_of(str(SAMPLES / "fr.val.jsonl.gz"), tmp_path, cache_dir="memory://cache")
    data = prepared(config)
    found = {entry.id: entry for entry in entries("memory://cache")}
    rows = found[data.train[0].fingerprint[:24]]
    assert (rows.kind, rows.state, rows.used) == ("rows", "whole", None)
    assert {entry.kind for entry in found.values()} == {"rows", "documents", "hashes"}
    assert records_of(data.train[0])


@pytest.mark.parametrize("name", ["", "folder/", "?file=a", "x" * 230, ".."])
def test_an_address_of_any_name_has_a_copy(tmp_path: Path, name: str) -> None:
    class Anything(MemoryFileSystem):
        protocol = "anything"

        def info(self, path: str, **options: Any) -> Any:
            return {"name": path, "size": 5, "type": "file"}

        def get_file(self, rpath: str, lpath: str, **options: Any) -> Any:
            Path(lpath).write_bytes(b"12345")

    fsspec.register_implementation("anything", Anything, clobber=True)
    with files.open_file(f"anything://host/{name}") as stream:
        assert stream.read() == b"12345"


def test_downloads_that_are_underway_are_not_dropped_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"{i}.txt": bytes([65 + i]) * 1000 for i in range(8)}
    for name, content in contents.items():
        fsspec.filesystem("memory").pipe_file(f"/many/{name}", content)
    stage_in(str(tmp_path / "bounded"), 1500)

    def slowly(address: str, to: str) -> None:
        with open(to, "wb") as out:
            for start in range(0, 1000, 250):
                out.write(contents[address.rpartition("/")[2]][start : start + 250])
                out.flush()
                time.sleep(0.003)

    def read(name: str) -> bool:
        with files.open_file(f"memory://many/{name}") as stream:
            return bool(stream.read() == contents[name])

    monkeypatch.setattr(files, "_get", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [*contents] * 6))


def test_a_server_that_says_nothing_of_a_file_but_its_size_is_asked_by_each_start(tmp_path: Path, web: Web) -> None:
    web.hidden = True
    prints = []
    for content in (LINES, LINES.replace(b"document 7", b"document X"), LINES):
        (tmp_path / "web" / "a.jsonl").write_bytes(content)
        prints.append(prepared(config_of(web / "a.jsonl", tmp_path)).train[0].fingerprint)
    assert prints[0] == prints[2] != prints[1]
    assert web.asked["GET /a.jsonl"] == 3


def test_an_address_that_allows_no_look_but_a_read_is_read(tmp_path: Path, web: Web) -> None:
    (tmp_path / "web" / "a.jsonl").write_bytes(LINES)
    web.signed = True
    assert rows_of(prepared(config_of(web / "a.jsonl", tmp_path))) == expected(tmp_path)


@pytest.mark.parametrize("address", ["http:///a.jsonl", "loop"])
def test_what_is_no_address_is_a_mistake(tmp_path: Path, web: Web, address: str) -> None:
    address = web / "loop" if address == "loop" else address
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for options in ({"path": address}, {"cache_dir": address}, {"tokenizer": address}):
        with pytest.raises(ValueError, match=address) as raised:
            prepared(config_of(**{"path": str(tmp_path / "a.jsonl"), "tmp_path": tmp_path, **options}))
        assert failure_of(raised.value).exit_code == ExitCode.USAGE
