"""`data preview`: rows as the model will see them, and the arithmetic of the mixture."""

from contextlib import closing
from itertools import pairwise

import numpy as np
from rich.text import Text

from mixtral_jax.data.config import DataConfig, PhaseConfig
from mixtral_jax.data.prepare import PreparedData, prepare
from mixtral_jax.data.reader import RowReader
from mixtral_jax.data.rows import Batch, PairBatch, Position, batches
from mixtral_jax.data.text import Tokenizer, load_tokenizer

_LEARNED, _UNLEARNED, _BORDER = "green", "dim", "bold magenta"
_BEGINNING = Position()


def preview(
    data: DataConfig, *, seq_len: int, seed: int, steps: int, global_batch_size: int, rows: int = 3
) -> list[Text]:
    """Texts to print: what each source is and its share, then the first `rows` rows of each phase.

    Learned tokens are green, others dim; `|` begins a document of a row and control tokens stand by their names.

    Args:
        steps: of the run; 0: as many as data.epochs need.
    """
    prepared = prepare(data, seq_len, seed)
    tokenizer = load_tokenizer(data.tokenizer)
    steps = steps or batches(data.epochs or 1, sum(source.rows for source in prepared.train), global_batch_size)
    told = [prepared.summary(), *prepared.readings(), "", *mixture_lines(prepared, steps, global_batch_size)]
    texts, order = [*map(Text, told)], prepared.order_from(Position(), global_batch_size)
    borders = [step * global_batch_size for step in (*(mixture.from_step for mixture in prepared.mixtures), steps)]
    with closing(RowReader(prepared.train)) as reader:
        for r in (r for first, end in pairwise(borders) for r in range(first, min(first + rows, end))):
            source, number = order[r]
            row, name = reader.read(source, number), prepared.train[source].name
            learned = int(np.count_nonzero(row.weights))
            head = f"\nrow {r}: row {number} of {name}, {learned} of {seq_len} targets are learned"
            texts += [Text(head, style="bold"), colour(row, tokenizer)]
    return texts


def mixture_lines(
    prepared: PreparedData, steps: int, global_batch_size: int, position: Position = _BEGINNING
) -> list[str]:
    """Of each phase from a position on: its rows, and of each source its share of them and its epochs so far."""
    order, phases, mixtures = prepared.order_from(position, global_batch_size), prepared.config.mixed, prepared.mixtures
    sizes, lines = {source.name: source.rows for source in prepared.train}, list[str]()
    borders = [max(step, position.step) for step in (*(mixture.from_step for mixture in mixtures), steps)]
    for i, (begin, end) in enumerate(pairwise(borders)):
        if begin == end:  # it is over
            continue
        first, last = (position.row + (step - position.step) * global_batch_size for step in (begin, end))
        name = f"phase {i + 1} of {len(phases)}, steps {begin:,} to {end:,}: " if len(phases) > 1 else ""
        lines.append(f"{name}mixture {_rule(phases[i])}; rows {first:,} to {last:,}")
        before, behind, weights = order.drawn(first), order.drawn(last), phases[i].weights
        for source, share in mixtures[i].shares.items():
            n, count = sizes[source], behind[source] - before[source]
            weight = "" if weights is None else f", weight {weights[source]:g}"
            lines.append(
                f"  {source}: {n:,} rows{weight} -> {100 * float(share):.4g} % of the rows, {count:,} of them; "
                f"epochs {before[source] / n:.2f} to {behind[source] / n:.2f}"
            )
    return lines


def _rule(phase: PhaseConfig) -> str:
    if phase.temperature is not None:
        return f"by temperature {phase.temperature:g}: share ~ (weight * rows)^(1/{phase.temperature:g})"
    return "by size: every row once an epoch" if phase.weights is None else "by weight: share = weight / sum of weights"


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
