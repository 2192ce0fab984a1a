"""docs/config.md: every setting with its type, default and meaning, made from the schema.

python -m mixtral_jax.train.config.reference > docs/config.md
"""

from collections.abc import Iterator
from typing import Any

from mixtral_jax.train.config.load import STAGES
from mixtral_jax.train.config.tree import show

HEAD = """\
# Every setting

A run file is YAML 1.2, says its `stage` (`pretrain`, `sft` or `dpo`), and may leave out what has a default.
`config show FILE` prints the resolved file, each value with the place that set it; `config schema STAGE` is a JSON
Schema for editors. A section that may be `null` is off until it is written. `model: {preset: NAME, ...}` stands for
the fields of a preset, then what differs.

This page is made by `python -m mixtral_jax.train.config.reference > docs/config.md`, and a test compares.
"""
TITLES = {"pretrain": "Every stage", "sft": "sft and dpo: also, or otherwise", "dpo": "dpo: also"}
WORDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "`null`",
    "object": "mapping",
}  # fmt: skip
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def reference() -> str:
    """The page: the settings of every stage, then what the others add or have otherwise."""
    parts, known = [HEAD], dict[str, Any]()
    for stage, title in TITLES.items():
        schema = STAGES[stage].model_json_schema()
        settings = {key: i for key, i in schema["properties"].items() if key != "stage" and known.get(key) != i}
        known |= settings
        parts += [f"## {title}\n", *_tables("", {**schema, "properties": settings}, schema["$defs"])]
    return "\n".join(parts)


def _tables(section: str, schema: dict[str, Any], classes: dict[str, Any]) -> Iterator[str]:
    """The settings of a class as a table, then those of the sections inside it."""
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    inner: dict[str, list[str]] = {}
    for key, info in schema["properties"].items():
        path, name = f"{section}.{key}".removeprefix("."), _class_of(info)
        meaning = info.get("description") or classes[name]["description"].splitlines()[0]
        default = "" if name and info.get("default") else f"`{show(info.get('default'))}`"
        rows.append(f"| `{path}` | {_kind(info)} | {default if 'default' in info else 'required'} | {meaning} |")
        if name:
            inner.setdefault(name, []).append(path)
    yield "\n".join(rows) + "\n"
    for name, paths in inner.items():
        yield f"### {', '.join(paths)}\n\n{classes[name]['description']}\n"
        yield from _tables(paths[0], classes[name], classes)


def _class_of(info: dict[str, Any]) -> str:
    """The class of the section that a setting is, may be, or is a list of; "" where it is a plain value."""
    choices = [part for choice in (info, *info.get("anyOf", ())) for part in (choice, choice.get("items", {}))]
    return next((choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice), "")


def _kind(info: dict[str, Any]) -> str:
    """The type in words, with its bounds."""
    if "$ref" in info:
        return "section"
    if "anyOf" in info:
        kinds = [_kind(choice) for choice in info["anyOf"]]
        return " or ".join(kinds).replace(f"list of {kinds[0]}", "a list of them")
    if "enum" in info or "const" in info:
        return ", ".join(f"`{word}`" for word in info.get("enum", [info.get("const")]))
    if info["type"] == "array":
        return f"list of {_kind(info['items'])}"
    return " ".join([WORDS[info["type"]], *(f"{sign} {info[key]:g}" for key, sign in BOUNDS.items() if key in info)])


if __name__ == "__main__":
    print(reference(), end="")
