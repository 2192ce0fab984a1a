"""Whatever changes a row changes the fingerprint, and nothing else does: every input of `prepare`, changed once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import prepared
from tests.prepared import MODEL, TOKENIZER, config_of, leftovers, prepare_one, records_of
from tests.tiny import write_byte_tokenizer

CHAT = [{"role": "user", "content": "un"}, {"role": "assistant", "content": "deux"}]
LONG = [*CHAT, {"role": "user", "content": "trois"}, {"role": "assistant", "content": "quatre"}]
RECORDS = [
    {
        "text": f"numéro {i} <extra> et", "other": f"autre {i}",
        "messages": LONG, "chat": CHAT,
        "prompt": f"q{i}", "question": f"r{i}", "completion": f"a{i}", "answer": f"b{i}",
        "chosen": f"oui {i}", "better": f"si {i}", "rejected": f"non {i}", "worse": f"ni {i}",
    }
    for i in range(30)
]  # fmt: skip
_CHAT, _PAIR = {"examples": "chat"}, {"examples": "preference"}
_BOTH = {"layout": "prompt_completion", **_CHAT}

# field -> (what is changed, to what); sources' fields and the run's together in `config_with`
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "path": ({}, {"path": "b.jsonl"}),
    "format": ({"path": "a.txt"}, {"path": "a.txt", "format": "jsonl"}),
    "layout": (_CHAT, _BOTH),
    "split": ({"path": "saved", "split": "one"}, {"path": "saved", "split": "two"}),
    "text_key": ({}, {"text_key": "other"}),
    "messages_key": (_CHAT, {**_CHAT, "messages_key": "chat"}),
    "prompt_key": (_BOTH, {**_BOTH, "prompt_key": "question"}),
    "completion_key": (_BOTH, {**_BOTH, "completion_key": "answer"}),
    "chosen_key": (_PAIR, {**_PAIR, "chosen_key": "better"}),
    "rejected_key": (_PAIR, {**_PAIR, "rejected_key": "worse"}),
    "tokenizer": ({}, {"tokenizer": "bytes"}),
    "examples": ({}, _CHAT),
    "template": (_CHAT, {**_CHAT, "template": "zephyr"}),
    "train_on": (_CHAT, {**_CHAT, "train_on": "last"}),
    "packing": ({}, {"packing": "best_fit"}),
    "pairs_per_row": (_PAIR, {**_PAIR, "pairs_per_row": 2}),
}
# what decides nothing about the rows, at least where it is changed so
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "name": ({}, {"name": "other"}),
    "weight": ({}, {"weight": 3.0}),
    "validation": ({}, {"validation": ({"name": "v", "path": "b.jsonl"},)}),
    "temperature": ({}, {"temperature": 2.0}),
    "epochs": ({}, {"epochs": 2.0}),
    "workers": ({}, {"workers": 2}),
    "restart": ({}, {"restart": True}),
    "phases": ({}, {"phases": ({"from_step": 0},)}),
    "path of the same content": ({}, {"path": "sub/copy.jsonl"}),
    "format that is said": ({}, {"format": "jsonl"}),
    "column of files of text": ({"path": "a.txt"}, {"path": "a.txt", "text_key": "other"}),
    "template of texts": ({}, {"template": "v3", "train_on": "last", "pairs_per_row": 2}),
    "packing of chats": (_CHAT, {**_CHAT, "packing": "best_fit"}),
    "answers of pairs": (_PAIR, {**_PAIR, "train_on": "last", "packing": "best_fit"}),
    "tokenizer of the same content": ({}, {"tokenizer": "t2.model"}),
    "what only generation reads": ({"tokenizer": "plain"}, {"tokenizer": "generates"}),
}
# the rows of these are the same, but which are refused is another matter; and where they lie
APART = {"on_error", "cache_dir", "staging_dir", "staging_bytes", "train"}
FILES_CHANGED: dict[str, Callable[[Path], object]] = {
    "content": lambda at: (at / "a.jsonl").write_text((at / "a.jsonl").read_text().replace("numéro 3", "numéro 4")),
    "a line more": lambda at: (at / "a.jsonl").write_text((at / "a.jsonl").read_text() + '{"text": "more"}\n'),
    "a special token": lambda at: (at / "tokenizer" / "added_tokens.json").write_text(
        json.dumps({"<extra>": TOKENIZER.vocab_size})
    ),
    "the model": lambda at: [(at / "tokenizer").rename(at / "before"), (at / "bytes").rename(at / "tokenizer")],
}


def _lay_out(at: Path) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS]
    (at / "sub").mkdir()
    for name in ("a.jsonl", "a.txt", "sub/copy.jsonl"):
        (at / name).write_text("".join(lines))
    (at / "b.jsonl").write_text("".join(lines[:9]))
    splits = {"one": datasets.Dataset.from_list(RECORDS), "two": datasets.Dataset.from_list(RECORDS[5:])}
    datasets.DatasetDict(splits).save_to_disk(at / "saved")
    for name in ("tokenizer", "plain", "generates", "bytes"):
        (at / name).mkdir()
        if name != "bytes":
            shutil.copy(MODEL, at / name / "tokenizer.model")
    (at / "generates" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    write_byte_tokenizer(at / "bytes" / "tokenizer.json")
    shutil.copy(MODEL, at / "t2.model")


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    _lay_out(place)
    return place


def config_with(at: Path, changes: dict[str, Any], cache_dir: str = "cache") -> DataConfig:
    """`changes` of the source and of the data, with paths below `at`."""
    changed = {"name": "s", "path": "a.jsonl", **changes}
    source = {key: changed.pop(key) for key in [*changed] if key in SourceConfig.model_fields}
    paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
    changed = {"tokenizer": str(MODEL), **changed, "cache_dir": str(at / cache_dir)}
    if "tokenizer" in changes:
        changed["tokenizer"] = str(at / changes["tokenizer"])
    for other in changed.get("validation", ()):
        other["path"] = str(at / Path(other["path"]).name)
    train = ({**source, "path": [str(at / path) for path in paths]},)
    return DataConfig(**{"workers": 1, **changed, "train": train})


def made(config: DataConfig, **options: Any) -> tuple[str, list[bytes]]:
    source = prepare_one(config, **options)
    return source.fingerprint, records_of(source)


def test_every_field_is_classified() -> None:
    """A new one is put into CHANGES, SAME or APART, with a change that shows it."""
    fields = {*DataConfig.model_fields, *SourceConfig.model_fields}
    assert fields <= {*CHANGES, *SAME, *APART}


@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_the_rows_changes_the_fingerprint(at: Path, field: str) -> None:
    (one, rows), (other, others) = (made(config_with(at, changes)) for changes in CHANGES[field])
    assert rows != others
    assert one != other


@pytest.mark.parametrize("field", SAME)
def test_what_changes_no_row_is_served_from_the_cache(at: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if field in ("phases", "staging_dir") and field not in DataConfig.model_fields:
        pytest.skip("not there yet")
    monkeypatch.setattr(prepared, "_SERIAL_BYTES", 0)
    before, after = SAME[field]
    one, rows = made(config_with(at, before))
    again = prepared.prepare(config_with(at, {**after, "validation": ()}), 64, 0, progress=False)
    assert not again.fresh
    assert made(config_with(at, after)) == (one, rows)
    assert made(config_with(at, after, f"own {field}")) == (one, rows)  # and so they would be, made anew


@pytest.mark.parametrize("change", FILES_CHANGED)
def test_what_is_in_the_files_counts(tmp_path: Path, change: str) -> None:
    _lay_out(tmp_path)
    config = config_with(tmp_path, {"tokenizer": "tokenizer"})
    one, rows = made(config)
    FILES_CHANGED[change](tmp_path)
    other, others = made(config)
    assert rows != others
    assert one != other


def test_seed_length_and_the_order_of_files_count(at: Path) -> None:
    base = config_with(at, {"path": ["a.jsonl", "b.jsonl"]})
    found = [
        made(base),
        made(base, seed=1),
        made(base, seq_len=32),
        made(config_with(at, {"path": ["b.jsonl", "a.jsonl"]})),
        made(config_with(at, {"path": ["a.jsonl", "sub/copy.jsonl"]})),
    ]
    assert len({fingerprint for fingerprint, _ in found}) == len(found)
    assert all(found[0][1] != rows for _, rows in found[1:])


def test_a_text_renamed_to_lines_is_read_anew(tmp_path: Path) -> None:
    """By its name a file is one document, by another 30."""
    text = tmp_path / "corpus.txt"
    text.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    first = prepare_one(config_of(tmp_path / "cache", text))
    text.rename(tmp_path / "corpus.jsonl")
    second = prepare_one(config_of(tmp_path / "cache", tmp_path / "corpus.jsonl"))
    assert (first.documents, second.documents) == (1, 30)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("kind", ["text", "chat", "preference"])
def test_one_store_serves_every_length_and_seed(at: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Nothing is tokenised again, and the rows and counts are those of a cache of their own."""

    def cached(place: str, seed: int, length: int) -> tuple[dict[str, Any], list[bytes]]:
        source = prepare_one(config_with(at, {"examples": kind}, f"{kind} {place}"), seed, length)
        return source.model_dump(exclude={"directory"}), records_of(source)

    others = [(0, 32), (1, 64), (2, 16)]
    expected = [cached(f"alone {seed}", seed, length) for seed, length in others]
    validation = ({"name": "v", "path": "a.jsonl"},)
    config = config_with(at, {"examples": kind, "validation": validation}, f"{kind} together")
    prepared.prepare(config, 64, 0, progress=False)
    monkeypatch.setattr("mixtral_jax.data.prepare.tokenise.tokenise_unit", None)
    assert [cached("together", seed, length) for seed, length in others] == expected
    if kind != "text":
        assert expected[2][0]["truncated"] + expected[2][0]["dropped"] > 0
    metas = [json.loads(file.read_text()) for file in Path(config.cache_dir).glob("*/meta.json")]
    assert len([meta for meta in metas if meta.get("kind") == "documents"]) == 1


def test_a_cache_of_another_version_is_neither_mistaken_nor_deleted(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(at, {}, "of versions")
    now = prepare_one(config)
    kept = {file: file.read_bytes() for file in Path(config.cache_dir).rglob("*") if file.is_file()}
    for module in ("cache", "recipe", "tokenise"):
        monkeypatch.setattr(f"mixtral_jax.data.prepare.{module}.FORMAT_VERSION", 99)
    other = prepare_one(config)
    assert other.fingerprint != now.fingerprint and records_of(other) == records_of(now)
    assert {file: file.read_bytes() for file in kept} == kept
    assert leftovers(Path(config.cache_dir)) == sorted(s.fingerprint[:24] for s in (now, other))
