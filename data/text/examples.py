"""A record into token ids and per-token loss weights."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records.lump import Lump, Problems
from mixtral_jax.data.text.chat import TrainOn, encode_chat
from mixtral_jax.data.text.template import Template
from mixtral_jax.data.text.tokenizer import Tokenizer

MAX_ENCODED = 4_000_000  # characters


class Documents(NamedTuple):
    """Tokenised documents, end to end."""

    tokens: np.ndarray  # (sum of lengths,) uint16 or uint32
    lengths: np.ndarray  # (n,) int64
    weights: np.ndarray | None  # (sum of lengths,) float16; None: every token counts 1
    text_bytes: int  # UTF-8 bytes of the texts
    empty: int = 0  # records whose text is empty
    truncated: int = 0  # examples cut to a row
    dropped: int = 0  # examples with nothing left to learn


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def columns(source: SourceConfig, kind: str) -> tuple[str, ...]:
    """The columns that examples of a kind may use."""
    if kind == "text":
        return (source.text_key,)
    if kind == "preference":
        return (source.prompt_key, source.chosen_key, source.rejected_key)
    return (source.messages_key, source.prompt_key, source.completion_key)


def text_documents(lump: Lump, key: str, tokenizer: Tokenizer, problems: Problems) -> Documents:
    """Pretraining documents: BOS, the ids of the text, EOS. EOS is learned; BOS, being first, is never a target."""
    texts: list[str] = []
    text_bytes = empty = 0
    for number, record in lump.parse(problems):
        text = record.get(key)
        if not isinstance(text, str):
            problems.report(f"{lump.where(number)}: {_lacks_text(record, key)}")
            continue
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            problems.report(f"{lump.where(number)}: {key!r} holds half of a surrogate pair, which no text may")
            continue
        if not size:
            empty += 1
            continue
        text_bytes += size
        texts.append(text)
    tokens, lengths = _with_bos_eos(_encode_all(texts, tokenizer), tokenizer)
    return Documents(tokens, lengths, None, text_bytes, empty)


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


def _lacks_text(record: dict[str, Any], key: str) -> str:
    if key in record:
        return f"{key!r} is not a string"
    names = ", ".join(repr(name) for name in list(record)[:8]) or "nothing"
    return f"no {key!r} (the record has {names}; the column can be set with text_key)"


def _with_bos_eos(encoded: Sequence[list[int]], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 2
    tokens = np.empty(int(lengths.sum()), token_dtype(tokenizer.vocab_size))
    at = 0
    for ids in encoded:
        tokens[at] = tokenizer.bos_id
        tokens[at + 1 : at + 1 + len(ids)] = ids
        tokens[at + 1 + len(ids)] = tokenizer.eos_id
        at += len(ids) + 2
    return tokens, lengths


class Example(NamedTuple):
    """One sequence that begins with BOS, and the loss weight of each of its tokens."""

    tokens: list[int]
    weights: list[float]

    def cut(self, size: int) -> "Example":
        """Its first `size` tokens."""
        return Example(self.tokens[:size], self.weights[:size])


class Pair(NamedTuple):
    """A preferred and a rejected answer to the same prompt, each with its prompt before it."""

    chosen: Example
    rejected: Example


class ChatFormat(NamedTuple):
    """How chats become ids."""

    template: Template
    tokenizer: Tokenizer
    train_on: TrainOn = "all"


def chat_documents(lump: Lump, source: SourceConfig, chat: ChatFormat, seq_len: int, problems: Problems) -> Documents:
    """Fine-tuning examples, cut to a row of `seq_len` + 1 tokens. One without any token to learn left is dropped."""
    examples: list[Example] = []
    text_bytes = truncated = dropped = 0
    for number, record in lump.parse(problems):
        try:
            example = chat_example(record, source, chat)
            size = sum(len(text.encode("utf-8")) for text in _texts(record, source))
        except (ValueError, UnicodeEncodeError) as error:
            problems.report(f"{lump.where(number)}: {error}")
            continue
        kept = example.cut(seq_len + 1)
        if not any(kept.weights[1:]):
            dropped += 1
            continue
        truncated += len(kept.tokens) < len(example.tokens)
        text_bytes += size
        examples.append(kept)
    lengths = np.array([len(e.tokens) for e in examples], np.int64)
    dtype = token_dtype(chat.tokenizer.vocab_size)
    tokens = np.array([t for e in examples for t in e.tokens], dtype)
    weights = np.array([w for e in examples for w in e.weights], np.float16)
    return Documents(tokens, lengths, weights, text_bytes, truncated=truncated, dropped=dropped)


def chat_example(record: dict[str, Any], source: SourceConfig, chat: ChatFormat) -> Example:
    """`{"messages"}` through the chat template, or `{"prompt", "completion"}`.

    Prompt and completion as strings are BOS + prompt, then completion + EOS, each encoded by itself; as message lists
    they are one conversation of which the completion is learned.

    Raises:
        ValueError: neither pair of columns, or a conversation that breaks a rule of the template.
    """
    if source.messages_key in record:
        messages = record[source.messages_key]
        if not isinstance(messages, list):
            raise ValueError(f"{source.messages_key!r} is not a list of messages")
        tools = record.get("tools") or ()
        ids, trainable = encode_chat(messages, chat.tokenizer, chat.template, train_on=chat.train_on, tools=tools)
        return Example(ids, [float(t) for t in trainable])
    missing = [k for k in (source.prompt_key, source.completion_key) if k not in record]
    if missing:
        names = ", ".join(repr(name) for name in list(record)[:8]) or "nothing"
        raise ValueError(
            f"neither {source.messages_key!r} nor {source.prompt_key!r} with {source.completion_key!r} (it has {names})"
        )
    return _answer(record[source.prompt_key], record[source.completion_key], chat, source.completion_key)


def preference_pair(record: dict[str, Any], source: SourceConfig, chat: ChatFormat) -> Pair:
    """`{"prompt", "chosen", "rejected"}` as strings or message lists, or `chosen` and `rejected` alone.

    Alone, as message lists, the messages that both begin with are the prompt; as strings, what both begin with up to
    the last white space.

    Raises:
        ValueError: a missing column, equal answers, an empty answer, or two kinds of value.
    """
    chosen, rejected = (_column(record, key) for key in (source.chosen_key, source.rejected_key))
    if type(chosen) is not type(rejected):
        raise ValueError(f"{source.chosen_key!r} and {source.rejected_key!r} are of different kinds")
    if chosen == rejected:
        raise ValueError(f"{source.chosen_key!r} and {source.rejected_key!r} are equal")
    prompt = record.get(source.prompt_key)
    if prompt is None:
        prompt, chosen, rejected = _common_prefix(chosen, rejected)
    return Pair(_answer(prompt, chosen, chat, source.chosen_key), _answer(prompt, rejected, chat, source.rejected_key))


def _column(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        names = ", ".join(repr(name) for name in list(record)[:8]) or "nothing"
        raise ValueError(f"no {key!r} (it has {names})")
    return record[key]


def _answer(prompt: Any, answer: Any, chat: ChatFormat, key: str) -> Example:
    """Prompt and answer as one sequence of which only the answer and its EOS are learned."""
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise ValueError(f"{key!r} is empty")
        before = [chat.tokenizer.bos_id, *chat.tokenizer.encode(prompt)]
        after = [*chat.tokenizer.encode(answer), chat.tokenizer.eos_id]
        return Example(before + after, [0.0] * len(before) + [1.0] * len(after))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise ValueError(f"the prompt and {key!r} must be strings or lists of messages")
    unlearned = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    ids, trainable = encode_chat(unlearned + answer, chat.tokenizer, chat.template)
    return Example(ids, [float(t) for t in trainable])


def _common_prefix(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str):
        n = max(chosen.rfind(" ", 0, n), chosen.rfind("\n", 0, n)) + 1
    if not n:
        raise ValueError("there is no prompt, and the two answers begin differently")
    return chosen[:n], chosen[n:], rejected[n:]


def _texts(record: dict[str, Any], source: SourceConfig) -> Iterator[str]:
    """The strings of a record that are text, for counting bytes."""
    for key in (source.messages_key, source.prompt_key, source.completion_key):
        value = record.get(key)
        for item in value if isinstance(value, list) else [value]:
            text = item.get("content") if isinstance(item, dict) else item
            if isinstance(text, str):
                yield text
