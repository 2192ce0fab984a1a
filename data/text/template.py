"""Chat templates as data: which token ids stand around each message, and where the system prompt goes.

A template is a description of strings; `load_template` resolves it against one tokenizer into token ids, once,
and refuses a tokenizer that it does not fit. Special tokens are recognised in the *template's own* strings only;
the text of a message is always encoded as plain text: "[INST]" typed by a user never becomes the control token.
Text between two control tokens is encoded as one, as when the rendered chat is tokenised; an answer stands apart from
the text before and behind it, because that is how it is generated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from mixtral_jax.data.text.formats import BUILT_IN, CONTENT, EOS, TOOL_TOKENS, TemplateFormat, TurnFormat, with_space
from mixtral_jax.data.text.jinja import recognise
from mixtral_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer, control_words


@dataclass(frozen=True)
class Template:
    """A format and a tokenizer that it fits; made by `load_template`."""

    format: TemplateFormat
    tokenizer: Tokenizer
    parts: Mapping[str, tuple[int | str, ...]]  # of each string around a message: control tokens by id, and text

    @cached_property
    def words(self) -> re.Pattern[str]:
        """What a text should not hold: BOS, EOS and the marks of any template, which would be encoded as letters."""
        tokenizer = self.tokenizer
        found = {"<s>", "</s>", tokenizer.piece_of(tokenizer.bos_id), tokenizer.piece_of(tokenizer.eos_id)}
        for fmt in (*BUILT_IN.values(), self.format):
            strings = (text for turn in _turns(fmt) for text in (turn.open, turn.text, turn.close, turn.after))
            found |= {*fmt.special, *control_words(" ".join(strings))}
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))

    @property
    def answer_end(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        parts = self.parts[self.format.assistant.close]
        return tuple(
            id_ for part in parts for id_ in ([part] if isinstance(part, int) else self.tokenizer.encode(part, "text"))
        )


def load_template(template: str | Mapping[str, Any] | TemplateFormat | None, tokenizer: Tokenizer) -> Template:
    """A built-in template by name, a description (the keys of TemplateFormat) or `usual_template`, for one tokenizer.

    A description with the name of a built-in one overrides single fields of it: `{name: chatml, bos: true}`. Where the
    chat_template of the tokenizer's own directory is a variant of the one named, with other spaces, say, it is that.

    Raises:
        ValueError: unknown name, a wrong description, or a template that does not fit the tokenizer.
    """
    fmt = _as_written(usual_template(tokenizer) if template is None else _format_of(template), tokenizer)
    if fmt.name == "v1" and (id_ := tokenizer.id_of("[INST]")) is not None:
        raise ValueError(
            f"template v1 writes [INST] as text, but this tokenizer has it as control token {id_}: use template v3"
        )
    required = (*fmt.special, *(TOOL_TOKENS if fmt.tool_calls == "mistral-v3" else ()))
    ids = {EOS: tokenizer.eos_id} | {piece: _special_id(fmt, piece, tokenizer) for piece in required}
    tokenizer.reserve(required)
    texts = {text for turn in _turns(fmt) for text in (turn.open, *turn.text.split(CONTENT), turn.close, turn.after)}
    joint = "".join(texts)
    for piece in tokenizer.controls:
        if piece in joint:
            ids[piece] = _special_id(fmt, piece, tokenizer)
    parts = {text: _resolve(text, ids) for text in (*texts, *required)}
    return Template(fmt, tokenizer, parts)


def _turns(fmt: TemplateFormat) -> list[TurnFormat]:
    return [turn for turn in (fmt.user, fmt.assistant, fmt.tool, fmt.system) if isinstance(turn, TurnFormat)]


def usual_template(tokenizer: Tokenizer) -> TemplateFormat:
    """The template that a tokenizer's directory has, else the one that its control tokens mean.

    Raises:
        ValueError: its chat_template is none that is known.
    """
    if tokenizer.chat_template is not None:
        found = recognise(tokenizer.chat_template, tokenizer)
        if found is None:
            raise ValueError(
                f"the chat_template beside the tokenizer is of no known format: name one of {', '.join(BUILT_IN)} as "
                "the template, or describe it"
            )
        return BUILT_IN[found.name]
    marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "[INST]": "v3"}
    return BUILT_IN[next((name for piece, name in marks.items() if tokenizer.id_of(piece) is not None), "v1")]


def _as_written(fmt: TemplateFormat, tokenizer: Tokenizer) -> TemplateFormat:
    """A format as the tokenizer's directory writes it if it is a built-in one, else with all of its spaces.

    Mistral's with a SentencePiece file are those of mistral-common: a directory's template is for its tokenizer.json.
    """
    ours = fmt.spaces and isinstance(tokenizer, SentencePieceTokenizer)
    if tokenizer.chat_template is not None and fmt == BUILT_IN.get(fmt.name) and not ours:
        found = recognise(tokenizer.chat_template, tokenizer)
        if found is not None and found.name == fmt.name:
            return found
    if not fmt.spaces or tokenizer.spaced == "never":
        return fmt
    turns = {role: turn for role in ("user", "tool", "assistant") if (turn := getattr(fmt, role)) is not None}
    if tokenizer.spaced == "always":  # behind a control token it puts the space itself
        before = fmt.user.text + fmt.user.close + fmt.user.after + fmt.assistant.open
        turns = {} if before.endswith((EOS, *fmt.special)) else {"assistant": fmt.assistant}
    return fmt.model_copy(update={"spaces": False} | {role: with_space(turn) for role, turn in turns.items()})


def _format_of(template: str | Mapping[str, Any] | TemplateFormat) -> TemplateFormat:
    if isinstance(template, TemplateFormat):
        return template
    if isinstance(template, str):
        if template not in BUILT_IN:
            raise ValueError(f"template {template!r} is unknown: use one of {', '.join(BUILT_IN)}, or describe one")
        return BUILT_IN[template]
    base = BUILT_IN.get(str(template.get("name")))
    fields = {**(base.model_dump() if base else {}), **template}
    try:
        return TemplateFormat.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["template", *map(str, first["loc"])])
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _special_id(fmt: TemplateFormat, piece: str, tokenizer: Tokenizer) -> int:
    id_ = tokenizer.id_of(piece)
    if id_ is None:
        raise ValueError(
            f"template {fmt.name} does not fit the tokenizer: it needs the token {piece}, which the vocabulary lacks"
        )
    return id_


def _resolve(text: str, ids: Mapping[str, int]) -> tuple[int | str, ...]:
    """A string of the template: its control pieces by their ids, the rest as text."""
    pieces = sorted(ids, key=len, reverse=True)  # the longest wins where one begins another
    found = re.split("(" + "|".join(map(re.escape, pieces)) + ")", text)
    return tuple(ids[part] if i % 2 else part for i, part in enumerate(found) if part)  # odd places: the pieces
