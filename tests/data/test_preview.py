"""What `data preview` prints, against the rows themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.loader import Loader
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.preview import colour, mixture_lines, preview
from mixtral_jax.data.rows.order import GlobalOrder
from mixtral_jax.data.rows.row import RowFormat
from mixtral_jax.data.text.tokenizer import load_tokenizer
from tests.tiny import write_byte_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
TOKENIZER = load_tokenizer(SAMPLES / "tokenizer.model")
SEQ_LEN = 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _config(cache: Path) -> DataConfig:
    weights = {"fr": 6.0, "it": 3.0, "code": 1.0}
    train = [{"name": n, "path": str(SAMPLES / f"{n}.val.jsonl.gz"), "weight": w} for n, w in weights.items()]
    return DataConfig(tokenizer=str(SAMPLES / "tokenizer.model"), train=train, cache_dir=str(cache), workers=1)


def test_preview_shows_the_rows_and_the_arithmetic(cache: Path) -> None:
    config = _config(cache)
    texts = preview(config, seq_len=SEQ_LEN, seed=0, rows=2)
    plain = "\n".join(text.plain for text in texts)
    prepared = prepare(config, SEQ_LEN, 0)
    sources = prepared.train
    total = sum(s.rows for s in sources)
    assert f"mixture by weight: share = weight / sum of weights; an epoch is {total:,} rows" in plain
    assert f"fr: {sources[0].rows:,} rows" in plain
    assert f"weight 6 -> 60.0 % of the run, {0.6 * total / sources[0].rows:.2f} times an epoch" in plain
    loader = Loader(prepared, global_batch_size=2)
    batch = next(loader)
    loader.close()
    for b in range(2):
        learned = np.count_nonzero(batch.weights[0, b])
        assert f"{learned} of {SEQ_LEN} targets are learned" in plain
        middle = TOKENIZER.decode(batch.tokens[0, b][batch.segment_ids[0, b] == 1][2:20].tolist())
        assert middle.strip() in plain


def test_preview_colours_only_what_is_learned(cache: Path) -> None:
    train = [{"name": "chat", "path": str(SAMPLES / "sft" / "dialogue.val.jsonl.gz")}]
    config = DataConfig(
        tokenizer=str(SAMPLES / "tokenizer.model"), train=train, examples="chat", cache_dir=str(cache), workers=1
    )
    text = preview(config, seq_len=256, seed=0, rows=1)[-1]
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
    train = [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]
    data = DataConfig(tokenizer="t", train=train)
    lines = mixture_lines(data, GlobalOrder([90, 10], None, 0))
    assert lines[0] == "mixture by size: every row once an epoch; an epoch is 100 rows"
    assert lines[1] == "  a: 90 rows (90.0 % of all) -> 90.0 % of the run, 1.00 times an epoch"
    lines = mixture_lines(data.model_copy(update={"temperature": 2.0}), GlobalOrder([90, 10], [0.75, 0.25], 0))
    assert lines[0].startswith("mixture by temperature 2: share ~ (weight * rows)^(1/2)")
    assert lines[2] == "  b: 10 rows (10.0 % of all) -> 25.0 % of the run, 2.50 times an epoch"
