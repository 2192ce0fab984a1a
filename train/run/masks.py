"""What of the data is learned, said before a run starts: a mask that is all or nothing is nearly always a mistake."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from mixtral_jax.data.loader import RowReader
from mixtral_jax.data.prepare import PreparedSource
from mixtral_jax.data.text import Template, Tokenizer, load_template, usual_template
from mixtral_jax.train.config import TuningConfig
from mixtral_jax.train.errors import UserError

LOOKED_AT = 8  # rows of each source


def mask_lines(config: TuningConfig, sources: Sequence[PreparedSource], tokenizer: Tokenizer) -> Iterator[str]:
    """One line for each source: the share of its tokens that is learned, and whether the end of an answer is.

    Raises:
        UserError: all targets of a source are learned, or none, and allow_any_mask is not set.
    """
    template = load_template(config.data.template, tokenizer)
    yield _format_line(template, named=config.data.template is not None)
    for source in sources:
        targets = source.tokens - source.documents
        share = source.targets / max(targets, 1)
        if not 0 < share < 1 and not config.allow_any_mask:
            raise UserError(
                f"source {source.name!r}: {source.targets:,} of {targets:,} tokens ({100 * share:.0f} %) are learned, "
                "prompts included or answers left out: mend the data, or set allow_any_mask: true"
            )
        ends = "is learned" if _end_is_learned(template, source) else "IS NOT learned: it may never stop"
        yield f"{source.name}: {100 * share:.1f} % of {targets:,} tokens are learned; the end of an answer {ends}"


def _format_line(template: Template, named: bool) -> str:
    """How chats are written, and whether the tokenizer's directory has another way."""
    name, tokenizer = template.format.name, template.tokenizer
    if not named or tokenizer.chat_template is None:
        return f"chats are written as {name}"
    try:
        usual = usual_template(tokenizer).name
    except ValueError:
        usual = "none that is known"
    return f"chats are written as {name}" + f"; the tokenizer's own chat_template is {usual}" * (usual != name)


def _end_is_learned(template: Template, source: PreparedSource) -> bool:
    """Whether the first rows have an end-of-answer token with a weight."""
    ends = [template.tokenizer.eos_id, *template.answer_end]
    with closing(RowReader((source,))) as reader:
        rows = [reader.read(0, r) for r in range(min(LOOKED_AT, source.rows))]
    return any(bool(np.any(np.isin(row.targets, ends) & (row.weights > 0))) for row in rows)
