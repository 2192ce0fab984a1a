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
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mixtral_jax.train.errors import UserError

OVERRIDE = "override"


@dataclass
class Tree:
    """Nested values and, for every dotted path in them, the place that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def origin(self, path: str) -> str | None:
        """Where the value at `path`, or the nearest enclosing section, was set; None where nothing set it."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return None


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The content of a YAML file with overrides applied.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file is no YAML 1.2 mapping, repeats a key, or an override cannot be applied; all the
            problems of the overrides are named at once.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {path} does not exist{_similar_file(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    tree = tree_from_text(text, str(path))
    return apply_overrides(tree, overrides)


def tree_from_text(text: str, name: str = "text") -> Tree:
    """Parse YAML; `name` is what errors and origins call the text."""
    tree = Tree()
    node = _compose(text, name)
    if node is None:
        raise UserError(f"{name} is empty")
    if not isinstance(node, MappingNode):
        raise UserError(f"{name} must hold `key: value` lines at its top level")
    tree.values = _construct(node, (), name, tree.origins)
    return tree


def parse_value(text: str) -> Any:
    """One YAML value, as overrides write it: `1e-4` a number, `null`, `[1, 2]`, `no` a string."""
    node = _compose(text, repr(text))
    return None if node is None else _construct(node, (), repr(text), {})


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


def apply_overrides(tree: Tree, arguments: Sequence[str]) -> Tree:
    """Set each override's path, in order; sections that are absent are made."""
    problems = []
    for key, text in split_overrides(arguments):
        try:
            value = parse_value(text)
            _set(tree, key.split("."), value)
        except UserError as error:
            problems.append(f"override {key}={text}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return tree


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted path, leaf); an empty dict or list counts as a leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list) or not value:
        yield path, value
    for key, child in items:
        yield from walk(child, f"{path}.{key}" if path else str(key))


def to_yaml(values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
    """YAML 1.2 that `tree_from_text` reads back as the same tree; `notes` become comments, by dotted path."""
    notes = notes or {}
    lines = [(line, notes.get(path, "")) for line, path in _emit(values, "", 0)]
    width = min(60, max((len(line) for line, note in lines if note), default=0))
    return "".join(f"{line:<{width}}  # {note}\n" if note else f"{line}\n" for line, note in lines)


def closest(word: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The known dotted path whose last part is most similar, or None; among equals the nearest as a whole."""

    def similarity(candidate: str) -> tuple[float, float]:
        leaf = difflib.SequenceMatcher(None, word.split(".")[-1], candidate.split(".")[-1]).ratio()
        return leaf, difflib.SequenceMatcher(None, word, candidate).ratio()

    def score(candidate: str) -> float:
        leaf, whole = similarity(candidate)
        return leaf + 0.3 * whole

    best = max(known, key=score, default=None)
    return best if best is not None and similarity(best)[0] >= cutoff else None


def show(value: Any) -> str:
    """A value as one would write it in YAML, cut to one readable line."""
    text = _flow(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _compose(text: str, name: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml.compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{where}: not valid YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def _construct(node: Node, path: tuple[str, ...], name: str, origins: dict[str, str]) -> Any:
    if path:
        origins[".".join(path)] = f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, MappingNode):
        return _construct_mapping(node, path, name, origins)
    if isinstance(node, SequenceNode):
        return [_construct(child, (*path, str(i)), name, origins) for i, child in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    return _scalar(node, name)


def _construct_mapping(node: MappingNode, path: tuple[str, ...], name: str, origins: dict[str, str]) -> dict:
    result: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str) or key == "<<":
            raise UserError(f"{name}, line {line}: a key must be a plain word")
        if key in result:
            raise UserError(f"{name}, line {line}: {'.'.join((*path, key))} was set in line {lines[key]} already")
        lines[key] = line
        result[key] = _construct(value_node, (*path, key), name, origins)
        origins[".".join((*path, key))] = f"{name}:{line}"
    return result


def _scalar(node: ScalarNode, name: str) -> Any:
    text, kind = node.value, (node.tag or "").removeprefix("tag:yaml.org,2002:")
    plain = text.replace("_", "")
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" if re.match(r"[-+]?0[xob]", plain):
            return int(plain, 0)
        case "int":
            return int(plain)
        case "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", plain, flags=re.IGNORECASE))
        case "str" | "timestamp" | "value":
            return text
    raise UserError(f"{name}, line {node.start_mark.line + 1}: the tag {node.tag} is not supported")


def _set(tree: Tree, parts: list[str], value: Any) -> None:
    place: Any = tree.values
    for i, part in enumerate(parts):
        here, last = ".".join(parts[:i]), i == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError(
                    f"{here} is a list of {len(place)}: its elements are {here}.0 to {here}.{len(place) - 1}"
                )
            slot: Any = int(part)
        elif isinstance(place, dict):
            slot = part
            if not last and place.get(slot) is None:
                place[slot] = {}
        else:
            raise UserError(f"{here} is {show(place)}, which has no parts")
        if last:
            place[slot] = value
        else:
            place = place[slot]
    path = ".".join(parts)
    for stale in [p for p in tree.origins if p.startswith(path + ".")]:
        del tree.origins[stale]
    tree.origins[path] = OVERRIDE


def _emit(value: Any, path: str, indent: int) -> Iterator[tuple[str, str]]:
    """(line, dotted path of the leaf on it) in block style; lists of leaves in flow style."""
    pad = " " * indent
    for key, child in value.items():
        here = f"{path}.{key}" if path else str(key)
        name = _flow(str(key))
        if isinstance(child, dict) and child:
            yield f"{pad}{name}:", ""
            yield from _emit(child, here, indent + 2)
        elif isinstance(child, list) and any(isinstance(item, dict) and item for item in child):
            yield f"{pad}{name}:", ""
            for i, item in enumerate(child):
                if isinstance(item, dict) and item:
                    lines = list(_emit(item, f"{here}.{i}", indent + 4))
                    yield f"{pad}  - {lines[0][0].lstrip()}", lines[0][1]
                    yield from lines[1:]
                else:
                    yield f"{pad}  - {_flow(item)}", f"{here}.{i}"
        else:
            yield f"{pad}{name}: {_flow(child)}", here


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(str(k))}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    if isinstance(value, float):
        return repr(value).replace("inf", ".inf").replace("nan", ".nan")
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _is_plain(text: str) -> bool:
    """May this string stand without quotes, in flow style too? Words and paths that do not read as a number."""
    if not re.fullmatch(r"[A-Za-z_/.][\w./+@ -]*", text, flags=re.ASCII) or text != text.strip():
        return False
    return parse_value(text) == text


def _quoted(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)


def _similar_file(path: Path) -> str:
    directory = path.parent if path.parent.is_dir() else Path(".")
    names = difflib.get_close_matches(path.name, [p.name for p in directory.glob("*.yaml")], n=1)
    return f"; did you mean {directory / names[0]}?" if names else ""
