"""A record into token ids and per-token loss weights: a text is one document, a chat another, a preference two."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import Census, Lump
from mixtral_jax.data.text.chat import Example, TrainOn, encode_chat, utf8_size
from mixtral_jax.data.text.layouts import normalise
from mixtral_jax.data.text.template import Template
from mixtral_jax.data.text.tokenizer import Tokenizer

MAX_ENCODED = 4_000_000  # characters


class Documents(NamedTuple):
    """Tokenised documents, end to end."""

    lengths: np.ndarray  # (n,) int64
    tokens: np.ndarray  # (sum of lengths,) uint16 or uint32
    weights: np.ndarray | None  # (sum of lengths,) float16; None: every token counts 1

    def slices(self, starts: np.ndarray, lengths: np.ndarray) -> "Documents":
        """Of the tokens (and weights) those at start : start + length, as documents."""
        places = [slice(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]

        def join(flat: np.ndarray) -> np.ndarray:
            return np.concatenate([flat[place] for place in places]) if places else flat[:0]

        return Documents(lengths, join(self.tokens), None if self.weights is None else join(self.weights))

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        if self.weights is None:
            return len(self.tokens) - len(self.lengths)
        return int(np.count_nonzero(self.weights))


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _names(record: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in list(record)[:8]) or "nothing"


# --- documents of text ---


def text_documents(lump: Lump, key: str, tokenizer: Tokenizer, census: Census) -> Documents:
    """Pretraining documents: BOS, the ids of the text, EOS. EOS is learned; BOS, being first, is never a target."""
    texts: list[str] = []
    for number, record in lump.parse(census):
        try:
            size = utf8_size(_text(record, key), repr(key))
        except ValueError as error:
            census.report(f"{lump.where(number)}: {error}")
            continue
        census.counts["text_bytes"] += size
        if size:
            texts.append(record[key])
        else:
            census.counts["empty"] += 1
    encoded = _encode_all(texts, tokenizer)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 2
    tokens = np.empty(int(lengths.sum()), token_dtype(tokenizer.vocab_size))
    at = 0
    for ids in encoded:
        tokens[at] = tokenizer.bos_id
        tokens[at + 1 : at + 1 + len(ids)] = ids
        tokens[at + 1 + len(ids)] = tokenizer.eos_id
        at += len(ids) + 2
    return Documents(lengths, tokens, None)


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f"no {key!r} (the record has {_names(record)}; the column can be set with text_key)")
    if not isinstance(record[key], str):
        raise ValueError(f"{key!r} is not a string")
    return record[key]


def _encode_all(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """A tokenizer holds some 50 bytes a character: very long texts are encoded piece by piece, cut at white space.

    Each piece may begin with the space that the tokenizer puts in front of a text.
    """
    if all(len(text) <= MAX_ENCODED for text in texts):
        return tokenizer.encode_batch(texts)
    encoded = []
    for text in texts:
        ids: list[int] = []
        while text:
            end = len(text)
            if end > MAX_ENCODED:
                end = max(text.rfind(c, 0, MAX_ENCODED) for c in "\n ") + 1 or MAX_ENCODED
            ids += tokenizer.encode(text[:end])
            text = text[end:]
        encoded.append(ids)
    return encoded


# --- examples of chats and preferences ---


class Pair(NamedTuple):
    """A preferred and a rejected answer to the same prompt, each with its prompt before it."""

    chosen: Example
    rejected: Example


def tuning_documents(
    lump: Lump,
    source: SourceConfig,
    kind: str,
    template: Template,
    train_on: TrainOn,
    size: int,
    census: Census,
    layouts: Sequence[str] = (),
) -> Documents:
    """Fine-tuning examples that fit a row of `size` tokens: of a chat one sequence, of a preference two that are
    neighbours. One of which nothing is left to learn (of a pair, on either side), or of which both answers are cut to
    the same, is dropped.

    `layouts` are those that the file's first rows have.
    """
    examples: list[Example] = []
    for number, record in lump.parse(census):
        try:
            whole: tuple[Example, ...] = ()
            kept: tuple[Example, ...] = ()
            layout, shape = normalise(record, source, kind, layouts)
            if shape is None:
                lost = True
            elif kind == "preference":
                pair = _pair(shape, source, template)
                whole, kept = pair, fit(pair, size)
                lost = kept[0] == kept[1] or not all(any(each.learned) for each in kept)
            else:
                example = _example(shape, source, template, train_on)
                whole, kept = (example,), (_cut(example, 0, size),)
                lost = not any(kept[0].learned[1:])
        except (ValueError, RecursionError) as error:
            census.report(f"{lump.where(number)}: {error}")
            continue
        census.layouts[layout] += 1
        if lost:
            census.counts["dropped"] += 1
            continue
        census.counts["truncated"] += kept != whole
        if any(map(template.words.search, _texts(shape))):
            census.counts["control_words"] += 1
        examples += kept
    lengths = np.array([len(e.tokens) for e in examples], np.int64)
    tokens = np.array([t for e in examples for t in e.tokens], token_dtype(template.tokenizer.vocab_size))
    weights = np.array([learned for e in examples for learned in e.learned], np.float16)
    return Documents(lengths, tokens, weights)


def chat_example(
    record: dict[str, Any], source: SourceConfig, template: Template, train_on: TrainOn = "all"
) -> Example:
    """A record of a chat, in any layout: messages through the template, or prompt and completion.

    Prompt and completion as strings are the ids of the joint text between BOS and EOS, of which a piece that reaches
    into the completion is learned; as message lists they are one conversation of which the completion is learned.

    Raises:
        ValueError: no layout that is known, or a conversation that breaks a rule of the template.
    """
    shape = normalise(record, source, "chat")[1]
    if shape is None:
        raise ValueError("no answer to learn")
    return _example(shape, source, template, train_on)


def preference_pair(record: dict[str, Any], source: SourceConfig, template: Template) -> Pair:
    """A record of a preference, in any layout: prompt and two answers, as strings or messages.

    Raises:
        ValueError: a missing column, equal answers, an empty answer, or two kinds of value.
    """
    shape = normalise(record, source, "preference")[1]
    assert shape is not None
    return _pair(shape, source, template)


def _example(shape: dict[str, Any], source: SourceConfig, template: Template, train_on: TrainOn) -> Example:
    if "messages" in shape:
        return encode_chat(shape["messages"], template, train_on=train_on, tools=shape.get("tools", ()))
    return _answer(shape, "completion", source.completion_key, template, train_on)


def _pair(shape: dict[str, Any], source: SourceConfig, template: Template) -> Pair:
    chosen = _answer(shape, "chosen", source.chosen_key, template)
    return Pair(chosen, _answer(shape, "rejected", source.rejected_key, template))


def _answer(shape: dict[str, Any], column: str, key: str, template: Template, train_on: TrainOn = "all") -> Example:
    """Prompt and answer as one sequence of which only the answer and its EOS are learned."""
    prompt, answer, tools = shape["prompt"], shape[column], shape.get("tools", ())
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise ValueError(f"{key!r} is empty")
        if tools or "system" in shape:
            what = "'tools' have" if tools else "'system' has"
            raise ValueError(f"{what} no place in plain text: write the prompt and {key!r} as messages")
        utf8_size(prompt + " " + answer, f"the prompt or {key!r}")
        tokenizer = template.tokenizer
        ids, ends = tokenizer.encode_ends(prompt + answer)
        before = 1 + bisect_right(ends, len(prompt))
        tokens = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        return Example(tokens, [False] * before + [True] * (len(tokens) - before))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise ValueError(f"the prompt and {key!r} must be strings or lists of messages")
    unlearned = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    return encode_chat(unlearned + answer, template, train_on=train_on, tools=tools)


def _texts(shape: Any) -> Iterator[str]:
    """The texts of a prompt, an answer, or the content of messages."""
    for value in shape.values():
        for text in [value] if isinstance(value, str) else [m.get("content") for m in value if isinstance(m, dict)]:
            if isinstance(text, str):
                yield text


def fit(pair: Pair, size: int) -> Pair:
    """The pair in `size` tokens. One that is longer is cut so that each sequence takes at most half.

    Completions lose their ends first, down to half of that half; then the prompt loses its beginning, but for BOS.
    Both sequences keep the same prompt.

    Raises:
        ValueError: a sequence does not begin with a prompt, or a row is too short.
    """
    prompt = min(map(_prompt_length, pair))
    if not prompt:
        raise ValueError("there is no prompt before the answers")
    if sum(len(e.tokens) for e in pair) <= size:
        return pair
    half = size // 2
    if half < 4:
        raise ValueError(f"a row of {size} tokens is too short for a pair")
    room = max(half - prompt, half // 2)
    longest = min(room, max(len(e.tokens) for e in pair) - prompt)
    kept = half - longest  # of the prompt
    return Pair(*(_cut(example, max(0, prompt - kept), prompt + room) for example in pair))


def _cut(example: Example, count: int, end: int) -> Example:
    """The first `end` tokens of an example, without the `count` after its first."""
    tokens, learned = example
    return Example(tokens[:1] + tokens[1 + count : end], learned[:1] + learned[1 + count : end])


def _prompt_length(example: Example) -> int:
    return example.learned.index(True) if True in example.learned else len(example.learned)
