"""How people write chats and preferences down, and the shapes that become examples: one table for every kind of file.

A chat becomes `{"messages"}`, or `{"prompt", "completion"}`; a preference `{"prompt", "chosen", "rejected"}`; each with
`tools`. Messages are `{"role", "content"}` with our roles, whatever they were before. Which layout a file has is seen
in its first rows (`layouts_of`), as a single row may allow two readings; a row that lacks those columns is read by
those that it fills.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mixtral_jax.data.config import SourceConfig

VERSION = 1  # part of the cache's fingerprint: raised when a row becomes another example than before
Row = dict[str, Any]

_MESSAGES_IN_JSON = re.compile(r"\s*\[\s*\{")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}


class Layout(NamedTuple):
    """The columns that a row of it fills, how it is read, and what tells it from others with the same columns."""

    columns: tuple[str, ...]
    read: Callable[[Row, SourceConfig], Row | None]  # None: a row without an answer to learn
    fits: Callable[[Row, SourceConfig], bool] = lambda row, source: True
    besides: tuple[str, ...] = ()  # columns that a row may have or not

    def is_filled(self, row: Row) -> bool:
        """Whether the row has all the columns."""
        return all(column in row for column in self.columns)


def columns(source: SourceConfig, kind: str) -> tuple[str, ...]:
    """The columns that examples of a kind may use, as the source calls them."""
    if kind == "text":
        return (source.text_key,)
    table = LAYOUTS[kind]
    layouts = table.values() if source.layout == "auto" else [table[source.layout]]
    names = [name for layout in layouts for name in (*layout.columns, *layout.besides)]
    return tuple(dict.fromkeys(_key(source, name) for name in [*names, "tools"]))


def layouts_of(records: Iterable[Row], source: SourceConfig, kind: str) -> tuple[str, ...]:
    """Names of the layouts of a file's first records: of each set of columns the first that fits most of them."""
    if source.layout != "auto":
        return (source.layout,)
    rows, found = [_filled(record, source) for record in records], []
    for name, layout in LAYOUTS[kind].items():
        own = [row for row in rows if layout.is_filled(row)]
        if own and 2 * sum(_fits(layout, row, source) for row in own) > len(own):
            rows = [row for row in rows if not layout.is_filled(row)]
            found.append(name)
    return tuple(found)


def normalise(record: Row, source: SourceConfig, kind: str, layouts: Sequence[str] = ()) -> tuple[str, Row | None]:
    """The layout of a record, first of all one of `layouts`, and its content in our shape.

    Raises:
        ValueError: no layout has these columns, or what they hold is not what it says.
    """
    row, table = _filled(record, source), LAYOUTS[kind]
    known = layouts if source.layout == "auto" else (source.layout,)
    decided = [set(table[name].columns) for name in known]  # no row has fewer columns, or another reading of them
    for name, layout in table.items():
        another = source.layout == "auto" and not any(decided_on >= {*layout.columns} for decided_on in decided)
        if layout.is_filled(row) and (name in known or (another and _fits(layout, row, source))):
            break
    else:
        raise ValueError(_unknown(record, source, kind, known))
    shape = layout.read(row, source)
    if shape is not None and "tools" in row:
        shape["tools"] = _functions(row["tools"], "'tools'")
    return name, shape


def _key(source: SourceConfig, column: str) -> str:
    return getattr(source, f"{column}_key", column)


def _filled(record: Row, source: SourceConfig) -> Row:
    """The columns that hold something, under our names; formats without null write an empty list or text instead."""
    row = {}
    for column in _COLUMNS:
        value = record.get(_key(source, column))
        if value is not None and value != [] and (value != "" or column in _TEXTS):
            row[column] = value
    if "chosen" in row and "conversations" in row:
        row.setdefault("prompt", row["conversations"])
    return row


def _fits(layout: Layout, row: Row, source: SourceConfig) -> bool:
    try:
        return layout.fits(row, source)
    except ValueError:
        return False


def _unknown(record: Row, source: SourceConfig, kind: str, known: Sequence[str]) -> str:
    has = ", ".join(f"{k!r}{' (empty)' * (record[k] in (None, [], ''))}" for k in list(record)[:8]) or "nothing"
    if known:
        needed = " and ".join(repr(_key(source, column)) for column in LAYOUTS[kind][known[0]].columns)
        return f"layout {known[0]} needs {needed} (it has {has})"
    if kind == "preference":
        missing = next(
            (k for k in (source.chosen_key, source.rejected_key) if record.get(k) in (None, [])), source.chosen_key
        )
        return f"no {missing!r} (it has {has})"
    return f"neither {source.messages_key!r} nor {source.prompt_key!r} with {source.completion_key!r} (it has {has})"


# --- values ---


def conversation(value: Any, what: str) -> list[Any]:
    """Messages in our spelling, from a list of them, JSON of one, a single message, or a column for each key.

    Raises:
        ValueError: none of these, or content with a part that is not text.
    """
    if isinstance(value, str) and _MESSAGES_IN_JSON.match(value):
        value = _from_json(value, what)
    if isinstance(value, Mapping):
        of_each_key = [*value.values()]
        if all(isinstance(values, list) for values in of_each_key) and len({*map(len, of_each_key)}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*of_each_key, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list of messages")
    return [_message(message, f"{what}[{i}]") for i, message in enumerate(value)]


def _turns(value: Any, what: str) -> Any:
    """Text as it is, messages in our spelling."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if _MESSAGES_IN_JSON.match(value) else None
        except ValueError:
            return value
        if not parsed or not all(isinstance(m, dict) and ("role" in m or "from" in m) for m in parsed):
            return value
        value = parsed
    return conversation(value, what) if isinstance(value, list | Mapping) else value


def _message(message: Any, what: str) -> Any:
    if not isinstance(message, Mapping):
        return message  # whoever encodes it says what is wrong
    result = {key: value for key, value in message.items() if value is not None}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in result and theirs in result:
            result[ours] = result.pop(theirs)
    role = result.get("role")
    if role == "function_call":  # ShareGPT's: the content is JSON of the call
        return {"role": "assistant", "tool_calls": _functions(result.get("content"), what)}
    if isinstance(role, str):
        result["role"] = _ROLES.get(role.lower(), role)
    if isinstance(result.get("content"), list):
        result["content"] = "".join(_text_of_part(part, what) for part in result["content"])
    calls = _functions(result.pop("tool_calls", None), f"{what}: tool_calls")
    return {**result, "tool_calls": calls} if calls else result


def _text_of_part(part: Any, what: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{what}: the content has a part of type {kind!r}: only parts of text can be learned")
    return part["text"]


def _functions(value: Any, what: str) -> list[Any]:
    """Tools or calls as a list, each with its `function`; they come as JSON too, alone, or without that key."""
    value = _from_json(value, what) if isinstance(value, str) and value else value
    value = [value] if isinstance(value, Mapping) and value else value or []
    if not isinstance(value, list):
        raise ValueError(f"{what} is neither a list of functions nor JSON of one, got {value!r:.80}")
    items = [_from_json(item, what) if isinstance(item, str) else item for item in value]
    bare = [isinstance(item, Mapping) and "name" in item and not item.get("function") for item in items]
    return [{**item, "function": item} if alone else item for item, alone in zip(items, bare, strict=True)]


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text, but not JSON: {error}") from None


# --- chats ---


def _chat(row: Row, source: SourceConfig) -> Row:
    return {"messages": conversation(row["messages"], repr(source.messages_key))}


def _sharegpt(row: Row, source: SourceConfig) -> Row:
    return {"messages": _system(row) + conversation(row["conversations"], "'conversations'")}


def _system(row: Row) -> list[Row]:
    return [{"role": "system", "content": row["system"]}] if "system" in row else []


def _prompt_completion(row: Row, source: SourceConfig) -> Row:
    keys = {"prompt": source.prompt_key, "completion": source.completion_key}
    return {column: _turns(row[column], repr(key)) for column, key in keys.items()}


def _kto(row: Row, source: SourceConfig) -> Row | None:
    if row.get("label") not in (True, False):
        raise ValueError(f"'label' of an answer must be true or false, got {row.get('label')!r:.40}")
    return _prompt_completion(row, source) if row["label"] else None


def _no_pairs(row: Row, source: SourceConfig) -> Row:
    raise ValueError(
        "a single answer with a label (KTO) is no pair: learn those with label true by stage sft, or write two answers "
        f"to one prompt into {source.chosen_key!r} and {source.rejected_key!r}"
    )


def _alpaca(row: Row, source: SourceConfig) -> Row:
    told = [row["instruction"], *([row["input"]] if "input" in row else [])]
    if not all(isinstance(text, str) for text in told):
        raise ValueError("'instruction' and 'input' must be strings")
    history = row.get("history", [])
    turns = [*(history if isinstance(history, list) else [history]), ["\n\n".join(told), row["output"]]]
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError("'history' is not a list of [question, answer]")
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": _system(row) + messages}


# --- preferences ---


def _pair(row: Row, source: SourceConfig) -> tuple[Any, Any, Any]:
    """Prompt, if there is one, and two answers that differ."""
    keys = (source.chosen_key, source.rejected_key)
    chosen, rejected = (_turns(row[c], repr(key)) for c, key in zip(("chosen", "rejected"), keys, strict=True))
    if type(chosen) is not type(rejected):
        raise ValueError(f"{keys[0]!r} and {keys[1]!r} are of different kinds")
    if chosen == rejected:
        raise ValueError(f"{keys[0]!r} and {keys[1]!r} are equal")
    return _turns(row.get("prompt"), repr(source.prompt_key)), chosen, rejected


def _preference(row: Row, source: SourceConfig) -> Row:
    return dict(zip(("prompt", "chosen", "rejected"), _pair(row, source), strict=True))


def _implicit(row: Row, source: SourceConfig) -> Row:
    """What both begin with is the prompt: whole messages, but the last of each; of text, up to white space."""
    _, chosen, rejected = _pair(row, source)
    if not isinstance(chosen, str | list):
        raise ValueError(f"{source.chosen_key!r} and {source.rejected_key!r} must be strings or lists of messages")
    n, most = 0, min(len(chosen), len(rejected)) - isinstance(chosen, list)
    while n < most and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str):
        n = max(chosen.rfind(" ", 0, n), chosen.rfind("\n", 0, n)) + 1
    if n <= 0:
        raise ValueError("there is no prompt, and the two answers begin differently")
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _repeats_prompt(row: Row, source: SourceConfig) -> bool:
    prompt, *answers = _pair(row, source)
    if isinstance(prompt, str) and isinstance(answers[0], list):
        return all(isinstance(m, Mapping) and m.get("role") != "assistant" for answer in answers for m in answer[:1])
    same_kind = bool(prompt) and type(prompt) is type(answers[0])
    return same_kind and all(answer[: len(prompt)] == prompt for answer in answers)


def _ultrafeedback(row: Row, source: SourceConfig) -> Row:
    prompt, chosen, rejected = _pair(row, source)
    whole = f"{source.chosen_key!r} and {source.rejected_key!r}"
    if not _repeats_prompt(row, source):
        raise ValueError(
            f"{whole} do not begin with {source.prompt_key!r}, as in other rows of the file: "
            "set layout: preference where all of them are answers alone"
        )
    if isinstance(chosen, str):
        return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    shape = _implicit(row, source)
    contents = [m["content"].strip() for m in shape["prompt"] if isinstance(m.get("content"), str)]
    if isinstance(prompt, str) and prompt.strip() not in contents:
        raise ValueError(
            f"{source.prompt_key!r} is none of the messages that {whole} begin with: "
            "set layout: implicit to leave that column out"
        )
    return shape


def _whole_hh(row: Row) -> list[str]:
    """Both answers behind their prompt, which may stand in a column of its own, or in both."""
    prompt, answers = row.get("prompt", ""), [row["chosen"], row["rejected"]]
    if not all(isinstance(text, str) for text in (prompt, *answers)):
        return ["", ""]
    return [answer if answer.startswith(prompt) else prompt + answer for answer in answers]


def _is_hh(row: Row, source: SourceConfig) -> bool:
    return all(map(_HH_TURN.match, _whole_hh(row)))


def _hh(row: Row, source: SourceConfig) -> Row:
    if not _is_hh(row, source):
        raise ValueError(f"{source.chosen_key!r} and {source.rejected_key!r} must begin with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    chosen, rejected = (
        [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
        for parts in map(_HH_TURN.split, _whole_hh(row))
    )
    return _implicit({"chosen": chosen, "rejected": rejected}, source)


_ANSWER = ("prompt", "completion")
_PAIR = ("prompt", "chosen", "rejected")
LAYOUTS: dict[str, dict[str, Layout]] = {
    "chat": {
        "messages": Layout(("messages",), _chat),
        "sharegpt": Layout(("conversations",), _sharegpt, besides=("system",)),
        "kto": Layout((*_ANSWER, "label"), _kto, lambda row, source: isinstance(row["label"], bool)),
        "prompt_completion": Layout(_ANSWER, _prompt_completion),
        "alpaca": Layout(("instruction", "output"), _alpaca, besides=("input", "system", "history")),
    },
    "preference": {
        "hh": Layout(_PAIR[1:], _hh, _is_hh, besides=("prompt",)),
        "ultrafeedback": Layout(_PAIR, _ultrafeedback, _repeats_prompt),
        "preference": Layout(_PAIR, _preference, besides=("conversations",)),
        "implicit": Layout(_PAIR[1:], _implicit),
        "kto": Layout((*_ANSWER, "label"), _no_pairs),
    },
}
_COLUMNS = (
    *dict.fromkeys(c for table in LAYOUTS.values() for each in table.values() for c in each.columns + each.besides),
    "tools",
)
_TEXTS = {*_ANSWER, *_PAIR, "instruction", "output"}  # where empty text is text
