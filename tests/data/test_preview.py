"""What `data preview` prints, against the rows themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.loader import Loader
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.preview import colour, mixture_lines, preview
from mixtral_jax.data.rows.position import Position
from mixtral_jax.data.rows.row import RowFormat
from mixtral_jax.data.text.tokenizer import load_tokenizer
from tests.tiny import write_byte_tokenizer
from tests.unprepared import prepared

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
TOKENIZER = load_tokenizer(SAMPLES / "tokenizer.model")
SEQ_LEN = 64
NAMES = {"a": "content of a", "b": "content of b"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _config(cache: Path) -> DataConfig:
    weights = {"fr": 6.0, "it": 3.0, "code": 1.0}
    train = [{"name": n, "path": str(SAMPLES / f"{n}.val.jsonl.gz"), "weight": w} for n, w in weights.items()]
    return DataConfig(tokenizer=str(SAMPLES / "tokenizer.model"), train=train, cache_dir=str(cache), workers=1)


def test_preview_shows_the_rows_and_the_arithmetic(cache: Path) -> None:
    config = _config(cache)
    texts = preview(config, seq_len=SEQ_LEN, seed=0, steps=10, global_batch_size=2, rows=2)
    plain = "\n".join(text.plain for text in texts)
    prepared = prepare(config, SEQ_LEN, 0)
    said = preview(config.model_copy(update={"epochs": 2}), seq_len=SEQ_LEN, seed=0, steps=0, global_batch_size=1)
    assert any(f"; rows 0 to {2 * sum(source.rows for source in prepared.train):,}" in text.plain for text in said)
    assert "mixture by weight: share = weight / sum of weights; rows 0 to 20" in plain
    n = prepared.train[0].rows
    assert f"fr: {n:,} rows, weight 6 -> 60 % of the rows, 12 of them; epochs 0.00 to {12 / n:.2f}" in plain
    loader = Loader(prepared, global_batch_size=2)
    batch = next(loader)
    loader.close()
    for b in range(2):
        learned = np.count_nonzero(batch.weights[0, b])
        assert f"{learned} of {SEQ_LEN} targets are learned" in plain
        middle = TOKENIZER.decode(batch.tokens[0, b][batch.segment_ids[0, b] == 1][2:20].tolist())
        assert middle.strip() in plain


def test_preview_shows_the_first_rows_of_each_phase(cache: Path) -> None:
    values = _config(cache).model_dump()
    values["train"] = [{**source, "weight": None} for source in values["train"]]
    values["phases"] = [{"from_step": 0, "weights": {"fr": 1, "it": 1}}, {"from_step": 10, "weights": {"code": 1}}]
    texts = preview(DataConfig(**values), seq_len=SEQ_LEN, seed=0, steps=15, global_batch_size=4, rows=2)
    heads = [text.plain.split(":")[0].strip() for text in texts if text.plain.startswith("\nrow")]
    assert heads == ["row 0", "row 1", "row 40", "row 41"]
    assert [" of code," in text.plain for text in texts if text.plain.startswith("\nrow")] == [False, False, True, True]
    values["phases"] = [values["phases"][0], {**values["phases"][1], "from_step": 1}]  # no row of the next one
    texts = preview(DataConfig(**values), seq_len=SEQ_LEN, seed=0, steps=2, global_batch_size=1)
    assert [text.plain.split(":")[0].strip() for text in texts if text.plain.startswith("\nrow")] == ["row 0", "row 1"]


def test_preview_colours_only_what_is_learned(cache: Path) -> None:
    train = [{"name": "chat", "path": str(SAMPLES / "sft" / "dialogue.val.jsonl.gz")}]
    config = DataConfig(
        tokenizer=str(SAMPLES / "tokenizer.model"), train=train, examples="chat", cache_dir=str(cache), workers=1
    )
    text = preview(config, seq_len=256, seed=0, steps=1, global_batch_size=1, rows=1)[-1]
    parts: dict[str, str] = {"green": "", "dim": "", "bold magenta": ""}
    for span in text.spans:
        parts[str(span.style)] += text.plain[span.start : span.end]
    assert "[INST]" in parts["dim"]
    assert "[INST]" not in parts["green"]
    assert parts["green"].count("<eos>") == parts["dim"].count("[/INST]")
    assert parts["bold magenta"] == "|" * parts["dim"].count("<bos>")


def test_control_tokens_are_shown_by_their_piece(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    write_byte_tokenizer(file)
    content = json.loads(file.read_text())
    size = len(content["model"]["vocab"])
    pieces = ["[INST]", "<|im_end|>", "<think>"]
    for id_, piece in enumerate(pieces, size):
        content["model"]["vocab"][piece] = id_
        content["added_tokens"].append({**content["added_tokens"][0], "id": id_, "content": piece})
    content["added_tokens"][-1]["special"] = False
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(file)
    ids = [tokenizer.bos_id, size, *tokenizer.encode("hé"), size + 1, size + 1, size + 2, tokenizer.eos_id]
    rows = RowFormat(40, "uint16", weighted=False)
    row = rows.decode(rows.encode(np.array([len(ids)]), np.array(ids), None))
    assert colour(row, tokenizer).plain == "|<bos>[INST]hé<|im_end|><|im_end|><think><eos>"


def test_the_first_words_of_a_cut_row_stay_apart() -> None:
    ids = TOKENIZER.encode("Un deux trois quatre")
    for seq_len in (len(ids) - 1, len(ids), 40):  # full, one place of padding, more
        rows = RowFormat(seq_len, "uint16", weighted=False)
        row = rows.decode(rows.encode(np.array([len(ids)]), np.array(ids), None))
        assert colour(row, TOKENIZER).plain == "|Un deux trois quatre"


def test_the_arithmetic_of_each_kind_of_mixture() -> None:
    lines = mixture_lines(prepared(0, {"a": 90, "b": 10}, NAMES, None), 50, 4)
    assert lines == [
        "mixture by size: every row once an epoch; rows 0 to 200",
        "  a: 90 rows -> 90 % of the rows, 180 of them; epochs 0.00 to 2.00",
        "  b: 10 rows -> 10 % of the rows, 20 of them; epochs 0.00 to 2.00",
    ]
    tempered = [{"from_step": 0, "temperature": 2}]
    lines = mixture_lines(prepared(0, {"a": 90, "b": 10}, NAMES, tempered), 50, 4)
    assert lines[0].startswith("mixture by temperature 2: share ~ (weight * rows)^(1/2)")
    assert lines[2] == "  b: 10 rows -> 25 % of the rows, 50 of them; epochs 0.00 to 5.00"


def test_the_arithmetic_of_phases_and_of_what_is_left_of_them() -> None:
    phases = [{"from_step": 0, "weights": {"a": 3, "b": 1}}, {"from_step": 30, "weights": {"b": 1}}]
    run = prepared(0, {"a": 90, "b": 10}, NAMES, phases)
    first, second = (
        ["phase 1 of 2, steps 0 to 30: mixture by weight: share = weight / sum of weights; rows 0 to 120",
         "  a: 90 rows, weight 3 -> 75 % of the rows, 90 of them; epochs 0.00 to 1.00",
         "  b: 10 rows, weight 1 -> 25 % of the rows, 30 of them; epochs 0.00 to 3.00"],
        ["phase 2 of 2, steps 30 to 50: mixture by weight: share = weight / sum of weights; rows 120 to 200",
         "  b: 10 rows, weight 1 -> 100 % of the rows, 80 of them; epochs 3.00 to 11.00"],
    )  # fmt: skip
    assert mixture_lines(run, 50, 4) == first + second
    position = Position().at(40, 160, run.order_from(Position(), 4), run.sources)
    assert mixture_lines(run, 50, 8, position) == [
        "phase 2 of 2, steps 40 to 50: mixture by weight: share = weight / sum of weights; rows 160 to 240",
        "  b: 10 rows, weight 1 -> 100 % of the rows, 80 of them; epochs 7.00 to 15.00",
    ]
