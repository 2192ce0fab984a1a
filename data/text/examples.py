"""A record into token ids and per-token loss weights: a text is one document, a chat another, a preference two."""

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import Census, Lump, read_lumps, source_files, with_text_column
from mixtral_jax.data.text.chat import Example, TrainOn, encode_chat, utf8_size
from mixtral_jax.data.text.layouts import normalise
from mixtral_jax.data.text.template import Template
from mixtral_jax.data.text.tokenizer import Tokenizer

MAX_ENCODED = 4_000_000  # characters
SHORTEST_PAIR = 8  # tokens of a row that can hold a pair which is cut to it


class Documents(NamedTuple):
    """Tokenised documents, end to end."""

    lengths: np.ndarray  # (n,) int64
    tokens: np.ndarray  # (sum of lengths,) uint16 or uint32
    learned: np.ndarray | None  # (sum of lengths,) bool; None: every token
    text_bytes: np.ndarray  # (n,) int64: UTF-8 bytes of the text; 0 of an example, whose text is partly the template's
    control: np.ndarray  # (n,) bool: the text of the example holds what looks like a control token

    def pick(self, chosen: np.ndarray) -> "Documents":
        """Those of the numbers `chosen`."""
        starts = (np.cumsum(self.lengths) - self.lengths)[chosen]
        lengths = self.lengths[chosen]
        tokens, learned = join(self.tokens, starts, lengths), self.learned
        if learned is not None:
            learned = join(learned, starts, lengths)
        return Documents(lengths, tokens, learned, self.text_bytes[chosen], self.control[chosen])

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        if self.learned is None:
            return len(self.tokens) - len(self.lengths)
        return int(np.count_nonzero(self.learned))


def join(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The slices start : start + length of an array, one after the other."""
    slices = [flat[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return np.concatenate(slices) if slices else flat[:0]


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


# --- documents of text ---


def text_documents(lump: Lump, key: str, tokenizer: Tokenizer, census: Census) -> Documents:
    """Pretraining documents: BOS, the ids of the text, EOS. EOS is learned; BOS, being first, is never a target."""
    texts: list[str] = []
    sizes: list[int] = []
    for number, record in lump.parse(census):
        try:
            size = utf8_size(_text(record, key), repr(key))
        except ValueError as error:
            census.report(lump.where(number), error)
            continue
        if size:
            texts.append(record[key])
            sizes.append(size)
        else:
            census.counts["empty"] += 1
    census.counts["text_bytes"] += sum(sizes)
    encoded = _encode_all(texts, tokenizer)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 2
    flat = itertools.chain.from_iterable((tokenizer.bos_id, *ids, tokenizer.eos_id) for ids in encoded)
    tokens = np.fromiter(flat, token_dtype(tokenizer.vocab_size), int(lengths.sum()))
    return Documents(lengths, tokens, None, np.array(sizes, np.int64), np.zeros(len(sizes), bool))


def texts_of(source: SourceConfig) -> Iterator[str]:
    """The texts of a source, in order.

    Raises:
        ValueError: nothing is there, or a record that has no text.
    """
    files, census = source_files(source), Census(skip=False)
    source = with_text_column(source, files)
    for lump in (lump for file in files for lump in read_lumps(source, file, (source.text_key,), census)):
        for number, record in lump.parse(census):
            try:
                yield _text(record, source.text_key)
            except ValueError as error:
                census.report(lump.where(number), error)


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "nothing"
        raise ValueError(f"no {key!r} (the record has {names}; the column can be set with text_key)")
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


def tuning_documents(
    lump: Lump,
    source: SourceConfig,
    kind: str,
    template: Template,
    train_on: TrainOn,
    census: Census,
    layouts: Sequence[str] = (),
) -> Documents:
    """Fine-tuning examples as wholes: of a chat one sequence, of a preference two that are neighbours. One of which
    nothing is learned (of a pair, on either side), or of which both answers are the same tokens, is dropped.

    `layouts` are those that the file's first rows have.
    """
    examples: list[Example] = []
    control: list[bool] = []
    for number, record in lump.parse(census):
        try:
            layout, shape = normalise(record, source, kind, layouts)
            whole = () if shape is None else encoded(shape, source, template, train_on)
        except (ValueError, RecursionError) as error:
            census.report(lump.where(number), error)
            continue
        census.layouts[layout] += 1
        if not whole or whole[0] in whole[1:] or not all(any(each.learned[1:]) for each in whole):
            census.counts["dropped"] += 1
            continue
        examples += whole
        control += [any(map(template.words.search, _texts(shape)))] * len(whole)
    lengths = np.array([len(e.tokens) for e in examples], np.int64)
    tokens = np.array([t for e in examples for t in e.tokens], token_dtype(template.tokenizer.vocab_size))
    learned = np.array([learned for e in examples for learned in e.learned], bool)
    return Documents(lengths, tokens, learned, np.zeros(len(examples), np.int64), np.array(control, bool))


def cut_examples(documents: Documents, size: int, together: int) -> tuple[Documents, Counter[str]]:
    """Examples that fit a row of `size` tokens, and how many were cut to it (`truncated`) or `dropped`.

    A chat loses its end. A pair (`together` is 2: neighbours) that is longer than a row is cut so that each sequence
    takes at most half: completions lose their ends first, down to half of that half; then the prompt loses its
    beginning, but for BOS. Both sequences keep the same prompt. One of which nothing is left to learn (of a pair, on
    either side), or of which both answers are cut to the same, is dropped.
    """
    tokens, learned = documents.tokens, documents.learned
    assert learned is not None and (together == 1 or size >= SHORTEST_PAIR)
    keep, counts = np.ones(len(tokens), bool), Counter[str]()
    ends = np.cumsum(documents.lengths)
    bounds = np.stack([ends - documents.lengths, ends], axis=1).reshape(-1, together, 2)
    for of_example in bounds[bounds[:, -1, 1] - bounds[:, 0, 0] > size].tolist():
        skipped, end = 0, size
        if together == 2:
            prompt = min(int(np.argmax(learned[start:stop])) for start, stop in of_example)
            half = size // 2
            room = max(half - prompt, half // 2)
            longest = min(room, max(stop - start for start, stop in of_example) - prompt)
            skipped, end = max(0, prompt - (half - longest)), prompt + room
        for start, stop in of_example:
            keep[start + 1 : start + 1 + skipped] = False
            keep[start + end : stop] = False
        places = [start + np.flatnonzero(keep[start:stop]) for start, stop in of_example]
        same = together == 2 and all(np.array_equal(*(x[place] for place in places)) for x in (tokens, learned))
        lost = same or not all(learned[place].any() for place in places)
        keep[of_example[0][0] : of_example[-1][1]] &= not lost
        counts["dropped" if lost else "truncated"] += 1
    if not counts:
        return documents, counts
    lengths = np.add.reduceat(keep, ends - documents.lengths, dtype=np.int64)
    left = lengths > 0
    rest = (documents.text_bytes[left], documents.control[left])
    return Documents(lengths[left], tokens[keep], learned[keep], *rest), counts


def encoded(
    shape: dict[str, Any], source: SourceConfig, template: Template, train_on: TrainOn = "all"
) -> tuple[Example, ...]:
    """The content of a record, as `normalise` gives it: a chat as one sequence, a preference as chosen and rejected.

    Prompt and answer as strings are the ids of the joint text between BOS and EOS, of which a piece that reaches into
    the answer is learned; as message lists they are one conversation of which the answer is learned.

    Raises:
        ValueError: an empty answer, two kinds of value, or a conversation that breaks a rule of the template.
    """
    if "messages" in shape:
        return (encode_chat(shape["messages"], template, train_on=train_on, tools=shape.get("tools", ())),)
    if "completion" in shape:
        return (_answer(shape, "completion", source.completion_key, template, train_on),)
    keys = {"chosen": source.chosen_key, "rejected": source.rejected_key}
    return tuple(_answer(shape, column, key, template, "all") for column, key in keys.items())


def _answer(shape: dict[str, Any], column: str, key: str, template: Template, train_on: TrainOn) -> Example:
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
