"""`eval --by-length`: what a longer context is worth on long documents, and how well each place is predicted.

The first is the right of figure 4 of Mixtral 2401.04088, section 3.2.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from mixtral_jax.data.text import Tokenizer
from mixtral_jax.model import Mixtral
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals.long_rows import score_long

_CHARACTERS = 16  # of a token, at most, where text is cut before it is encoded


class Document(NamedTuple):
    """The beginning of a text."""

    ids: list[int]  # from BOS on
    bytes_T: np.ndarray  # UTF-8 bytes of each; 0 of BOS


def long_documents(
    texts: Iterable[str], tokenizer: Tokenizer, lengths: Sequence[int], samples: int,
    advance: Callable[[int], Any] = lambda utf8_bytes: None,
) -> tuple[list[Document], list[int]]:  # fmt: skip
    """Up to `samples` documents of the largest of the lengths that any has, cut to it; and the lengths up to it.

    `advance` is told of the bytes of text that are done.

    Raises:
        UserError: none is as long as the shortest.
    """
    longest, found = max(lengths), list[Document]()
    for text in texts:
        found = sorted([*found, _encoded(text, tokenizer, longest)], key=lambda document: -len(document.ids))[:samples]
        advance(len(text.encode()))
        if len(found) == samples and len(found[-1].ids) == longest:
            break
    most = len(found[0].ids) if found else 0
    reached = [length for length in lengths if length <= most]
    if not reached:
        raise UserError(f"the longest document has {most} tokens, and the shortest of --lengths is {min(lengths)}")
    whole = [document for document in found if len(document.ids) >= reached[-1]]
    return [Document(ids[: reached[-1]], sizes[: reached[-1]]) for ids, sizes in whole], reached


def _encoded(text: str, tokenizer: Tokenizer, longest: int) -> Document:
    text = text[: longest * _CHARACTERS]
    ids, ends = tokenizer.encode_ends(text)
    sizes = np.cumsum([0, *(len(character.encode()) for character in text)])
    bytes_T = np.diff(sizes[[0, 0, *ends]])
    return Document([tokenizer.bos_id, *ids][:longest], bytes_T[:longest])


def loss_by_length(
    model: Mixtral,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    lengths: Sequence[int],
    *,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> dict[str, Any]:
    """{"documents", "position": by stretch of the document, "context": by length of what the model sees}.

    A stretch from a to b are the tokens a ... b - 1 of the documents, given all before them. A context of n tokens is
    BOS and the last n - 1 of the document; of each the same tokens are scored, the last half of the smallest context.

    Args:
        documents: as long as the last of the `lengths`, which go up.
    """
    whole = score_long(model, [document.ids for document in documents], advance=advance)
    nll_BT = -np.pad(np.stack([own.logps_T for own in whole]), ((0, 0), (1, 0)))  # of BOS nothing is asked
    bytes_BT = np.stack([document.bytes_T for document in documents])
    stretches = [
        {"from": a, "to": b, **_measures(nll_BT[:, max(a, 1) : b], bytes_BT[:, max(a, 1) : b])}
        for a, b in pairwise([0, *lengths])
    ]
    tail, contexts = lengths[0] // 2, []
    for length in lengths:
        rows, scored = [[tokenizer.bos_id, *document.ids[1 - length :]] for document in documents], whole
        if length < lengths[-1]:
            scored = score_long(model, rows, first=[length - tail] * len(rows), advance=advance)
        nll_BT = -np.stack([own.logps_T[-tail:] for own in scored])
        contexts.append({"length": length, **_measures(nll_BT, bytes_BT[:, -tail:])})
    return {"documents": len(documents), "position": stretches, "context": contexts}


def _measures(nll: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Of tokens of so many nats and bytes."""
    mean = float(nll.mean())
    bits_per_byte = float(nll.sum()) / math.log(2) / max(int(sizes.sum()), 1)
    return {"tokens": nll.size, "nll": mean, "perplexity": math.exp(min(mean, 700.0)), "bits_per_byte": bits_per_byte}


def by_length_tables(result: dict[str, Any]) -> list[Table]:
    """One of places in the documents, one of lengths of context."""
    places = {f"{row['from']:,} - {row['to'] - 1:,}": row for row in result["position"]}
    contexts = {f"{row['length']:,}": row for row in result["context"]}
    return [_table(f"By position in {result['documents']} documents", places), _table("By tokens of context", contexts)]


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "tokens", "loss", "perplexity", "bits/byte", title=title)
    for column in table.columns:
        column.justify = "right"
    for label, row in rows.items():
        numbers = (f"{row['nll']:.4f}", f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}")
        table.add_row(label, f"{row['tokens']:,}", *numbers)
    return table
