"""`data preview`: rows as the model will see them, and the arithmetic of the mixture."""

from contextlib import closing

import numpy as np
from rich.text import Text

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare import prepare
from mixtral_jax.data.reader import RowReader
from mixtral_jax.data.rows import Batch, GlobalOrder, PairBatch
from mixtral_jax.data.text import Tokenizer, load_tokenizer

_LEARNED, _UNLEARNED, _BORDER = "green", "dim", "bold magenta"


def preview(data: DataConfig, *, seq_len: int, seed: int, rows: int = 3) -> list[Text]:
    """Texts to print: what each source is and its share, then the first `rows` rows of the run.

    Learned tokens are green, others dim; `|` begins a document of a row and control tokens stand by their names.
    """
    prepared = prepare(data, seq_len, seed)
    tokenizer = load_tokenizer(data.tokenizer)
    told = [prepared.summary(), *prepared.readings(), ""]
    texts = [*map(Text, told), *map(Text, mixture_lines(data, prepared.order))]
    with closing(RowReader(prepared.train)) as reader:
        for r in range(rows):
            source, number = prepared.order[r]
            row, name = reader.read(source, number), prepared.train[source].name
            learned = int(np.count_nonzero(row.weights))
            head = f"\nrow {r}: row {number} of {name}, {learned} of {seq_len} targets are learned"
            texts += [Text(head, style="bold"), colour(row, tokenizer)]
    return texts


def mixture_lines(data: DataConfig, order: GlobalOrder) -> list[str]:
    """Each source's rows, its share of the run, and how often its rows come in one pass over the data."""
    sizes, total, parts = order.rows, order.total, order.shares
    if parts is None:
        rule = "by size: every row once an epoch"
    elif data.temperature is None:
        rule = "by weight: share = weight / sum of weights"
    else:
        rule = f"by temperature {data.temperature:g}: share ~ (weight * rows)^(1/{data.temperature:g})"
    lines = [f"mixture {rule}; an epoch is {total:,} rows"]
    for source, n, part in zip(data.train, sizes, parts or [n / total for n in sizes], strict=True):
        weight = "" if source.weight is None else f", weight {source.weight:g}"
        lines.append(
            f"  {source.name}: {n:,} rows ({100 * n / total:.1f} % of all){weight} -> "
            f"{100 * part:.1f} % of the run, {part * total / n:.2f} times an epoch"
        )
    return lines


def colour(row: Batch | PairBatch, tokenizer: Tokenizer) -> Text:
    """One row as text; consecutive tokens of one kind are decoded together, so that characters stay whole."""
    tokens = np.concatenate([row.tokens[:1], row.targets])
    learned = np.concatenate([[0.0], row.weights]) > 0
    segments = np.concatenate([row.segment_ids, row.segment_ids[-1:]])
    text = Text()
    last = bool(row.segment_ids[-1] and (row.targets[-1] or row.weights[-1]))  # else there is one place of padding
    start, used = 0, int(np.count_nonzero(row.segment_ids)) + last
    names = {id_: piece for piece in tokenizer.controls if (id_ := tokenizer.id_of(piece)) is not None}
    names |= {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    control = np.isin(tokens, [*names])
    for i in range(1, used + 1):
        same = i < used and learned[i] == learned[start] and segments[i] == segments[start]
        if same and not control[i] and not control[start]:
            continue
        if start == 0 or segments[start] != segments[start - 1]:
            text.append("|", style=_BORDER)
        if control[start]:
            shown = names[int(tokens[start])]
        else:  # behind the token before it, as a piece's leading space shows only after others
            lead = max(start - 1, 0) if start and segments[start] == segments[start - 1] else start
            before = tokenizer.decode(tokens[lead:start].tolist())
            both = tokenizer.decode(tokens[lead:i].tolist())
            alone = not before or not both.startswith(before)
            shown = tokenizer.decode(tokens[start:i].tolist()) if alone else both[len(before) :]
        text.append(shown, style=_LEARNED if learned[start] else _UNLEARNED)
        start = i
    return text
