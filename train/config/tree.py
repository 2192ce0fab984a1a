"""Strict YAML 1.2 and `a.b=c` overrides, read into a plain tree that remembers where each value came from.

A tree is what YAML can say: dicts with string keys, lists, numbers, booleans, strings, null. A dotted path
names a place in it; elements of a list are numbered from 0 (`data.train.0.weight`). YAML 1.2 means that `1e-4`
and `1e6` are numbers while `no`, `on`, `12:30` and dates are strings, which is not what PyYAML makes of them.
"""

import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from mixtral_jax.train.errors import UserError

OVERRIDE = "override"
_DEEPEST, _MOST = 100, 100_000  # nesting and values of a file; aliases can make a billion of a few lines


@dataclass
class Tree:
    """Nested values and, for every dotted path in them, the place that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def find(self, path: str) -> tuple[bool, Any]:
        """Whether something stands at `path`, and what."""
        place: Any = self.values
        for part in path.split("."):
            if isinstance(place, dict) and part in place:
                place = place[part]
            elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            else:
                return False, None
        return True, place

    def set(self, path: str, value: Any, origin: str) -> None:
        """Put a value in place of what stands at `path`; sections that are absent are made.

        Raises:
            UserError: the path leads through a value that has no parts, or beyond the end of a list.
        """
        place: Any = self.values
        *above, last = path.split(".")
        here = ""
        for part in above:
            slot = _slot(place, part, here)
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place, here = place[slot], _join(here, part)
        place[_slot(place, last, here)] = value
        self.origins = {p: o for p, o in self.origins.items() if not p.startswith(f"{path}.")}
        self.origins |= dict.fromkeys([path, *paths(value, path)], origin)

    def merge(self, path: str, value: Any, origin: str) -> None:
        """Set the keys of a dict one by one where a section stands; `{preset: ...}` and all else as `set` does."""
        if isinstance(value, dict) and "preset" not in value and isinstance(self.find(path)[1], dict):
            for key, child in value.items():
                self.merge(f"{path}.{key}", child, origin)
        else:
            self.set(path, value, origin)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The content of a YAML file with overrides applied in order.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file is no YAML 1.2 mapping, repeats a key, or an override cannot be applied; all the
            problems of the overrides are named at once.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"configuration file {path} is no regular file: it is a directory, a pipe or a device")
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {path} does not exist{_similar_file(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    return override(tree_from_text(text, str(path)), overrides)


def override(tree: Tree, overrides: Sequence[str]) -> Tree:
    """The tree with overrides applied in order.

    Raises:
        UserError: some cannot be applied; all of them are named.
    """
    problems = []
    for key, value in split_overrides(overrides):
        try:
            tree.set(key, parse_value(value), OVERRIDE)
        except UserError as error:
            problems.append(f"override {key}={value}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return tree


def tree_from_text(text: str, name: str = "text") -> Tree:
    """Parse YAML; `name` is what errors and origins call the text."""
    reader = _Reader(name)
    node = reader.compose(text)
    if node is None:
        raise UserError(f"{name} is empty")
    if not isinstance(node, MappingNode):
        raise UserError(f"{name} must hold `key: value` lines at its top level")
    return Tree(reader.value(node), reader.origins)


def parse_value(text: str) -> Any:
    """One YAML value, as overrides write it: `1e-4` a number, `null`, `[1, 2]`, `no` a string."""
    reader = _Reader(repr(text))
    node = reader.compose(text)
    return None if node is None else reader.value(node)


def split_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`a.b=c`, `--a.b=c` and `--a.b c` as (path, text) pairs.

    Raises:
        UserError: an argument is none of the three, each named on a line of its own.
    """
    pairs, problems = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.partition("=")
        if not equals and argument.startswith("--") and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        key = key.removeprefix("--")
        if not equals:
            problems.append(f"override {argument!r} has no value: write {key or 'key'}=value")
        elif not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
            problems.append(f"override {argument!r}: {key!r} is no dotted path such as optimizer.learning_rate")
        else:
            pairs.append((key, text))
    if problems:
        raise UserError("\n".join(problems))
    return pairs


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The dotted path of everything inside a value, sections and lists before their parts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield _join(path, key)
        yield from paths(child, _join(path, key))


def to_yaml(values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
    """YAML 1.2 that `tree_from_text` reads back as the same tree; `notes` become comments, by dotted path."""
    yaml, stream = YAML(), io.StringIO()
    yaml.width = 2**31  # no line is broken
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml.dump(_commented(dict(values), "", notes or {}), stream)
    return stream.getvalue()


def show(value: Any) -> str:
    """A value as one would write it in YAML, cut to one readable line."""
    text = value if isinstance(value, str) and _is_plain(value) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Reads one text; keeps the line of each dotted path."""

    def __init__(self, name: str):
        self.name, self.origins = name, dict[str, str]()
        self._left = _MOST
        self._yaml = YAML(typ="safe", pure=True)

    def compose(self, text: str) -> Node | None:
        """The nodes of the text, which know their lines."""
        self._left += len(text)  # without aliases there are no more values than letters
        try:
            if re.search(rf"([\[{{][\w\s:]*){{{_DEEPEST}}}", text):  # the library takes very long to find that out
                raise RecursionError
            return self._yaml.compose(io.StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"{self.name}{where}: not valid YAML: {error.problem or error.context}") from None
        except RecursionError:
            raise UserError(f"{self.name}: it is nested more than {_DEEPEST} deep") from None
        except YAMLError as error:
            raise UserError(f"{self.name}: not valid YAML: {' '.join(str(error).split())}") from None

    def value(self, node: Node, path: str = "") -> Any:
        """What a node stands for."""
        self._left -= 1
        if self._left < 0:
            raise UserError(f"{self.name}, line {_line(node)}: its aliases make more than {_MOST:,} values of it")
        if path.count(".") >= _DEEPEST:
            where = f"{self.name}, line {_line(node)}: {path[:20]}..."
            raise UserError(f"{where} is nested more than {_DEEPEST} deep: does an alias refer to itself?")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            for i, child in enumerate(node.value):
                self.origins[_join(path, i)] = f"{self.name}:{_line(child)}"
            return [self.value(child, _join(path, i)) for i, child in enumerate(node.value)]
        if str(node.tag).rpartition(":")[2] in ("str", "timestamp", "value"):  # a date and `=` are text here
            try:
                node.value.encode()
            except UnicodeEncodeError:
                where = f"{self.name}, line {_line(node)}"
                raise UserError(f"{where}: {path} = {node.value!a} is no Unicode text: half a surrogate pair") from None
            return node.value
        try:
            value = self._yaml.constructor.construct_object(node)
            str(value)  # refuses integers of thousands of digits
            return value
        except (ConstructorError, ValueError):
            where = f"{self.name}, line {_line(node)}"
            raise UserError(f"{where}: the tag {node.tag} is not supported for {node.value!r:.60}") from None

    def _mapping(self, node: MappingNode, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, _line(key_node)
            if not isinstance(key, str) or key == "<<":
                raise UserError(f"{self.name}, line {line}: a key must be a plain word")
            here = _join(path, key)
            if key in result:
                raise UserError(f"{self.name}, line {line}: {here} was set in line {lines[key]} already")
            lines[key], self.origins[here] = line, f"{self.name}:{line}"
            result[key] = self.value(value_node, here)
        return result


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _slot(place: Any, part: str, here: str) -> str | int:
    """What stands for `part` in the section or list `place`, which is at the path `here`."""
    if isinstance(place, list):
        if not part.isdigit() or int(part) >= len(place):
            raise UserError(f"{here} is a list of {len(place)}: its elements are {here}.0 to {here}.{len(place) - 1}")
        return int(part)
    if not isinstance(place, dict):
        raise UserError(f"{here} is {show(place)}, which has no parts")
    return part


def _commented(value: Any, path: str, notes: Mapping[str, str]) -> Any:
    """The value as ruamel.yaml writes it: block style with a comment for each leaf, lists of leaves in flow style."""
    if not isinstance(value, dict | list):
        return value
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    made = {key: _commented(child, _join(path, key), notes) for key, child in parts}
    result = CommentedMap(made) if isinstance(value, dict) else CommentedSeq(made.values())
    if not value or (isinstance(value, list) and not any(_is_block(child) for child in value)):
        result.fa.set_flow_style()
    for key in made if isinstance(value, dict) else ():
        if not _is_block(value[key]) and (note := notes.get(_join(path, key))):
            result.yaml_add_eol_comment(note, key, column=44)
    return result


def _is_block(value: Any) -> bool:
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and any(map(_is_block, value))))


def _is_plain(text: str) -> bool:
    """May this string stand without quotes? Words and paths that do not read as a number."""
    if not re.fullmatch(r"[A-Za-z_/.][\w./+@ -]*", text, flags=re.ASCII) or text != text.strip():
        return False
    return parse_value(text) == text


def _similar_file(path: Path) -> str:
    directory = path.parent if path.parent.is_dir() else Path(".")
    names = difflib.get_close_matches(path.name, [p.name for p in directory.glob("*.yaml")], n=1)
    return f"; did you mean {directory / names[0]}?" if names else ""
