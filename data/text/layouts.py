"""How people write chats and preferences down, and the shapes that become examples: one table for every kind of file.

A chat becomes `{"messages"}`, or `{"prompt", "completion"}`; a preference `{"prompt", "chosen", "rejected"}`; each with
`tools`. Messages are `{"role", "content"}` with our roles, whatever they were before. Which layout a file has is seen
in its first rows (`layouts_of`), as a single row may allow two readings; a row that lacks those columns is read by
those that it fills. Beside every layout may stand a system prompt, tools, and a label that marks the answer as bad.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.text.messages import conversation, functions, is_answer, truth, turns

VERSION = 1  # part of the cache's fingerprint: raised when a row becomes another example than before
Row = dict[str, Any]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


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
    names += [*_BESIDE, *(_QUESTIONS if kind == "preference" else ())]
    keys = [key for name in names for key in (_key(source, name), *_SPELLINGS.get(name, ()))]
    return tuple(dict.fromkeys(keys))


def layouts_of(records: Iterable[Row], source: SourceConfig, kind: str) -> tuple[str, ...]:
    """Names of the layouts of a file's first records: of each set of columns the first that fits most of them.

    Raises:
        ValueError: none of them has a column that the source names.
    """
    records = list(records)
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        key = _key(source, name)
        if key != name and key in columns(source, kind) and records and not any(key in record for record in records):
            raise ValueError(
                f"source {source.name!r} sets {name}_key: {key!r}, a column that none of the first records has "
                f"(they have {_names(records[0])}): set it right, or leave it out"
            )
    if source.layout != "auto":
        return (source.layout,)
    rows: list[Row] = []
    for record in records:
        with contextlib.suppress(ValueError):  # a bad record, which shows nothing
            rows.append(_filled(record, source))
    found = []
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
    if known and "kto" not in known and not isinstance(row.get("label"), bool):
        row.pop("label", None)  # of something else, as in the first rows
    # no row has fewer columns, or another reading of them; in a file of labels none lacks its own
    decided = [{*table[name].columns, *(table[name].besides if name == "kto" else ())} for name in known]
    for name, layout in table.items():
        another = source.layout == "auto" and not any(decided_on >= {*layout.columns} for decided_on in decided)
        if layout.is_filled(row) and (name in known or (another and _fits(layout, row, source))):
            break
    else:
        raise ValueError(_unknown(record, source, kind, known))
    shape = layout.read(row, source)
    return name, None if shape is None else _beside(row, shape)


def with_beside(record: Row, source: SourceConfig, shape: Row) -> Row:
    """`messages` or a `prompt` of a record, with the system prompt and the tools of columns of their own.

    Raises:
        ValueError: what the columns hold is neither.
    """
    return _beside(_filled(record, source), shape)


def _beside(row: Row, shape: Row) -> Row:
    if "system" in row:
        _put_system(row["system"], shape)
    if "tools" in row:
        shape["tools"] = functions(row["tools"], "'tools'")
    return shape


def _put_system(text: Any, shape: Row) -> None:
    """A system prompt of a column of its own, before the conversation, unless that begins with it; in texts there is no
    place for it, which whoever encodes them says.
    """
    where = "messages" if "messages" in shape else "prompt"
    messages = shape[where]
    if isinstance(messages, str) and any(isinstance(shape.get(c), str) for c in ("completion", "chosen")):
        shape["system"] = text
        return
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    system = {"role": "system", "content": text}
    if isinstance(messages, list) and system not in messages:
        shape[where] = [system, *messages]


def _key(source: SourceConfig, column: str) -> str:
    if column == "conversations" and source.layout == "sharegpt" and source.messages_key != "messages":
        return source.messages_key
    return getattr(source, f"{column}_key", column)


def _filled(record: Row, source: SourceConfig) -> Row:
    """The columns that hold something, under our names; formats without null write an empty list or text instead."""
    row: Row = {}
    for column in _COLUMNS:
        for key in (*_SPELLINGS.get(column, ()), _key(source, column)):
            value = record.get(key)
            if value is not None and value != [] and (value != "" or column in _TEXTS):
                row.setdefault(column, value)
    if {"chosen", "rejected"} <= row.keys() and not row.get("prompt"):
        prompt = _question(row) if source.prompt_key == "prompt" else None
        if prompt is not None:
            row["prompt"] = prompt
        elif not all(isinstance(row[column], str) and is_answer(row[column]) for column in ("chosen", "rejected")):
            row.pop("prompt", None)  # empty text before whole conversations
    return row


def _question(row: Row) -> Any:
    """The prompt of answers that stand alone, where a column of another name holds it; text there is a user's turn."""
    answers = [row["chosen"], row["rejected"]]
    if not all(map(is_answer, answers)):
        return None
    name = next((name for name in _QUESTIONS if row.get(name)), None)
    if name is None or name in ("conversations", "messages"):
        return name and row[name]
    if isinstance(answers[0], str) and isinstance(answers[1], str):
        both = answers[0][: _common(*answers)]
        if _HH_TURN.match(both) or re.search(rf"(?<!\w){re.escape(str(row[name]))}(?!\w)", both):
            return None  # the question is in the answers
    return _asked({**row, "instruction": row[name]} if name != "input" else {"instruction": row[name]})


def _names(record: Row) -> str:
    return ", ".join(f"{k!r}{' (empty)' * (record[k] in (None, [], ''))}" for k in list(record)[:8]) or "nothing"


def _fits(layout: Layout, row: Row, source: SourceConfig) -> bool:
    try:
        return layout.fits(row, source)
    except ValueError:
        return False


def _unknown(record: Row, source: SourceConfig, kind: str, known: Sequence[str]) -> str:
    has = _names(record)
    if known:
        needed = " and ".join(repr(_key(source, column)) for column in LAYOUTS[kind][known[0]].columns)
        needed = "a chat and 'label'" if (kind, known[0]) == ("chat", "kto") else needed
        return f"layout {known[0]} needs {needed} (it has {has})"
    if kind == "preference":
        missing = next(
            (k for k in (source.chosen_key, source.rejected_key) if record.get(k) in (None, [])), source.chosen_key
        )
        return f"no {missing!r} (it has {has})"
    return f"neither {source.messages_key!r} nor {source.prompt_key!r} with {source.completion_key!r} (it has {has})"


# --- chats ---


def _chat(column: str) -> Layout:
    def read(row: Row, source: SourceConfig) -> Row:
        return {"messages": conversation(row[column], repr(_key(source, column)))}

    return Layout((column,), read)


def _prompt_completion(row: Row, source: SourceConfig) -> Row:
    keys = {"prompt": source.prompt_key, "completion": source.completion_key}
    return {column: turns(row[column], repr(key)) for column, key in keys.items()}


def _labelled(row: Row) -> Layout | None:
    """How the chat beside a label is written."""
    return next((each for name, each in LAYOUTS["chat"].items() if name != "kto" and each.is_filled(row)), None)


def _kto(row: Row, source: SourceConfig) -> Row | None:
    good, chat = truth(row["label"]), _labelled(row)
    if good is None:
        raise ValueError(
            f"'label' of an answer must be true or false, got {row['label']!r:.40}: where it is no mark of good and "
            "bad answers, set layout to that of the chats"
        )
    if chat is None:
        raise ValueError("there is no chat beside 'label'")
    return chat.read(row, source) if good else None


def _no_pairs(row: Row, source: SourceConfig) -> Row:
    raise ValueError(
        "a single answer with a label (KTO) is no pair: learn those with label true by stage sft, or write two answers "
        f"to one prompt into {source.chosen_key!r} and {source.rejected_key!r}"
    )


def _asked(row: Row) -> list[Row]:
    """The turns before the answer to an instruction."""
    told = [row["instruction"], row.get("input", "")]
    if not all(isinstance(text, str) for text in told):
        raise ValueError("'instruction' and 'input' must be strings")
    history = row.get("history", [])
    before = history if isinstance(history, list) else [history]
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in before):
        raise ValueError("'history' is not a list of [question, answer]")
    said = [text for turn in before for text in turn] + ["\n\n".join(filter(None, told))]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def _alpaca(row: Row, source: SourceConfig) -> Row:
    return {"messages": [*_asked(row), {"role": "assistant", "content": row["output"]}]}


# --- preferences ---


def _pair(row: Row, source: SourceConfig) -> tuple[Any, Any, Any]:
    """Prompt, if there is one, and two answers that differ."""
    keys = (source.chosen_key, source.rejected_key)
    chosen, rejected = (turns(row[c], repr(key)) for c, key in zip(("chosen", "rejected"), keys, strict=True))
    if type(chosen) is not type(rejected):
        raise ValueError(f"{keys[0]!r} and {keys[1]!r} are of different kinds")
    if chosen == rejected:
        raise ValueError(f"{keys[0]!r} and {keys[1]!r} are equal")
    return turns(row.get("prompt"), repr(source.prompt_key)), chosen, rejected


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items, or letters, both begin with."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _preference(row: Row, source: SourceConfig) -> Row:
    return dict(zip(("prompt", "chosen", "rejected"), _pair(row, source), strict=True))


def _implicit(row: Row, source: SourceConfig) -> Row:
    """What both begin with is the prompt: whole messages, but the last of each; of text, up to white space."""
    _, chosen, rejected = _pair(row, source)
    if not isinstance(chosen, str | list):
        raise ValueError(f"{source.chosen_key!r} and {source.rejected_key!r} must be strings or lists of messages")
    most = min(len(chosen), len(rejected)) - isinstance(chosen, list)
    n = min(most, _common(chosen, rejected))
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
_ALPACA = ("instruction", "input", "history", "output")
LAYOUTS: dict[str, dict[str, Layout]] = {
    "chat": {
        "kto": Layout(
            ("label",),
            _kto,
            lambda row, source: truth(row["label"]) is not None and _labelled(row) is not None,
            besides=("messages", "conversations", *_ANSWER, *_ALPACA),
        ),
        "messages": _chat("messages"),
        "sharegpt": _chat("conversations"),
        "prompt_completion": Layout(_ANSWER, _prompt_completion),
        "alpaca": Layout(("instruction", "output"), _alpaca, besides=("input", "history")),
    },
    "preference": {
        "hh": Layout(_PAIR[1:], _hh, _is_hh, besides=("prompt",)),
        "ultrafeedback": Layout(_PAIR, _ultrafeedback, _repeats_prompt),
        "preference": Layout(_PAIR, _preference),
        "implicit": Layout(_PAIR[1:], _implicit),
        "kto": Layout((*_ANSWER, "label"), _no_pairs),
    },
}
_BESIDE = ("system", "label", "tools")  # of every layout
# where a pair has its question, if it has no prompt
_QUESTIONS = ("conversations", "messages", "question", "query", "problem", "instruction", "input")
_SPELLINGS = {"system": ("system_prompt", "system_message"), "label": ("kto_tag",), "tools": ("functions",)}
_COLUMNS = dict.fromkeys(
    [c for table in LAYOUTS.values() for each in table.values() for c in (*each.columns, *each.besides)]
    + [*_BESIDE, *_QUESTIONS]
)
_TEXTS = {*_ANSWER, *_PAIR, "instruction", "output"}  # where empty text is text
