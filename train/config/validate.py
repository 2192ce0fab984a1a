"""From a tree to a frozen config: every problem found at once, each one line with the dotted path and the value."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BaseModel, ValidationError

from mixtral_jax.train.config.tree import Tree, closest, show, walk
from mixtral_jax.train.errors import UserError

Config = TypeVar("Config", bound=BaseModel)

# What pydantic says -> what a writer of YAML understands.
_WORDS = {
    r"a valid integer( integer)?": "a whole number",
    r"a valid number": "a number",
    r"a valid string": "text",
    r"a valid boolean.*": "true or false",
    r"a valid (tuple|list|set)": "a list",
    r"a valid dictionary.*": "a section of `key: value` lines",
    r"^(String|Tuple|List) must": "must",
    r" after validation": "",
}
_NUMBERS = {float: "a number", int: "a whole number"}


def validate(
    config_class: type[Config],
    tree: Tree,
    *,
    problems: Mapping[str, str] | None = None,
    synonyms: Mapping[str, str] | None = None,
    also_known: Sequence[str] = (),
) -> Config:
    """Build the config, or name everything that is wrong.

    `problems` (by dotted path) were found before; `synonyms` maps last parts of keys that other libraries use to
    our dotted paths; `also_known` are paths that stand in files but not in the class.

    Stricter than pydantic: a boolean is no number, a string is neither, so `tensorboard: no` is an error here.
    `1e6` is a whole number, `1.5` is none.

    Raises:
        UserError: one line for each problem.
    """
    found = {**(problems or {}), **dict(_kind_problems(tree.values, [config_class], ""))}
    known = [*known_paths(config_class), *also_known]
    config = None
    try:
        config = config_class.model_validate(tree.values)
    except ValidationError as error:
        for path, text in _schema_problems(error, config_class, known, synonyms or {}):
            found.setdefault(path, text)
    if found or config is None:
        raise UserError("\n".join(_line(tree, path, text) for path, text in found.items()))
    return config


def rebuilt(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some fields changed (sections as mappings), checked again as a whole.

    Raises:
        UserError: the changed config is not consistent.
    """
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, Mapping) else value
    return validate(type(config), Tree(values))


def known_paths(config_class: type[BaseModel]) -> list[str]:
    """Every dotted path that the config understands; `*` stands for the index of a list."""
    return list(_paths(config_class, ""))


def origins(config: BaseModel, tree: Tree) -> dict[str, str]:
    """For each leaf of the resolved config the place that set it: file:line, `override`, or `default`."""
    given = _all_paths(tree.values)
    return {
        path: (tree.origin(path) or "default") if path in given else "default"
        for path, _ in walk(config.model_dump(mode="json"))
    }


def _line(tree: Tree, path: str, text: str) -> str:
    """`a.b = 3 (file.yaml:7): text`; the value is left out where there is none or it is a whole section."""
    if not path:
        return text
    found, value = _lookup(tree.values, path)
    shown = f" = {show(value)}" if found and not isinstance(value, dict) else ""
    origin = f" ({tree.origin(path)})" if found and tree.origin(path) else ""
    return f"{path}{shown}{origin}: {text}"


def _schema_problems(
    error: ValidationError, config_class: type[BaseModel], known: list[str], synonyms: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    unions: dict[str, list[str]] = {}
    details = error.errors(include_url=False)
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "too_short" and any(d["loc"][: len(location)] == location != d["loc"] for d in details):
            continue  # its elements are wrong, and said so
        path = ".".join(str(part) for part in _real_location(config_class, location))
        match detail["type"]:
            case "extra_forbidden":
                yield path, f"unknown key; {_nearest(path, known, synonyms)}"
            case "missing":
                yield path, "missing: this key has no default"
            case "value_error":
                yield path, str(detail["ctx"]["error"])
            case _:
                unions.setdefault(path, []).append(_sentence(detail))
    for path, texts in unions.items():
        if any(other.startswith(f"{path}.") for other in unions):
            continue  # one branch of a union fits, but for its parts
        first, *others = dict.fromkeys(texts)
        yield path, " or ".join([first, *(text.removeprefix("must be ") for text in others)])


def _sentence(detail: Any) -> str:
    text = (
        detail["msg"].removeprefix("Input ").replace("should", "must", 1).replace(", unable to parse string as an", "")
    )
    for theirs, ours in _WORDS.items():
        text = re.sub(theirs, ours, text)
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        options = [word for word in detail["ctx"]["expected"].split("'") if word.strip(" ,or")]
        near = difflib.get_close_matches(detail["input"], options, n=1)
        text += f"; did you mean {near[0]}?" if near else ""
    return text[0].lower() + text[1:]


def _nearest(path: str, known: list[str], synonyms: Mapping[str, str]) -> str:
    word = path.split(".")[-1]
    if word in synonyms:
        return f"here that is {synonyms[word]}"
    index = next((part for part in path.split(".") if part.isdigit()), "0")
    known = [p.replace("*", index) for p in known]
    near = closest(path, known)
    if near:
        return f"the nearest key is {near}"
    section = path.rpartition(".")[0]
    depth = path.count(".")
    names = [p.split(".")[depth] for p in known if p.rpartition(".")[0] == section]
    return f"the keys {f'of {section}' if section else 'here'} are {', '.join(dict.fromkeys(names))}"


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type: Optional and unions are opened, Annotated is unwrapped."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for arg in typing.get_args(annotation) for member in _members(arg)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _element(annotation: Any, key: Any) -> list[Any]:
    """The types that may stand at `key` of a value of this type; empty where the type has no such place."""
    result: list[Any] = []
    for member in _members(annotation):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if _is_model(member) and key in member.model_fields:
            result += _members(member.model_fields[key].annotation)
        elif origin is dict:
            result += _members(arguments[1])
        elif origin is list or (origin is tuple and arguments[-1] is Ellipsis):
            result += _members(arguments[0]) if str(key).isdigit() or key == "*" else []
    return result


def _paths(annotation: Any, path: str) -> Iterator[str]:
    for member in _members(annotation):
        prefix = f"{path}." if path else ""
        if _is_model(member):
            for name, info in member.model_fields.items():
                yield prefix + name
                yield from _paths(info.annotation, prefix + name)
        elif typing.get_origin(member) in (list, tuple):
            for element in _element(member, "*"):
                yield from _paths(element, prefix + "*")


def _real_location(config_class: type[BaseModel], location: tuple[Any, ...]) -> list[Any]:
    """Pydantic's location without the names of union branches that it puts between the keys."""
    place: list[Any] = [config_class]
    kept: list[Any] = []
    for i, part in enumerate(location):
        inner = [t for member in place for t in _element(member, part)]
        unknown_key = i == len(location) - 1 and any(_is_model(member) for member in place)
        if inner or unknown_key:
            kept.append(part)
            place = inner
    return kept


def _kind_problems(value: Any, kinds: list[Any], path: str) -> Iterator[tuple[str, str]]:
    """Scalars that pydantic would convert although the user can hardly have meant it."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            inner = [t for kind in kinds for t in _element(kind, key)]
            if inner:
                yield from _kind_problems(child, inner, f"{path}.{key}" if path else str(key))
        return
    kinds = [kind for kind in kinds if kind is not type(None)]
    literals = [o for kind in kinds if typing.get_origin(kind) is Literal for o in typing.get_args(kind)]
    number = next((words for kind, words in _NUMBERS.items() if kind in kinds), None)
    if isinstance(value, bool):
        if number and bool not in kinds and value not in literals:
            yield path, f"must be {number}"
    elif isinstance(value, str):
        if all(kind in (int, float, bool) for kind in kinds):
            yield path, f"must be {number or 'true or false'}, not text"
    elif isinstance(value, int | float) and kinds == [bool]:
        yield path, "must be true or false"


def _lookup(values: Any, path: str) -> tuple[bool, Any]:
    for part in path.split("."):
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return False, None
    return True, values


def _all_paths(values: Any, path: str = "") -> set[str]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    result = {path}
    for key, child in items:
        result |= _all_paths(child, f"{path}.{key}" if path else str(key))
    return result
