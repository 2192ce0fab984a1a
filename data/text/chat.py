"""Chats to token ids, message by message, with the trainable mask built in.

A chat is never rendered to one string and tokenised afterwards: a space more at a border changes the ids, and
the mask would have to be guessed back. Formats: Mistral's instruct templates v1 (8x7B-Instruct) and v3
(8x22B-Instruct), equal to mistral-common id by id, and ChatML-like ones by description (data/text/template.py).
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mixtral_jax.data.text.template import ChatTokenizer, Template, Turn

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
TrainOn = Literal["all", "last"]
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}\Z")


@dataclass
class _Ids:
    """Token ids growing message by message, each with its mark."""

    ids: list[int] = field(default_factory=list)
    trainable: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], trainable: bool = False) -> None:
        self.ids.extend(ids)
        self.trainable.extend([trainable] * len(ids))


def encode_chat(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    template: Template,
    *,
    train_on: TrainOn = "all",
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], list[bool]]:
    """A whole conversation, which ends with an assistant's message, as (ids, trainable), BOS included.

    Args:
        messages: `{"role", "content"}` each; an assistant's may hold `tool_calls` instead of content, and `weight: 0`
            to leave that answer out of the loss; a tool's holds `tool_call_id`.
        train_on: all answers, or the last one only.
        tools: definitions of functions, `{"type": "function", "function": {...}}`, for templates that know tools.

    Returns:
        ids, and for each whether it is learned: an assistant's tokens and the token that ends them, nothing else.

    Raises:
        ValueError: one sentence that names the message, when the conversation breaks a rule of the template.
    """
    _check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"messages[{len(messages) - 1}]: the conversation ends with role {messages[-1]['role']!r}, "
            "so there is no last answer to learn"
        )
    learned = {len(messages) - 1} if train_on == "last" else set(range(len(messages)))
    return _encode(messages, tokenizer, template, tools, learned)


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    template: Template,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Ids from which the next answer is generated: BOS, the conversation, and the header of the answer if there is one.

    Raises:
        ValueError: as `encode_chat`, and when the conversation ends with the assistant.
    """
    _check_order(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"messages[{len(messages) - 1}]: a prompt must end with the user (or a tool), "
            f"not with role {messages[-1]['role']!r}"
        )
    ids, _ = _encode(messages, tokenizer, template, tools, set())
    return ids + list(template.assistant.open)


def _encode(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    template: Template,
    tools: Sequence[Mapping[str, Any]],
    learned: set[int],
) -> tuple[list[int], list[bool]]:
    out = _Ids()
    out.add(template.bos)
    system = _system_prompt(messages, template)
    if system and template.system:
        _add_turn(out, template.system, system, tokenizer)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    host = users[0 if template.format.system == "first_user" else -1]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            content = message["content"]
            if system and not template.system and i == host:
                content = system + template.format.system_separator + content
            if tools and i == users[-1]:
                out.add(_tool_definitions(tools, tokenizer, template))
            _add_turn(out, template.user, content, tokenizer)
        elif message["role"] == "tool":
            _add_tool_result(out, i, message, tokenizer, template)
        elif message["role"] == "assistant":
            weighted = _weight(i, message) and i in learned
            if message.get("tool_calls"):
                last = i == len(messages) - 1
                _add_tool_calls(out, i, message["tool_calls"], tokenizer, template, weighted, last)
            else:
                answer = message["content"].rstrip(" ") if template.format.strip_answer else message["content"]
                _add_turn(out, template.assistant, answer, tokenizer, weighted)
    return out.ids, out.trainable


def _add_turn(out: _Ids, turn: Turn, content: str, tokenizer: ChatTokenizer, trainable: bool = False) -> None:
    out.add(turn.open)
    out.add(tokenizer.encode(turn.before + content + turn.behind), trainable)
    out.add(turn.close, trainable)
    out.add(turn.after)


def _system_prompt(messages: Sequence[Message], template: Template) -> str:
    prompts = [m["content"] for m in messages if m["role"] == "system" and m["content"]]
    if prompts and template.format.system == "refuse":
        raise ValueError(f"messages[0]: template {template.name} has no place for a system prompt")
    return "\n\n".join(prompts)


def _weight(i: int, message: Message) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"messages[{i}]: weight of an answer must be 0 or 1, got {weight!r}")
    return weight != 0


# ---- tools, in the JSON of Mistral's v3 (mistral-common, InstructTokenizerV3)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> Any:
    """JSON in a string as the value that it stands for; empty is an empty object, no JSON stays text."""
    try:
        return json.loads(text) if text else {}
    except json.JSONDecodeError:
        return text


def _tool_definitions(tools: Sequence[Mapping[str, Any]], tokenizer: ChatTokenizer, template: Template) -> list[int]:
    if template.tool_tokens is None:
        raise ValueError(f"template {template.name} cannot tell the model of tools")
    definitions = []
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{i}]: a tool needs a function with a name")
        body = {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        }
        definitions.append({"type": "function", "function": body})
    tokens = template.tool_tokens
    return [tokens.open_available, *tokenizer.encode(_json(definitions)), tokens.close_available]


def _add_tool_calls(
    out: _Ids,
    i: int,
    calls: Sequence[Mapping[str, Any]],
    tokenizer: ChatTokenizer,
    template: Template,
    trainable: bool,
    last: bool,
) -> None:
    if template.tool_tokens is None:
        raise ValueError(f"messages[{i}]: template {template.name} has no tool calls")
    prepared = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"messages[{i}]: a tool call needs a function with a name")
        arguments = function.get("arguments") or {}
        entry = {
            "name": function["name"],
            "arguments": _parsed(arguments) if isinstance(arguments, str) else arguments,
        }
        id_ = call.get("id")
        if not (last and id_ in (None, "null")):  # only calls that nothing answers may go without an id
            entry["id"] = _call_id(i, id_)
        prepared.append(entry)
    out.add(template.assistant.open)
    out.add([template.tool_tokens.calls, *tokenizer.encode(_json(prepared))], trainable)
    out.add(template.assistant.close, trainable)
    out.add(template.assistant.after)


def _add_tool_result(out: _Ids, i: int, message: Message, tokenizer: ChatTokenizer, template: Template) -> None:
    if template.tool is None:
        raise ValueError(f"messages[{i}]: template {template.name} has no tool messages")
    content = message["content"]
    if template.tool_tokens is not None:
        content = _json({"content": _parsed(content), "call_id": _call_id(i, message.get("tool_call_id"))})
    _add_turn(out, template.tool, content, tokenizer)


def _call_id(i: int, id_: Any) -> str:
    if not isinstance(id_, str) or not _CALL_ID.match(id_):
        raise ValueError(f"messages[{i}]: the id of a tool call must be 9 letters or digits, got {id_!r}")
    return id_


# ---- what a conversation must look like, in every template


def _check_order(messages: Sequence[Message]) -> None:
    """Every message alone, then the order: system*, then user and assistant in turn, tool results after tool calls."""
    if not messages:
        raise ValueError("messages: the conversation is empty")
    previous, waiting = "system", 0  # waiting: tool calls without a result yet
    for i, message in enumerate(messages):
        _check_message(i, message)
        role = message["role"]
        if role not in _followers(previous, waiting):
            raise ValueError(f"messages[{i}]: {_misplaced(role, previous, i, waiting)}")
        if role == "assistant":
            waiting = len(message.get("tool_calls") or ())
        elif role == "tool":
            waiting -= 1
        previous = role
    if previous == "system":
        raise ValueError("messages: the conversation has no user turn")


def _followers(previous: str, waiting: int) -> tuple[str, ...]:
    if waiting:
        return ("tool",)
    return {
        "system": ("system", "user"),
        "user": ("assistant",),
        "assistant": ("user",),
        "tool": ("assistant", "user"),
    }[previous]


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
    if calls and role == "assistant":
        if content:
            raise ValueError(f"messages[{i}]: an answer holds either content or tool_calls, this has both")
        return
    if not isinstance(content, str):
        raise ValueError(f"messages[{i}]: the content of role {role!r} must be a string, got {content!r:.80}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"messages[{i}]: the assistant's answer is empty")
    if _HALF_PAIR.search(content):
        raise ValueError(f"messages[{i}]: the content holds half of a surrogate pair, which no text may")
