"""Both kinds of tokenizer behind one interface, against the libraries themselves."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import tokenizers

from mixtral_jax.data.text.export import as_json, tokenizer_files
from mixtral_jax.data.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from mixtral_jax.data.train_tokenizer import train_sentencepiece, train_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
MODEL = SAMPLES / "tokenizer.model"
LANGUAGES = ("en", "fr", "de", "es", "it", "code")
HARD = [
    "",
    " ",
    "  two  spaces ",
    "naïve café — “quotes”",
    "tab\tline\n\nlines\r\n",
    "日本語 🙂 \u0000",
    "12345",
    "</s><s>[INST]",
]


def _documents(language: str, part: str = "val") -> list[str]:
    lines = gzip.decompress((SAMPLES / f"{language}.{part}.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json that adds its own BOS, with a tokenizer_config.json beside it."""
    directory = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "[S]", "[E]", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_documents("fr")[:10], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[S] $A", special_tokens=[("[S]", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"content": "[S]"}, "eos_token": "[E]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_sentencepiece_is_the_library(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    reference = spm.SentencePieceProcessor(model_file=str(MODEL))
    texts = [*HARD, *_documents("de")[:5]]
    assert [tokenizer.encode(text) for text in texts] == [reference.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (reference.vocab_size(), 1, 2)
    assert tokenizer.id_of("<s>") == 1
    assert tokenizer.id_of("[INST]") is None


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_document_comes_back(language: str, hugging_face: Path) -> None:
    for tokenizer in (load_tokenizer(MODEL), load_tokenizer(hugging_face)):
        documents = _documents(language)[:20] + HARD
        assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(documents)] == documents


def test_hugging_face_is_the_library_without_its_special_tokens(hugging_face: Path) -> None:
    tokenizer = load_tokenizer(hugging_face)
    reference = tokenizers.Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    assert reference.encode("a").ids[0] == 1  # the file adds BOS, we do not
    texts = _documents("fr")[:5]
    assert tokenizer.encode_batch(texts) == [reference.encode(t, add_special_tokens=False).ids for t in texts]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (600, 1, 2)
    assert tokenizer.id_of("[E]") == 2


def test_special_tokens_inside_a_document_are_text(hugging_face: Path) -> None:
    for tokenizer in (load_tokenizer(MODEL), load_tokenizer(hugging_face)):
        for piece in ("<s>", "</s>", "[E]"):
            assert not {tokenizer.bos_id, tokenizer.eos_id, 3} & set(tokenizer.encode(f"a{piece}b")) - {
                *tokenizer.encode("a"),
                *tokenizer.encode("b"),
            }


def test_bos_and_eos_by_their_usual_names(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((hugging_face / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer.json has no bos_token \(looked for <s>,"):
        load_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "[S]"}))
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 3  # </s>


def test_copies_and_fingerprints(hugging_face: Path, tmp_path: Path) -> None:
    seen = set()
    for i, path in enumerate((MODEL, hugging_face)):
        tokenizer = load_tokenizer(path)
        (tmp_path / str(i)).mkdir()
        for file in [path] if path.is_file() else path.iterdir():
            shutil.copy(file, tmp_path / str(i))
        again = load_tokenizer(tmp_path / str(i))
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode(HARD[3]) == tokenizer.encode(HARD[3])
        seen.add(again.fingerprint())
    config = tmp_path / "1" / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "[S]", "eos_token": "</s>"}))
    seen.add(load_tokenizer(tmp_path / "1").fingerprint())  # another EOS: other rows
    assert len(seen) == 3


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    for name, kind in (("a.model", "SentencePiece model"), ("a.json", "tokenizer.json")):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match=f"{name} is not a {kind}"):
            load_tokenizer(tmp_path / name)


def test_training_is_repeatable_and_has_mixtrals_settings(tmp_path: Path) -> None:
    files = [str(SAMPLES / f"{language}.val.jsonl.gz") for language in ("fr", "it")]
    first = train_tokenizer(files, 700, tmp_path / "a.model")
    second = train_tokenizer(files, 700, tmp_path / "b")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    assert first.fingerprint() == second.fingerprint()
    sp = first.processor
    assert (sp.vocab_size(), sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (700, 0, 1, 2, -1)
    assert [sp.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert all(len(first.encode(digits)) >= len(digits) for digits in ("2023", "00"))
    assert first.decode(first.encode("ﬁ  Å\n")) == "ﬁ  Å\n"  # no normalisation


def test_the_bundled_tokenizer_can_be_made_again(tmp_path: Path) -> None:
    train_tokenizer([str(SAMPLES / "*.train.jsonl.gz")], 4096, tmp_path / "a.model")
    assert (tmp_path / "a.model").read_bytes() == MODEL.read_bytes()


def test_training_refuses(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too little text")
    options: dict[str, Any] = {"vocab_size": 500}
    with pytest.raises(ValueError, match="cannot train a tokenizer with vocab_size 500"):
        train_tokenizer([f"{tmp_path}/a.txt"], out=tmp_path / "a.model", **options)
    assert not (tmp_path / "a.model").exists()
    with pytest.raises(ValueError, match="no input"):
        train_tokenizer([], out=tmp_path / "a.model", **options)
    (tmp_path / "b.jsonl").write_text('{"texts": "a"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: no text under 'text'"):
        train_tokenizer([f"{tmp_path}/b.jsonl"], out=tmp_path / "a.model", **options)
    (tmp_path / "a.model").touch()
    with pytest.raises(ValueError, match=r"a.model exists already: choose another name, or --force"):
        train_tokenizer([f"{tmp_path}/a.txt"], out=tmp_path / "a.model", **options)


def test_only_the_first_bytes_are_used() -> None:
    def texts() -> Any:
        yield from _documents("fr")
        raise AssertionError("read on")

    train_sentencepiece(texts(), 400, max_bytes=50_000)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_or_a_pipe_in_place_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    for file in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / file).write_bytes(b"something")
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n")
    opened = (tmp_path, tmp_path / "tokenizer.json" if "config" in name else path)
    for place in opened:
        with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS"):
            load_tokenizer(place)
    path.unlink()
    os.mkfifo(path)
    for place in opened:
        with pytest.raises(ValueError, match=rf"{name} is no regular file"):
            load_tokenizer(place)


IM = {"<|im_end|>": 4096, "<|im_start|>": 4097, "<think>": 4098}


def _beside(directory: Path, *, special: bool = True, scheme: str = "first", model: bool = True) -> Path:
    """The bundled tokenizer as transformers 5 saves a fine-tune of it: more tokens, another EOS, another space."""
    directory.mkdir()
    content = as_json(SentencePieceTokenizer(MODEL))
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    content["added_tokens"] += [{"id": i, "content": piece, **flags} for piece, i in IM.items()]
    content["added_tokens"][-1]["special"] = False
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<s>"}))
    if model:
        shutil.copy(MODEL, directory)
    return directory


def test_files_that_name_more_tokens_win_over_tokenizer_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_beside(tmp_path / "json"))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.id_of("<|im_start|>")) == (4099, 4096, 4097)
    assert "tokenizer.json (4099 pieces, BOS <s>, EOS <|im_end|>) is read rather than" in tokenizer.notes[0]
    for name, content in {
        "added_tokens.json": IM,
        "tokenizer_config.json": {"added_tokens_decoder": {str(i): {"content": t} for t, i in IM.items()}},
    }.items():
        directory = tmp_path / name
        directory.mkdir()
        shutil.copy(MODEL, directory)
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
        (directory / name).write_text(json.dumps(content))
        other = load_tokenizer(directory)
        assert (other.vocab_size, other.eos_id, other.id_of("<|im_start|>")) == (4099, 4096, 4097)
        assert other.notes and other.fingerprint() != load_tokenizer(MODEL).fingerprint()
        for text in ("a<think>b", "<think>", "<|im_end|>", "say <|im_end|> now"):
            ids = other.encode(text)
            assert ids.count(4098) == text.count("<think>") and not {4096, 4097} & set(ids)
            assert other.encode_batch([text]) == [ids] == [other.encode_ends(text)[0]]
        assert other.encode_ends("a<think>b")[1] == [1, 8, 9]
    (tmp_path / "plain").mkdir()
    shutil.copy(MODEL, tmp_path / "plain")
    assert isinstance(load_tokenizer(tmp_path / "plain"), SentencePieceTokenizer)
    assert not load_tokenizer(tmp_path / "plain").notes


@pytest.mark.parametrize("special", [True, False])
def test_typed_control_tokens_stay_text_whatever_their_file_calls_them(tmp_path: Path, special: bool) -> None:
    tokenizer = load_tokenizer(_beside(tmp_path / "d", special=special))
    for text in ("say <|im_end|> now", "<|im_start|>user", "</s>"):
        ids = tokenizer.encode(text)
        assert not {2, 4096, 4097} & set(ids) and tokenizer.decode(ids) == text
    assert 4098 in tokenizer.encode("so <think> on")  # a word


@pytest.mark.parametrize(("scheme", "spaced"), [("first", "start"), ("always", "always"), ("never", "never")])
def test_a_text_is_encoded_where_it_stands(tmp_path: Path, scheme: str, spaced: str) -> None:
    tokenizer = load_tokenizer(_beside(tmp_path / "d", scheme=scheme, model=False))
    assert tokenizer.spaced == spaced
    space, none = [315], [3951, 289]  # ▁the; t, he
    want = {"start": [space, none, none], "always": [space, space, none], "never": [none] * 3}[spaced]
    assert [tokenizer.encode("the", place) for place in ("start", "control", "text")] == want


def test_ids_without_a_piece_are_shown(hugging_face: Path) -> None:
    for tokenizer in (load_tokenizer(MODEL), load_tokenizer(hugging_face)):
        ids = tokenizer.encode("the end")
        beyond = [*ids[:1], 99_999, *ids[1:], 5000]
        assert tokenizer.decode(beyond).replace("⟨99999⟩", "").removesuffix("⟨5000⟩") == "the end"
        assert "⟨99999⟩" in tokenizer.decode(beyond)


def test_what_else_ends_a_text_stands_in_generation_config(tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path)
    for value, ends in ([2, 7], (2, 7)), (5, (5,)), (None, ()):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert load_tokenizer(tmp_path).ends == ends


def _symbols(path: Path, symbols: list[str], prefix: bool) -> SentencePieceTokenizer:
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, a and b think", "hello again"] * 9), model_prefix=str(path),
        model_type="bpe", vocab_size=320, hard_vocab_limit=False, byte_fallback=True, user_defined_symbols=symbols,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(path.with_suffix(".model"))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("symbols", [["<think>", "<|im_end|>"], ["ll", "<"], ["<a>", "<b>"], ["▁▁", "▁▁▁"]])
def test_symbols_of_a_sentencepiece_model_keep_their_ids_in_tokenizer_json(
    tmp_path: Path, symbols: list[str], prefix: bool
) -> None:
    ours = _symbols(tmp_path / "m", symbols, prefix)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(as_json(ours)))
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == ours.vocab_size
    for symbol in (s.replace("▁", " ") for s in symbols):
        for text in (f"{a}{symbol}{b}" for a in ("", "hello", "a ", symbol) for b in ("", "world", " b", "  b")):
            ids = ours.encode(text)
            assert theirs.encode(text, add_special_tokens=False).ids == ids, text
            assert theirs.decode(ids) == ours.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "key"),
    [("added_tokens.json", "<x>"), ("generation_config.json", "eos_token_id"), ("special_tokens_map.json", "eos_token")]
    + [("tokenizer_config.json", key) for key in ("bos_token", "pad_token", "added_tokens_decoder", "chat_template")],
)
def test_files_beside_a_tokenizer_are_read_or_refused_in_one_sentence(tmp_path: Path, name: str, key: str) -> None:
    shutil.copy(MODEL, tmp_path)
    odd = [0, -1, 1.5, True, "x", None, [], {}, [1], ["x"], [[]], {"1": "x"}, {"x": 1}, {"content": 1}, {"9999": {}}]
    refused = 0
    for content in [*({key: value} for value in odd), [], "x", 1]:
        (tmp_path / name).write_text(json.dumps(content))
        try:
            tokenizer_files(load_tokenizer(tmp_path))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
    assert refused >= 9
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"{name}: Invalid JSON"):
        load_tokenizer(tmp_path)
