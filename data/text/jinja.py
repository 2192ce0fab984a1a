"""Which of our formats a chat template in jinja is: the one that writes the same for chats made to tell them apart."""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mixtral_jax.data.text.formats import BUILT_IN, CONTENT, EOS, TemplateFormat, TurnFormat, with_space
from mixtral_jax.data.text.tokenizer import Tokenizer

Message = Mapping[str, str]
_STEPS = 100_000  # of one rendering, each a line of Python; a usual template takes some hundreds
CHAT: tuple[Message, ...] = (
    {"role": "user", "content": " a\n b  "},
    {"role": "assistant", "content": " c  d \n "},
    {"role": "user", "content": "e "},
)
_SYSTEM: Message = {"role": "system", "content": " s\n t "}


def recognise(jinja: str, tokenizer: Tokenizer) -> TemplateFormat | None:
    """One of ours, or a variant of it with other spaces, trimming, BOS or place of the system prompt; None: no such.

    Where the template does with a system prompt what no variant does, the format found refuses system prompts.
    """
    return _recognise(jinja, tokenizer.piece_of(tokenizer.bos_id), tokenizer.piece_of(tokenizer.eos_id))


@lru_cache(maxsize=8)
def _recognise(jinja: str, bos: str, eos: str) -> TemplateFormat | None:
    def same(formats: Iterable[TemplateFormat], chat: Sequence[Message], *, prompt: bool) -> list[TemplateFormat]:
        text = _rendered(jinja, chat, prompt, bos, eos)
        return [fmt for fmt in formats if written(fmt, chat, bos, eos, prompt=prompt) == text]

    variants = itertools.chain.from_iterable(map(_variants, BUILT_IN.values()))
    plain = same(same(variants, CHAT, prompt=True), CHAT[:2], prompt=False)
    whole = same(plain, (_SYSTEM, *CHAT), prompt=True)
    return next(iter(whole or [fmt.model_copy(update={"system": "refuse"}) for fmt in plain]), None)


def _variants(fmt: TemplateFormat) -> Iterator[TemplateFormat]:
    strips = [(fmt.trim, fmt.strip_answer), ("none", False), ("answers", False), ("all", False)]
    places = dict.fromkeys((fmt.system, "first_user", "last_user"))
    for bos, asks, answers, (trim, strip), system in itertools.product(
        dict.fromkeys((fmt.bos, True, False)), ("", " "), ("", " "), dict.fromkeys(strips), places
    ):
        turns = {"user": with_space(fmt.user, asks), "assistant": with_space(fmt.assistant, answers)}
        if fmt.tool is not None:
            turns["tool"] = with_space(fmt.tool, asks)
        yield fmt.model_copy(
            update=turns | {"bos": bos, "trim": trim, "strip_answer": strip, "system": system, "spaces": False}
        )


def written(fmt: TemplateFormat, chat: Sequence[Message], bos: str, eos: str, *, prompt: bool) -> str:
    """A chat without tools as text, with the header of the next answer if it is a `prompt`."""
    out, before = bos if fmt.bos else "", ""
    users = [i for i, message in enumerate(chat) if message["role"] == "user"]
    host = users[0 if fmt.system == "first_user" else -1]
    for i, message in enumerate(chat):
        role, content = message["role"], fmt.stripped(message["role"], message["content"])
        turn = getattr(fmt, role)
        if role == "system" and not isinstance(turn, TurnFormat):
            before = content + fmt.system_separator
        else:
            content = before + content if i == host else content
            out += turn.open + turn.text.replace(CONTENT, content) + turn.close + turn.after
    return (out + fmt.assistant.open * prompt).replace(EOS, eos)


def _rendered(jinja: str, chat: Sequence[Message], prompt: bool, bos: str, eos: str) -> str | None:
    """As transformers renders it; None where the template fails or refuses the chat."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            size = math.prod(abs(x) if isinstance(x, int | float) else len(x) for x in (left, right))
            if operator == "**" or size > _STEPS:
                raise TemplateError("too large a number or text")
            return super().call_binop(context, operator, left, right)

    steps = itertools.count()

    def step(*_: Any) -> Any:
        if next(steps) > _STEPS:
            raise TemplateError("too many steps")
        return step

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    names: dict[str, Any] = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": prompt}
    names |= {"raise_exception": refuse, "strftime_now": lambda _: "", "tools": None, "documents": None}
    before = sys.gettrace()
    try:
        template = environment.from_string(jinja)
        sys.settrace(step)  # of every line of it, for a loop in a loop would have no end
        return template.render(messages=[dict(message) for message in chat], **names)
    except Exception:  # whatever a stranger's template does wrong
        return None
    finally:
        sys.settrace(before)
