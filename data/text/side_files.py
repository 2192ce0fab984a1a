"""The files beside a tokenizer: what they call its special tokens, which pieces they add, its chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
FILES = (
    *_SIDE_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def side_files(side: Path) -> dict[str, bytes]:
    """What a directory says of its tokenizer beside the tokenizer itself."""
    return {name: (side / name).read_bytes() for name in FILES if (side / name).is_file()}


def _json_file(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def named(side: Path, key: str) -> list[str]:
    """What the files in a directory call a special token, such as eos_token."""
    values = [_json_file(side / name).get(key) for name in _SIDE_FILES]
    values = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [value for value in values if value]


def named_id(side: Path, key: str, id_of: Callable[[str], int | None], default: int) -> int:
    """Id of the special token that they name, if there is such a piece."""
    return next((id_ for name in named(side, key) if (id_ := id_of(name)) is not None), default)


def added_tokens(side: Path, size: int) -> dict[str, int]:
    """Pieces with ids from `size` on that the files in a directory add to a SentencePiece model."""
    added = dict(_json_file(side / "added_tokens.json"))
    decoder = _json_file(side / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added |= {token["content"]: int(id_) for id_, token in decoder.items()}
    return {piece: id_ for piece, id_ in added.items() if isinstance(id_, int) and id_ >= size}


def chat_template_of(side: Path) -> str | None:
    """The directory's chat template, in jinja."""
    if (side / "chat_template.jinja").is_file():
        return (side / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _json_file(side / name).get("chat_template")
        if isinstance(found, list):  # of several, each with its name
            found = next((t.get("template") for t in found if t.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def ends_of(side: Path) -> tuple[int, ...]:
    """The ids of eos_token_id in generation_config.json."""
    found = _json_file(side / "generation_config.json").get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    return tuple(i for i in found if isinstance(i, int))
