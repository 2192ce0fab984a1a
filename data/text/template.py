"""Chat templates as data: which token ids stand around each message, and where the system prompt goes.

A template is a description of strings; `load_template` resolves it against one tokenizer into token ids, once,
and refuses a tokenizer that it does not fit. Special tokens are recognised in the *template's own* strings only;
the text of a message is always encoded as plain text: "[INST]" typed by a user never becomes the control token.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from mixtral_jax.data.config import FrozenConfig
from mixtral_jax.data.text.tokenizer import Tokenizer

EOS = "{eos}"  # in `open`, `close` and `after`: the tokenizer's own end-of-sequence token, whatever its piece is called
CONTENT = "{content}"


class TurnFormat(FrozenConfig):
    """One message = ids of `open`, then of `text` with the content in it (one encode), then of `close` and `after`.

    Of an assistant's message, `text` and `close` are trainable; `open` and `after` never are. Generation starts after
    the assistant's `open`.
    """

    open: str = ""
    text: str = CONTENT
    close: str = ""
    after: str = ""

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if self.text.count(CONTENT) != 1:
            raise ValueError(f"text must hold {CONTENT} exactly once, got {self.text!r}")
        return self


class TemplateFormat(FrozenConfig):
    """A template before it meets a tokenizer; the fields are the keys of a template in YAML."""

    name: str = "custom"
    bos: bool = True
    special: tuple[str, ...] = ()  # pieces that stand for one token each in open, close and after
    user: TurnFormat
    assistant: TurnFormat
    tool: TurnFormat | None = None
    system: TurnFormat | Literal["first_user", "last_user", "refuse"] = "refuse"
    system_separator: str = "\n\n"  # between the system prompt and the user turn that it is put in front of
    strip_answer: bool = False  # drop trailing spaces of an answer, as Mistral's v3 does
    tool_calls: Literal["refuse", "mistral-v3"] = "refuse"

    @model_validator(mode="after")
    def _answers_end(self) -> Self:
        if not self.assistant.close:
            raise ValueError(f"assistant.close is empty: an answer needs a last token, such as {EOS}")
        return self


V1 = TemplateFormat(
    name="v1",
    user=TurnFormat(text="[INST] {content} [/INST]"),
    assistant=TurnFormat(close=EOS),
    system="first_user",
)
V3 = TemplateFormat(
    name="v3",
    special=("[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    user=TurnFormat(open="[INST]", close="[/INST]"),
    assistant=TurnFormat(close=EOS),
    tool=TurnFormat(open="[TOOL_RESULTS]", close="[/TOOL_RESULTS]"),
    system="last_user",
    strip_answer=True,
    tool_calls="mistral-v3",
)
# Role and content of a prompt are encoded together, as when the rendered chat is tokenised; an answer is apart from
# its header, because that is how it is generated.
CHATML = TemplateFormat(
    name="chatml",
    bos=False,
    special=("<|im_start|>", "<|im_end|>"),
    system=TurnFormat(open="<|im_start|>", text="system\n{content}", close="<|im_end|>", after="\n"),
    user=TurnFormat(open="<|im_start|>", text="user\n{content}", close="<|im_end|>", after="\n"),
    tool=TurnFormat(open="<|im_start|>", text="tool\n{content}", close="<|im_end|>", after="\n"),
    assistant=TurnFormat(open="<|im_start|>assistant\n", close="<|im_end|>", after="\n"),
)
BUILT_IN = {"v1": V1, "v3": V3, "chatml": CHATML}
TOOL_TOKENS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")  # of v3


@dataclass(frozen=True)
class Template:
    """A format and a tokenizer that it fits; made by `load_template`."""

    format: TemplateFormat
    tokenizer: Tokenizer
    ids: Mapping[str, tuple[int, ...]]  # of each string around a message, and of the tokens around tools

    @property
    def answer_end(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.ids[self.format.assistant.close]


def load_template(template: str | Mapping[str, Any], tokenizer: Tokenizer) -> Template:
    """A built-in template by name (v1, v3, chatml) or a description (the keys of TemplateFormat), in ids.

    A description with the name of a built-in one overrides single fields of it: `{name: chatml, bos: true}`.

    Raises:
        ValueError: unknown name, a wrong description, or a template that does not fit the tokenizer.
    """
    fmt = _format_of(template)
    if fmt.name == "v1" and (id_ := tokenizer.id_of("[INST]")) is not None:
        raise ValueError(
            f"template v1 writes [INST] as text, but this tokenizer has it as control token {id_}: use template v3"
        )
    ids: dict[str, tuple[int, ...]] = {}
    if fmt.tool_calls == "mistral-v3":
        ids = {name: (_special_id(fmt, name, tokenizer),) for name in TOOL_TOKENS}
    for turn in (fmt.user, fmt.assistant, fmt.tool, fmt.system):
        if isinstance(turn, TurnFormat):
            ids |= {text: _resolve(fmt, text, tokenizer) for text in (turn.open, turn.close, turn.after)}
    return Template(fmt, tokenizer, ids)


def _format_of(template: str | Mapping[str, Any]) -> TemplateFormat:
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
    if piece == EOS:
        return tokenizer.eos_id
    id_ = tokenizer.id_of(piece)
    if id_ is None:
        raise ValueError(
            f"template {fmt.name} does not fit the tokenizer: it needs the token {piece}, which the vocabulary lacks"
        )
    return id_


def _resolve(fmt: TemplateFormat, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of a string of the template: its special pieces are one token each, the rest is plain text."""
    pieces = sorted((EOS, *fmt.special), key=len, reverse=True)  # the longest wins where one begins another
    ids: list[int] = []
    for i, part in enumerate(re.split("(" + "|".join(map(re.escape, pieces)) + ")", text)):
        if part:
            ids += [_special_id(fmt, part, tokenizer)] if i % 2 else tokenizer.encode(part)  # odd places: the pieces
    return tuple(ids)
