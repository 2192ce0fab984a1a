"""Records into tokens and weights, token by token."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records.lump import Census, Lump
from mixtral_jax.data.text import examples
from mixtral_jax.data.text.chat import Example, encode_chat
from mixtral_jax.data.text.examples import (
    Documents,
    cut_examples,
    text_documents,
    tuning_documents,
)
from mixtral_jax.data.text.template import load_template
from mixtral_jax.data.text.tokenizer import load_tokenizer
from tests.oracles import cutting
from tests.tuning import chat_example, preference_pair

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
TOKENIZER = load_tokenizer(SAMPLES / "tokenizer.model")
SOURCE = SourceConfig(name="s", path="f.jsonl")
CHAT = load_template("v1", TOKENIZER)
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def _lump(*records: Any) -> Lump:
    return Lump("f.jsonl", 1, "".join(json.dumps(r) + "\n" for r in records).encode())


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- text ---


def test_a_document_is_bos_ids_eos() -> None:
    texts = ["Bonjour à tous.", "x", "Ça va ?\n"]
    census = Census(skip=False)
    found = text_documents(_lump(*({"text": t} for t in texts), {"text": ""}), "text", TOKENIZER, census)
    expected = [[BOS, *TOKENIZER.encode(t), EOS] for t in texts]
    assert found.lengths.tolist() == [len(d) for d in expected]
    assert found.tokens.tolist() == [token for d in expected for token in d]
    assert found.learned is None
    assert found.text_bytes.tolist() == [len(t.encode()) for t in texts]
    assert census.counts == {"text_bytes": sum(len(t.encode()) for t in texts), "empty": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"content": "a"}, r"f.jsonl, line 2: no 'text' \(the record has 'content'; the column can be set"),
        ({}, r"f.jsonl, line 2: no 'text' \(the record has nothing"),
        ({"text": None}, r"f.jsonl, line 2: 'text' is not a string"),
        ({"text": 3}, r"f.jsonl, line 2: 'text' is not a string"),
        ({"text": "\ud800"}, r"f.jsonl, line 2: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_record_without_text_is_named(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_documents(_lump({"text": "a"}, record), "text", TOKENIZER, Census(skip=False))
    census = Census(skip=True)
    found = text_documents(_lump({"text": "a"}, record), "text", TOKENIZER, census)
    assert (census.bad, len(found.lengths)) == (1, 1)


def test_a_very_long_text_is_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_ENCODED", 50)
    text = "Un deux trois quatre cinq.\n" * 20 + "z" * 120
    found = text_documents(_lump({"text": text}, {"text": "a"}), "text", TOKENIZER, Census(skip=False))
    assert len(found.lengths) == 2
    ids = found.tokens[1 : found.lengths[0] - 1].tolist()
    assert TOKENIZER.decode(ids).replace(" ", "") == text.replace(" ", "")


# --- chats ---


def test_chats_go_through_the_template_and_learn_the_answers() -> None:
    messages = [_user("Hello"), _assistant("Hi!"), _user("2+2?"), _assistant("4")]
    ids, trainable = encode_chat(messages, CHAT)
    example = chat_example({"messages": messages}, SOURCE, CHAT)
    assert (example.tokens, example.learned) == (ids, trainable)
    last = chat_example({"messages": messages}, SOURCE, CHAT, train_on="last")
    learned = [t for t, w in zip(last.tokens, last.learned, strict=True) if w]
    assert learned == [*TOKENIZER.encode("4"), EOS]


def test_prompt_and_completion_are_one_text_of_which_the_completion_is_learned() -> None:
    example = chat_example({"prompt": "Say hi.", "completion": " Hi."}, SOURCE, CHAT)
    prompt, completion = [BOS, *TOKENIZER.encode("Say hi.")], [*TOKENIZER.encode("Hi."), EOS]
    assert example.tokens == prompt + completion
    assert example.learned == [False] * len(prompt) + [True] * len(completion)


class _Oracle:
    """Ids of the joint text, and how many of them lie within the prompt, by decoding ever more of them."""

    def __init__(self, tokenizer: Any, prompt: str, answer: str):
        self.ids = tokenizer.encode(prompt + answer)
        assert tokenizer.decode(self.ids) == prompt + answer
        self.before = max(n for n in range(len(self.ids) + 1) if prompt.startswith(tokenizer.decode(self.ids[:n])))


BORDERS = [
    ("def f(x):\n", "    return x"),
    ("2 + 2 =", " 4"),
    ("2 + 2 = ", "4"),
    ("f(x):", "\n y"),
    ("x  ", "  y"),
    ("é 漢", "字 ü"),
    ("don", "'t"),
    ("", "only this"),
    ("a 1", "2"),
]


def _byte_level(path: Path) -> Any:
    """As GPT-2's: a space belongs to the word behind it, and a post-processor that takes it off the word's place."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([p + a for p, a in BORDERS] * 9, trainer)
    inner.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
@pytest.mark.parametrize(("prompt", "answer"), BORDERS)
def test_a_piece_across_the_border_is_learned(tmp_path: Path, kind: str, prompt: str, answer: str) -> None:
    tokenizer = TOKENIZER if kind == "sentencepiece" else _byte_level(tmp_path)
    template = load_template("v1", tokenizer)
    expected = _Oracle(tokenizer, prompt, answer)
    before = 1 + expected.before if prompt else 1
    pair = preference_pair({"prompt": prompt, "chosen": answer, "rejected": "z"}, SOURCE, template)
    for example in (chat_example({"prompt": prompt, "completion": answer}, SOURCE, template), pair[0]):
        assert example.tokens == [tokenizer.bos_id, *expected.ids, tokenizer.eos_id]
        assert example.learned == [n >= before for n in range(len(example.tokens))]


def test_texts_that_hold_control_words_are_counted() -> None:
    chats = [[_user(text), _assistant("a")] for text in ("<s>[INST] hi [/INST]", "plain", "<|im_start|>", "a < s >")]
    records = [*({"messages": chat} for chat in chats), {"prompt": "a", "completion": "b</s>"}]
    census = Census(skip=False)
    found = tuning_documents(_lump(*records), SOURCE, "chat", CHAT, "all", census)
    assert found.control.tolist() == [True, False, True, False, True]


def test_prompt_and_completion_as_messages_are_one_chat_of_which_the_last_answer_is_learned() -> None:
    prompt = [_user("a"), _assistant("b"), _user("c")]
    example = chat_example({"prompt": prompt, "completion": [_assistant("d")]}, SOURCE, CHAT)
    whole, _ = encode_chat([*prompt, _assistant("d")], CHAT)
    assert example.tokens == whole
    assert [t for t, w in zip(example.tokens, example.learned, strict=True) if w] == [*TOKENIZER.encode("d"), EOS]


def test_columns_can_be_named() -> None:
    source = SourceConfig(name="s", path="f", prompt_key="q", completion_key="a", messages_key="m")
    assert chat_example({"q": "x", "a": "y"}, source, CHAT) == chat_example(
        {"prompt": "x", "completion": "y"}, SOURCE, CHAT
    )
    messages = [_user("x"), _assistant("y")]
    assert chat_example({"m": messages}, source, CHAT) == chat_example({"messages": messages}, SOURCE, CHAT)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [_user("a"), {"role": "asistant", "content": "b"}]}, "line 1: .*unknown role 'asistant'"),
        ({"messages": [_user("a")]}, r"line 1: .*ends with role 'user'"),
        ({"messages": "a"}, "line 1: 'messages' is not a list of messages"),
        ({"prompt": "a"}, r"line 1: neither 'messages' nor 'prompt' with 'completion' \(it has 'prompt'\)"),
        ({"prompt": "a", "completion": ""}, "line 1: 'completion' is empty"),
        ({"prompt": "a", "completion": 3}, "line 1: the prompt and 'completion' must be strings or lists"),
        ({"prompt": "a\ud800", "completion": "b"}, "line 1: the prompt or 'completion' holds half of a surrogate pair"),
    ],
)
def test_a_bad_chat_is_named(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"f.jsonl, {message}"):
        tuning_documents(_lump(record), SOURCE, "chat", CHAT, "all", Census(skip=False))
    census = Census(skip=True)
    assert len(tuning_documents(_lump(record), SOURCE, "chat", CHAT, "all", census).lengths) == 0
    assert census.bad == 1


def test_chats_are_cut_to_a_row_and_dropped_when_nothing_is_left_to_learn() -> None:
    short, long_answer = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b " * 50}
    long_prompt = {"prompt": "a " * 50, "completion": "b"}
    whole = tuning_documents(_lump(short, long_answer, long_prompt), SOURCE, "chat", CHAT, "all", Census(skip=False))
    assert len(whole.lengths) == 3
    found, counts = cut_examples(whole, 17, 1)
    assert counts == {"truncated": 1, "dropped": 1}
    examples = [chat_example(r, SOURCE, CHAT) for r in (short, long_answer)]
    expected = [Example(tokens[:17], learned[:17]) for tokens, learned in examples]
    assert found.lengths.tolist() == [len(e.tokens) for e in expected]
    assert found.tokens.tolist() == expected[0].tokens + expected[1].tokens
    assert found.learned is not None
    assert found.learned.tolist() == expected[0].learned + expected[1].learned


@pytest.mark.parametrize("together", [1, 2])
def test_cutting_is_that_of_the_slow_twin(together: int) -> None:
    rng = np.random.default_rng(together)
    for _ in range(60):
        size = int(rng.integers(8, 40))
        examples = []
        for _ in range(rng.integers(1, 9)):
            prompt, *answers = rng.integers(1, 30, 1 + together).tolist()
            begin = [1, *rng.integers(2, 4, prompt - 1).tolist()]  # two tokens: some pairs are cut to the same
            of_it = []
            for length in answers:
                learned = [False] * prompt + [True, *(rng.random(length - 1) < 0.7).tolist()]
                of_it.append(cutting.Example(begin + rng.integers(2, 4, length).tolist(), learned))
            examples.append(tuple(of_it))
        flat = [example for of_it in examples for example in of_it]
        found, counts = cut_examples(
            Documents(
                np.array([len(e.tokens) for e in flat], np.int64),
                np.array([t for e in flat for t in e.tokens], np.uint16),
                np.array([w for e in flat for w in e.learned], bool),
                np.zeros(len(flat), np.int64),
                np.arange(len(flat)) % 3 == 0,
            ),
            size,
            together,
        )
        long = [sum(len(e.tokens) for e in of_it) > size for of_it in examples]
        fates = [cutting.fate(e, size) if is_long else (e, "whole") for e, is_long in zip(examples, long, strict=True)]
        kept = [example for left, _ in fates for example in left]
        assert found.lengths.tolist() == [len(e.tokens) for e in kept]
        assert found.tokens.tolist() == [t for e in kept for t in e.tokens]
        assert found.learned is not None
        assert found.learned.tolist() == [w for e in kept for w in e.learned]
        assert counts == Counter(fate for _, fate in fates if fate != "whole")


# --- preference ---


@pytest.mark.parametrize("name", ["reasoning", "conversational"])
def test_the_sample_pairs_share_their_prompt(name: str) -> None:
    lines = gzip.decompress((SAMPLES / "preference" / f"{name}.val.jsonl.gz").read_bytes()).splitlines()
    for line in lines:
        record = json.loads(line)
        pair = preference_pair(record, SOURCE, CHAT)
        starts = [example.learned.index(True) for example in pair]
        for example, start, key in zip(pair, starts, ("chosen", "rejected"), strict=True):
            assert set(example.learned[start:]) == {True}
            if isinstance(record[key], str):  # the ids of the joint text, in which the last word of a prompt may change
                assert example.tokens == [BOS, *TOKENIZER.encode(record["prompt"] + record[key]), EOS]
            else:
                assert example.tokens[start:] == [*TOKENIZER.encode(record[key][0]["content"]), EOS]
                assert example.tokens[:start] == pair[0].tokens[: starts[0]]


def test_a_common_prefix_is_the_prompt() -> None:
    prompt = [_user("a"), _assistant("b"), _user("c")]
    alone = {"chosen": [*prompt, _assistant("d")], "rejected": [*prompt, _assistant("e")]}
    apart = {"prompt": prompt, "chosen": [_assistant("d")], "rejected": [_assistant("e")]}
    assert preference_pair(alone, SOURCE, CHAT) == preference_pair(apart, SOURCE, CHAT)
    texts = {"chosen": "Two and two is four", "rejected": "Two and two is five"}
    split = {"prompt": "Two and two is ", "chosen": "four", "rejected": "five"}
    assert preference_pair(texts, SOURCE, CHAT) == preference_pair(split, SOURCE, CHAT)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"no 'rejected' \(it has 'prompt', 'chosen'\)"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": [_assistant("c")]}, "are of different kinds"),
        ({"chosen": "b", "rejected": "c"}, "there is no prompt, and the two answers begin differently"),
    ],
)
def test_a_bad_pair_is_refused(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_pair(record, SOURCE, CHAT)
