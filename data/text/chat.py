"""Chats to token ids, message by message, with the trainable mask built in.

A chat is never rendered to one string and tokenised afterwards: a space more at a border changes the ids, and
the mask would have to be guessed back. Formats: Mistral's instruct templates v1 (8x7B-Instruct) and v3
(8x22B-Instruct), equal to mistral-common id by id, and ChatML-like ones by description (data/text/template.py).
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mixtral_jax.data.text.formats import CONTENT, TOOL_TOKENS, TemplateFormat, TurnFormat
from mixtral_jax.data.text.template import Template
from mixtral_jax.data.text.tokenizer import Place

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
Tool = Mapping[str, Any]
TrainOn = Literal["all", "last"]
_TOOL_CALLS, _TOOLS, _END_OF_TOOLS = TOOL_TOKENS
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}\Z")


class Example(NamedTuple):
    """One sequence that begins with BOS, and for each of its tokens whether it is learned."""

    tokens: list[int]
    learned: list[bool]


def encode_chat(
    messages: Sequence[Message], template: Template, *, train_on: TrainOn = "all", tools: Sequence[Tool] = ()
) -> Example:
    """A whole conversation, which ends with an assistant's message, BOS included.

    Args:
        messages: `{"role", "content"}` each; an assistant's may hold `tool_calls` instead of content, and `weight: 0`
            to leave that answer out of the loss; a tool's holds `tool_call_id`.
        train_on: all answers, or the last one only.
        tools: definitions of functions, `{"type": "function", "function": {...}}`, for templates that know tools.

    Returns:
        What is learned are an assistant's tokens and the token that ends them, nothing else.

    Raises:
        ValueError: one sentence that names the message, when the conversation breaks a rule of the template.
    """
    _check_order(messages, template.format)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"messages[{len(messages) - 1}]: the conversation ends with role {messages[-1]['role']!r}, "
            "so there is no last answer to learn"
        )
    learned = {len(messages) - 1} if train_on == "last" else set(range(len(messages)))
    return _encode(messages, template, tools, learned)


def encode_prompt(messages: Sequence[Message], template: Template, *, tools: Sequence[Tool] = ()) -> list[int]:
    """Ids from which the next answer is generated: BOS, the conversation, and the header of the answer if there is one.

    Raises:
        ValueError: as `encode_chat`, and when the conversation ends with the assistant.
    """
    _check_order(messages, template.format)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"messages[{len(messages) - 1}]: a prompt must end with the user (or a tool), "
            f"not with role {messages[-1]['role']!r}"
        )
    return _encode(messages, template, tools, set(), header=True).tokens


def encode_begun(messages: Sequence[Message], template: Template) -> list[int]:
    """Ids of a conversation whose last answer is only begun: what would end it is left out.

    Raises:
        ValueError: as `encode_chat`.
    """
    tokens, learned = encode_chat(messages, template, train_on="last")
    return tokens[: len(learned) - learned[::-1].index(True) - len(template.answer_end)]


def _encode(
    messages: Sequence[Message], template: Template, tools: Sequence[Tool], learned: set[int], *, header: bool = False
) -> Example:
    """`header`: of the next answer, at the end."""
    fmt, out = template.format, _Turns(template)
    system = _system_prompt(messages, fmt)
    if isinstance(fmt.system, TurnFormat) and system:
        out.add_turn(fmt.system, system)
        system = ""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    host = users[0 if fmt.system == "first_user" else -1]
    for i, message in enumerate(messages):
        role = message["role"]
        content: Any = message.get("content")
        content = fmt.stripped(role, content) if isinstance(content, str) else content
        if role == "user":
            if tools and i == users[-1]:
                out.add_tools(tools)
            out.add_turn(fmt.user, system + fmt.system_separator + content if system and i == host else content)
        elif role == "tool":
            out.add_tool_result(i, message)
        elif role == "assistant":
            trainable = _weight(i, message) and i in learned
            if message.get("tool_calls"):
                out.add_tool_calls(i, message["tool_calls"], trainable, last=i == len(messages) - 1)
            else:
                out.add_turn(fmt.assistant, content, trainable)
    if header:
        out.add(fmt.assistant.open)
    out.end_text()
    return Example(out.ids, out.learned)


class _Turns:
    """Token ids growing message by message, each with its mark. Text waits until a control token or `end_text` ends it:
    what stands between two control tokens is encoded as one.
    """

    def __init__(self, template: Template):
        self._template, self._text, self._trainable = template, "", False
        self.ids = [template.tokenizer.bos_id] if template.format.bos else []
        self.learned = [False] * len(self.ids)
        self._calls = 0
        self._waiting: list[tuple[str, str]] = []  # id and function of the calls without a result
        self._place: Place = "control" if self.ids else "start"

    def _add_ids(self, ids: Sequence[int], trainable: bool, place: Place) -> None:
        self.ids.extend(ids)
        self.learned.extend([trainable] * len(ids))
        self._place = place

    def end_text(self) -> None:
        if self._text:
            self._add_ids(self._template.tokenizer.encode(self._text, self._place), self._trainable, "text")
        self._text = ""

    def add_text(self, text: str, trainable: bool = False) -> None:
        if trainable != self._trainable:
            self.end_text()
        self._text, self._trainable = self._text + text, trainable

    def add(self, string: str, trainable: bool = False) -> None:
        """A string of the template."""
        for part in self._template.parts[string]:
            if isinstance(part, str):
                self.add_text(part, trainable)
            else:
                self.end_text()
                self._add_ids([part], trainable, "control")

    def add_turn(self, turn: TurnFormat, content: str, trainable: bool = False, tokens: str = "") -> None:
        """`tokens`: a string of the template before the content."""
        answer = turn == self._template.format.assistant
        before, behind = turn.text.split(CONTENT)
        self.add(turn.open)
        if answer:  # learned or not, its text is encoded by itself
            self.end_text()
        if tokens:
            self.add(tokens, trainable)
        self.add(before, trainable)
        self.add_text(content, trainable)
        self.add(behind, trainable)
        self.add(turn.close, trainable)
        if answer:
            self.end_text()
        self.add(turn.after)

    # tools, in the JSON of Mistral's v3 (mistral-common, InstructTokenizerV3)

    def add_tools(self, tools: Sequence[Tool]) -> None:
        if _TOOLS not in self._template.parts:
            raise ValueError(f"template {self._template.format.name} cannot tell the model of tools")
        definitions = []
        for i, tool in enumerate(tools):
            function = _function(tool, f"tools[{i}]: a tool")
            parameters = function.get("parameters") or {}
            body = {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": _parsed(parameters) if isinstance(parameters, str) else parameters,
            }
            definitions.append({"type": "function", "function": body})
        self.add(_TOOLS)
        self.add(self._template.format.user.text.split(CONTENT)[0])
        self.add_text(_json(definitions))
        self.add(_END_OF_TOOLS)

    def add_tool_calls(self, i: int, calls: Sequence[Mapping[str, Any]], trainable: bool, *, last: bool) -> None:
        if _TOOL_CALLS not in self._template.parts:
            raise ValueError(f"messages[{i}]: template {self._template.format.name} has no tool calls")
        entries = []
        for call in calls:
            function = _function(call, f"messages[{i}]: a tool call")
            arguments = function.get("arguments") or {}
            arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
            entry = {"name": function["name"], "arguments": arguments}
            id_ = call.get("id")
            if not (last and id_ in (None, "", "null")):  # nothing answers the last ones
                entry["id"] = _call_id(f"call{self._calls:05}" if id_ in (None, "") else id_)
                self._waiting.append((entry["id"], entry["name"]))
                self._calls += 1
            entries.append(entry)
        self.add_turn(self._template.format.assistant, _json(entries), trainable, tokens=_TOOL_CALLS)

    def add_tool_result(self, i: int, message: Message) -> None:
        fmt, content = self._template.format, message["content"]
        if fmt.tool is None:
            raise ValueError(f"messages[{i}]: template {fmt.name} has no tool messages")
        if fmt.tool_calls == "mistral-v3":
            value = _parsed(content, parse_float=_finite, parse_constant=_finite)
            content = _json({"content": value, "call_id": self._answered_call(i, message)})
        self.add_turn(fmt.tool, content)

    def _answered_call(self, i: int, message: Message) -> str:
        """The id of the call whose result this is: the one whose id or else function it names, else the next."""
        id_, name, found = message.get("tool_call_id"), message.get("name"), self._waiting
        if id_ not in (None, ""):
            told = f"tool_call_id {id_!r}"
            found = [call for call in self._waiting if call[0] == _call_id(id_)]
        elif name not in (None, "") and len(self._waiting) > 1:
            told = f"name {name!r}"
            found = [call for call in self._waiting if call[1] == name]
        if not found:
            raise ValueError(f"messages[{i}]: {told} is of none of the calls that wait for a result")
        call = found[0]
        self._waiting.remove(call)
        return call[0]


def _system_prompt(messages: Sequence[Message], fmt: TemplateFormat) -> str:
    prompts = [fmt.stripped("system", m["content"]) for m in messages if m["role"] == "system" and m["content"]]
    if prompts and fmt.system == "refuse":
        raise ValueError(f"messages[0]: template {fmt.name} has no place for a system prompt")
    return "\n\n".join(prompts)


def _weight(i: int, message: Message) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"messages[{i}]: weight of an answer must be 0 or 1, got {weight!r}")
    return weight != 0


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # a date, say, of a format that has them; NaN
        raise ValueError(f"a tool holds what JSON cannot: {error}") from None
    utf8_size(text, "the JSON of a tool")
    return text


def _parsed(text: str, **numbers: Any) -> Any:
    """JSON in a string as the value that it stands for; empty is an empty object, no JSON stays text.

    `numbers` are arguments of json.loads that say how they are read.
    """
    try:
        return json.loads(text, **numbers) if text else {}
    except (ValueError, RecursionError):
        return text


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"JSON has no {text}")
    return number


def _function(holder: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    function = holder.get("function") if isinstance(holder, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what} needs a function with a name")
    return function


def _call_id(id_: Any) -> str:
    """An id as Mistral's models know them, 9 letters or digits; one of another form becomes such a one."""
    if isinstance(id_, str) and _CALL_ID.match(id_):
        return id_
    return hashlib.sha256(ascii(id_).encode()).hexdigest()[:9]


# ---- what a conversation must look like, in every template

_FOLLOWERS = {
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("assistant", "user"),  # and another tool, while a call has no result yet
}


def _check_order(messages: Sequence[Message], fmt: TemplateFormat) -> None:
    """Every message alone, then the order: system*, then user and assistant in turn, tool results after tool calls, or
    after any answer where the template has turns for them and calls are text.
    """
    anywhere = fmt.tool is not None and fmt.tool_calls == "refuse"
    if not messages:
        raise ValueError("messages: the conversation is empty")
    previous, waiting = "system", 0  # waiting: tool calls without a result yet
    for i, message in enumerate(messages):
        _check_message(i, message)
        role = message["role"]
        as_text = anywhere and role == "tool" and previous in ("assistant", "tool")
        if role not in (("tool",) if waiting else _FOLLOWERS[previous]) and not as_text:
            raise ValueError(f"messages[{i}]: {_misplaced(role, previous, i, waiting)}")
        if role == "assistant":
            waiting = len(message.get("tool_calls") or ())
        elif role == "tool":
            waiting = max(0, waiting - 1)
        previous = role
    if previous == "system":
        raise ValueError("messages: the conversation has no user turn")


def _misplaced(role: str, previous: str, i: int, waiting: int) -> str:
    if waiting:
        return f"{waiting} tool call(s) have no result yet, but role {role!r} follows"
    if role == previous:
        return f"two {role} turns in a row (messages {i - 1} and {i})"
    if role == "tool":
        return "a tool result that answers no tool call"
    if role == "system":
        return "a system prompt must stand before the first user turn"
    return "the conversation must start with the user (after a system prompt, if any)"


def _check_message(i: int, message: Message) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"messages[{i}]: a message is an object with role and content, got {message!r:.80}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the roles are {', '.join(ROLES)}"
        raise ValueError(f"messages[{i}]: unknown role {role!r}: {hint}")
    calls = message.get("tool_calls")
    if calls and not isinstance(calls, list):
        raise ValueError(f"messages[{i}]: tool_calls must be a list, got {calls!r:.80}")
    if calls and role != "assistant":
        raise ValueError(f"messages[{i}]: tool_calls in a message of role {role!r}")
    if calls:
        if content:
            raise ValueError(f"messages[{i}]: an answer holds either content or tool_calls, this has both")
        return
    if not isinstance(content, str):
        raise ValueError(f"messages[{i}]: the content of role {role!r} must be a string, got {content!r:.80}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"messages[{i}]: the assistant's answer is empty")
    utf8_size(content, f"messages[{i}]: the content")


def utf8_size(text: str, what: str) -> int:
    """Bytes of a text in UTF-8.

    Raises:
        ValueError: `what` is no text: JSON can spell half of a surrogate pair, UTF-8 cannot.
    """
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which no text may") from None
