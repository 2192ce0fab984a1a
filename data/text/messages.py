"""Messages as people write them, in our spelling: roles, parts of content, calls of tools, JSON in a string."""

import json
import re
from collections.abc import Mapping
from typing import Any

_MESSAGES_IN_JSON = re.compile(r"\s*\[\s*\{")
_MESSAGES_IN_PYTHON = re.compile(r"\s*(array\()?\[?\s*\{'(role|content|from|value)':")
_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_PARAMETERS = ("parameters", "input_schema", "inputSchema")  # of a tool: ours, Anthropic's, MCP's
_ARGUMENTS = ("arguments", "input", "parameters")  # of a call: ours, Anthropic's, Llama 3's


def conversation(value: Any, what: str) -> list[Any]:
    """Messages in our spelling, from a list of them, JSON of one, a single message, or a column for each key.

    Raises:
        ValueError: none of these, or content with a part that is not text.
    """
    if isinstance(value, str):
        _refuse_python(value, what)
        value = _from_json(value, what) if _MESSAGES_IN_JSON.match(value) else value
    if isinstance(value, Mapping):
        of_each_key = [*value.values()]
        if all(isinstance(values, list) for values in of_each_key) and len({*map(len, of_each_key)}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*of_each_key, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list of messages")
    return [_message(message, f"{what}[{i}]") for i, message in enumerate(value)]


def turns(value: Any, what: str) -> Any:
    """Text as it is, messages in our spelling."""
    if isinstance(value, str):
        _refuse_python(value, what)
        try:
            parsed = json.loads(value) if _MESSAGES_IN_JSON.match(value) else None
        except (ValueError, RecursionError):
            return value
        if not parsed or not all(isinstance(m, dict) and ("role" in m or "from" in m) for m in parsed):
            return value
        value = parsed
    return conversation(value, what) if isinstance(value, list | Mapping) else value


def is_answer(value: Any) -> bool:
    """Whether it is an answer alone, with no question before it: text, or messages that begin with the assistant's."""
    if isinstance(value, str):
        return not _MESSAGES_IN_JSON.match(value)
    first = value[0] if isinstance(value, list) and value else value
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and _ROLES.get(role.lower()) == "assistant"


def truth(label: Any) -> bool | None:
    """Whether a label marks an answer as good, or as bad; None: it is of something else."""
    return _TRUTHS.get(str(label).strip().lower()) if isinstance(label, str | int | float) else None


def _refuse_python(text: str, what: str) -> None:
    if _MESSAGES_IN_PYTHON.match(text):
        raise ValueError(f"{what} holds messages as Python prints them: write them as JSON, with json.dumps")


def _message(message: Any, what: str) -> Any:
    if not isinstance(message, Mapping):
        return message  # whoever encodes it says what is wrong
    result = {key: value for key, value in message.items() if value is not None}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in result and theirs in result:
            result[ours] = result.pop(theirs)
    for name in ("tools", "functions"):
        if result.get(name):
            raise ValueError(f"{what}: {name!r} stand in a message: write them beside {what.split('[')[0]}")
    role = result.get("role")
    if role == "function_call":  # ShareGPT's: the content is JSON of the call
        return {"role": "assistant", "tool_calls": functions(result.get("content"), what, _ARGUMENTS)}
    if isinstance(role, str):
        result["role"] = _ROLES.get(role.lower(), role)
    if isinstance(result.get("content"), list):
        result["content"] = "".join(_text_of_part(part, what) for part in result["content"])
    former = result.pop("function_call", None)  # OpenAI's, of a single call
    calls = functions(result.pop("tool_calls", None) or former, f"{what}: tool_calls", _ARGUMENTS)
    return {**result, "tool_calls": calls} if calls else result


def _text_of_part(part: Any, what: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{what}: the content has a part of type {kind!r}: only parts of text can be learned")
    return part["text"]


def functions(value: Any, what: str, names: tuple[str, ...] = _PARAMETERS) -> list[Any]:
    """Tools or calls as a list, each with its `function`; they come as JSON too, alone, or without that key. What a
    function is given has the first of `names`, whichever it had.
    """
    value = _from_json(value, what) if isinstance(value, str) and value else value
    value = [value] if isinstance(value, Mapping) and value else value or []
    if not isinstance(value, list):
        raise ValueError(f"{what} is neither a list of functions nor JSON of one, got {value!r:.80}")
    items = [_from_json(item, what) if isinstance(item, str) else item for item in value]
    return [_with_function(item, names) if isinstance(item, Mapping) else item for item in items]


def _with_function(item: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    function = item if "name" in item and not item.get("function") else item.get("function")
    if not isinstance(function, Mapping):
        return item  # whoever encodes it says what is wrong
    given = next((function[name] for name in names if function.get(name) is not None), None)
    return {**item, "function": {**function, names[0]: given}}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text, but not JSON: {error}") from None
