"""Which files of a clone are data, and of which split: held against `datasets`, which reads the hub's repositories."""

import gzip
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from datasets import data_files as hub

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records.selection import choose, source_files
from tests.prepared import config_of, prepare_one

CARD = "# A card\n"
CONFIGS = """\
---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "main/*.jsonl"
  - split: test
    path: ["held/out.jsonl", "held/more*"]
dataset_info:
  features: []
---
"""
LAYOUTS = {  # names below a clone, beside README.md and LICENSE
    "flat": ["train.jsonl", "test.jsonl"],
    "shards": [f"data/{s}-of-00002.parquet" for s in ("train-00000", "train-00001", "test-00000", "test-00001")],
    "own names": ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
    "hashes": ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "data/validation-00000-of-00001-2ab.parquet"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "dev/c.jsonl", "evaluation/d.jsonl"],
    "folders win": ["en/train_1/test.jsonl", "other/train.jsonl"],
    "words inside": ["my-training_set.jsonl", "my.valid.jsonl.gz", "eval 3.jsonl", "trainer.jsonl", "latest.jsonl"],
    "languages": ["en/train.jsonl", "fr/train.jsonl", "en/test.jsonl"],
    "unlabelled": ["a.jsonl", "more/b.jsonl"],
    "hidden": ["train.jsonl", ".cache/test.jsonl", "__pycache__/dev.jsonl"],
    "documents beside": ["train.jsonl", "docs/usage.md", "dataset_infos.json", "LICENSE.txt"],
    "a card says": ["main/a.jsonl", "main/b.jsonl", "held/out.jsonl", "held/more.jsonl", "train.jsonl"],
    "texts": ["train/a.txt", "train/b.txt", "test/c.txt", "NOTICE.txt"],
}  # fmt: skip


def _clone(root: Path, names: list[str], card: str = CARD) -> Path:
    for name in ["README.md", "LICENSE", ".gitattributes", *names]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(card if name == "README.md" else json.dumps({"text": f"words of {name}"}) + "\n")
    return root


def _chosen(path: Any, **options: Any) -> list[str]:
    return source_files(SourceConfig(name="s", path=path if isinstance(path, tuple) else str(path), **options))


def _names(root: Path, **options: Any) -> list[str]:
    return [os.path.relpath(file, root) for file in _chosen(root, **options)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_the_hub(tmp_path: Path, layout: str) -> None:
    root = _clone(tmp_path, LAYOUTS[layout], CONFIGS if layout == "a card says" else CARD)
    patterns = hub.get_data_patterns(str(root))
    if layout == "a card says":
        patterns = {"train": ["main/*.jsonl"], "test": ["held/out.jsonl", "held/more*"]}
    found = hub.DataFilesDict.from_patterns(patterns, base_path=str(root))
    of_records = (".jsonl", ".gz", ".parquet") if layout != "texts" else (".txt",)
    for split in ("train", "validation", "test", "train_sft", "nonsense"):
        expected = sorted(os.path.relpath(f, root) for f in found.get(split, []) if f.endswith(of_records))
        expected = [name for name in expected if name != "NOTICE.txt"]
        if expected:
            assert sorted(_names(root, split=split)) == expected
        else:
            with pytest.raises(ValueError, match=f"has no split '{split}'"):
                _names(root, split=split)
    if len(found) == 1 and layout != "folders win":  # there a file is of no split
        assert _names(root) == _names(root, split=str(next(iter(found))))
    else:
        with pytest.raises(ValueError, match=r"holds the splits .*train.* \(.*\).*: set split to one of them"):
            _names(root)


def test_what_was_chosen_and_what_was_not_is_said_with_its_rows(tmp_path: Path) -> None:
    root = _clone(tmp_path / "clone", LAYOUTS["flat"])
    source = {"name": "a", "path": str(root), "split": "train"}
    described = choose(SourceConfig(**source)).described
    assert described == f"{root}: split train: train.jsonl; not read: LICENSE, README.md, test (test.jsonl)"
    prepared = prepare_one(config_of(tmp_path / "cache", train=(source,)))
    assert (prepared.documents, prepared.described) == (1, described)
    other = prepare_one(config_of(tmp_path / "cache", train=({**source, "split": "test"},)))
    assert other.fingerprint != prepared.fingerprint
    (root / "README.md").write_text("another card")
    assert prepare_one(config_of(tmp_path / "cache", train=(source,))).fingerprint == prepared.fingerprint


@pytest.mark.parametrize(
    ("names", "path", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "*.jsonl", None, ["test.jsonl", "train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "*.jsonl", "test", ["test.jsonl"]),
        (["train.jsonl"], "*", None, ["train.jsonl"]),
        (["data/a-00000-of-09.jsonl", "data/x-00000-of-00001.jsonl"], "data", "x", ["data/x-00000-of-00001.jsonl"]),
        (["data/x-00000-of-00009.jsonl"], "data/*", "x", ["data/x-00000-of-00009.jsonl"]),
        (["a/1.jsonl", "b/2.jsonl"], "**/*.jsonl", None, ["a/1.jsonl", "b/2.jsonl"]),
        (["train.jsonl"], "train.jsonl", "train", ["train.jsonl"]),
        (["a.txt", "sub/b.md"], "", None, ["a.txt", "sub/b.md"]),
        ([], "README.md", None, ["README.md"]),
        ([], "", None, ["README.md"]),
        (["a[1].jsonl"], "a[1].jsonl", None, ["a[1].jsonl"]),
        (["license.jsonl", "a.jsonl"], "", None, ["a.jsonl", "license.jsonl"]),
        (["a.txt", "a.md"], "", None, ["a.md", "a.txt"]),
        (["license-plates.txt", "notice_of_it.txt", "data card.txt"], "", None,
         ["data card.txt", "license-plates.txt", "notice_of_it.txt"]),
        (["a.txt", "NOTICE.txt", "README_fr.txt", "Licence.fr.txt"], "", None, ["a.txt"]),
        (["TRAIN.JSONL.GZ"], "", "train", ["TRAIN.JSONL.GZ"]),
        (["all.jsonl", "train.py", "eval.png"], "", None, ["all.jsonl"]),
        (["train.csv", "test.jsonl"], "", "test", ["test.jsonl"]),
        (["train.csv", "test.jsonl"], "*.jsonl", None, ["test.jsonl"]),
        (["en/train.jsonl", "en/test.jsonl"], "e*", "train", ["en/train.jsonl"]),
        (["x-00002-of-00002.jsonl", "x-00001-of-00002.jsonl"], "", None,
         ["x-00001-of-00002.jsonl", "x-00002-of-00002.jsonl"]),
        (["x-00001-of-00002.jsonl", "x-00002-of-00003.jsonl"], "x*", None,
         ["x-00001-of-00002.jsonl", "x-00002-of-00003.jsonl"]),
    ],
)  # fmt: skip
def test_globs_files_and_folders(
    tmp_path: Path, names: list[str], path: str, split: str | None, expected: list[str]
) -> None:
    root = _clone(tmp_path, names)
    assert [os.path.relpath(f, root) for f in _chosen(root / path, split=split)] == expected
    memory = fsspec.filesystem("memory")
    try:
        for name in ["README.md", "LICENSE", *names]:
            memory.pipe(f"/{tmp_path.name}/{name}", (root / name).read_bytes())
        if "[" not in path:
            found = _chosen(f"memory://{tmp_path.name}/{path}".rstrip("/"), split=split)
            assert found == [f"memory://{tmp_path.name}/{name}" for name in expected]
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize(
    ("names", "path", "split", "message"),
    [
        (["a.jsonl"], "a.jsonl", "train", "is one file, whose name says no split: leave split 'train' out"),
        (["test.jsonl"], "test.jsonl", "train", "whose name says split test: leave split 'train' out"),
        (["a.jsonl"], "*.jsonl", "train", "has no split 'train': no name there says one: leave split out"),
        (["a.jsonl"], "", "test", "has no split 'test': no name there says one"),
        (["train.jsonl", "extra.jsonl"], "", None, r"train \(train.jsonl\), none \(extra.jsonl\): set split"),
        (["a.parquet", "b.txt"], "", None, r"holds records \(a.parquet\) and texts \(b.txt\): set path to a glob"),
        (["a.jsonl", "a.jsonl.gz"], "", None, "holds the same twice, as a.jsonl and as a.jsonl.gz: set path to a glob"),
        (["train.parquet", "train.json"], "", "train", "the same twice, as train.json and as train.parquet"),
        (["a.txt", "a.txt.zst"], "*", None, "the same twice, as a.txt and as a.txt.zst"),
        (["TRAIN.JSONL", "TRAIN.JSONL.GZ"], "", None, "the same twice"),
        (
            ["train.csv", "test.jsonl"],
            "",
            None,
            r"holds train \(train.csv\), of no kind that is read, beside test.jsonl",
        ),
        (["train.csv", "test.jsonl"], "", "train", r"holds train \(train.csv\), of no kind that is read"),
        (["train.jsonl.bz2", "all.jsonl"], "", None, r"holds train \(train.jsonl.bz2\), of no kind"),
        (["train/a.tar", "test/a.jsonl"], "", None, r"holds train \(train/a.tar\), of no kind"),
        (["en/train.jsonl", "en/test.jsonl"], "e*", None, r"holds the splits train .*en/train.jsonl.*: set split"),
        (
            ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"],
            "",
            None,
            "lacks data/train-00001-of-00003 and so 1 of 3 parts",
        ),
        (["train.csv"], "", None, "without data files that are known by name: LICENSE, README.md, train.csv"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, names: list[str], path: str, split: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^source 's': .*{message}"):
        _chosen(_clone(tmp_path, names) / path, split=split)


def test_a_card_that_names_a_split_of_no_kind_that_is_read_is_refused(tmp_path: Path) -> None:
    root = _clone(tmp_path, ["a.csv", "b.jsonl"], CONFIGS.replace("main/*.jsonl", "a.csv").replace("held/more*", "b*"))
    with pytest.raises(ValueError, match=r"holds train \(a.csv\), of no kind that is read"):
        _chosen(root)
    assert _names(root, split="test") == ["b.jsonl"]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("configs:\n- config_name: a\n  data_files: a\n- config_name: b\n  data_files: b", "several and none"),
        ("configs: [", "while parsing"),
        ("configs:\n- 7", "has no attribute"),
        ("configs: &a\n- config_name: *a\n  data_files: a.jsonl", "aliases"),
        ("configs:\n- config_name: a\n  data_files: gone.jsonl", "name no file that is there"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_followed_is_refused(tmp_path: Path, configs: str, message: str) -> None:
    root = _clone(tmp_path, ["a.jsonl"], f"---\n{configs}\n---\n")
    with pytest.raises(ValueError, match=rf"configs of .*README.md.*{message}.*: set path to"):
        _chosen(root)


@pytest.mark.parametrize(
    "config",
    ["data_files: a/*.jsonl", "data_files: [a/x.jsonl]", "data_files: {train: ./a/x.jsonl}", "data_dir: a"],
)
def test_the_ways_to_write_a_configuration(tmp_path: Path, config: str) -> None:
    for key in ("configs:", '"configs":', "configs :\n# a note", "configs:\r"):
        root = _clone(tmp_path, ["a/x.jsonl", "train.jsonl"], f"---\n{key}\n- config_name: a\n# b\n  {config}\n---\n")
        assert _names(root) == _names(root, split="train") == ["a/x.jsonl"]


def test_the_column_that_was_found_is_said_and_counts(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text('{"content": "words", "n": 1}\n')
    other.write_text('{"content": "words", "title": "a"}\n')
    prepared = prepare_one(config_of(tmp_path / "cache", path))
    assert prepared.described == f"{path}; texts from column 'content'"
    named = prepare_one(config_of(tmp_path / "cache", train=({"name": "a", "path": str(path), "text_key": "content"},)))
    assert named.fingerprint == prepared.fingerprint
    with pytest.raises(ValueError, match=r"no 'text' \(the record has 'content', 'title'; the column can be set with"):
        prepare_one(config_of(tmp_path / "cache", other))


def test_the_hubs_cache_stands_for_its_main_revision(tmp_path: Path) -> None:
    _clone(tmp_path / "snapshots" / "old", ["train.jsonl"])
    new = _clone(tmp_path / "snapshots" / "new", ["train.jsonl", "test.jsonl"])
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("new\n")
    assert _chosen(tmp_path, split="train") == [str(new / "train.jsonl")]


def test_the_hubs_cache_without_a_main_revision(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    old = _clone(tmp_path / "snapshots" / "old", ["train.jsonl"])
    assert _chosen(tmp_path) == [str(old / "train.jsonl")]
    _clone(tmp_path / "snapshots" / "new", ["train.jsonl"])
    with pytest.raises(ValueError, match="holds the revisions new, old, and no refs/main: set path to one of"):
        _chosen(tmp_path)


def test_of_saved_data_sets_below_a_folder_what_is_kept_aside_is_not_read(tmp_path: Path) -> None:
    words = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=words, test=words).save_to_disk(tmp_path / "all" / "two")
    _clone(tmp_path / "all", ["two/train/cache-12ab.arrow"])
    expected = [f"{tmp_path}/all/two/train/data-00000-of-00001.arrow"]
    assert _chosen(tmp_path / "all", split="train") == _chosen(tmp_path, split="train") == expected
    with pytest.raises(ValueError, match=r"holds the splits train .*, test .*: set split to one of them"):
        _chosen(tmp_path / "all")
    (tmp_path / "all" / "two" / "train" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state.json is damaged"):
        _chosen(tmp_path / "all", split="train")


def test_files_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("d/train.jsonl.gz", gzip.compress(b'{"text": "words"}\n'))
        archive.writestr("d/test.jsonl", b'{"text": "other"}\n')
    for path in (f"zip://d::{tmp_path}/a.zip", f"zip://d/*.gz::{tmp_path}/a.zip"):
        assert _chosen(path, split="train") == [f"zip://d/train.jsonl.gz::{tmp_path}/a.zip"]
    prepared = prepare_one(config_of(tmp_path / "cache", train=({"name": "a", "path": path},)))
    assert prepared.text_bytes == len("words")


def test_links_are_followed_once_and_broken_ones_named(tmp_path: Path) -> None:
    root = _clone(tmp_path / "clone", [])
    (tmp_path / "blob").write_text('{"text": "a"}\n')
    (root / "train.jsonl").symlink_to(tmp_path / "blob")
    (root / "loop").symlink_to(root)
    assert _names(root) == ["train.jsonl"]
    assert _chosen((str(root), f"{root}/../clone/train.jsonl")) == [str(root / "train.jsonl")]
    (root / "train-2.jsonl").symlink_to("train.jsonl")
    assert _names(root) == ["train-2.jsonl"]
    (root / "train-2.jsonl").unlink()
    for name in ("train", "train-b"):
        (root / name).symlink_to(tmp_path / "more")
    _clone(tmp_path / "more", ["a.jsonl"])
    assert _names(root, split="train") == ["train/a.jsonl"]
    (root / "train").unlink()
    (root / "train-b").unlink()
    (tmp_path / "blob").unlink()
    with pytest.raises(ValueError, match=r"train.jsonl is a link to nothing: .*blob is not there"):
        _chosen(root)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path, tmp_path / "a.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match=r"a.jsonl is no regular file"):
            _chosen(path)
    with pytest.raises(ValueError, match="/dev/zero is no regular file"):
        _chosen("/dev/zero", format="jsonl")


def test_a_pointer_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n")
    with pytest.raises(ValueError, match=r"a.parquet is a pointer of Git LFS, not the file: run git lfs pull"):
        _chosen(tmp_path)


def test_addresses_that_nothing_reads(tmp_path: Path) -> None:
    for path, message in (
        ("nosuch://a/b.jsonl", "cannot be read: Protocol not known: nosuch"),
        ("memory://nothing.jsonl", "no file matches memory://nothing.jsonl"),
        (f"zip://*.jsonl::{__file__}", f"{__file__} cannot be read: File is not a zip file"),
        (f"tar://a.jsonl::{__file__}", f"{__file__} cannot be read: "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            _chosen(path)
