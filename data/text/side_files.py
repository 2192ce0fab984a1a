"""The files beside a tokenizer: what they call its special tokens, which pieces they add, its chat template."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mixtral_jax.data.records import check_file, exists, files_below, is_directory, is_remote, local_directory, own_name

_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
FILES = (*_SIDE_FILES, "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json")


class _Token(BaseModel):
    content: str


class _Named(BaseModel):
    name: str
    template: str


_Special = str | _Token | None


class _Side(BaseModel):
    """The keys that are read, of the kinds that transformers writes; each file has some of them."""

    model_config = ConfigDict(strict=True)

    bos_token: _Special = None
    eos_token: _Special = None
    pad_token: _Special = None
    added_tokens_decoder: dict[int, _Token] | None = None
    chat_template: str | list[_Named] | None = None  # of several, each with its name
    eos_token_id: int | list[int] | None = None


_T = TypeVar("_T")
_SIDE, _ADDED = TypeAdapter(_Side), TypeAdapter(dict[str, int])


def side_files(side: Path) -> dict[str, bytes]:
    """What a directory says of its tokenizer beside the tokenizer itself."""
    return {name: (side / name).read_bytes() for name in FILES if (side / name).is_file()}


def _read(path: Path, kind: TypeAdapter[_T]) -> _T:
    try:
        return kind.validate_json(path.read_bytes() if path.is_file() else b"{}", strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = f": {first['loc'][0]}" if first["loc"] else ""
        raise ValueError(f"{path}{where}: {first['msg']}") from None


def named(side: Path, key: str) -> list[str]:
    """What the files in a directory call a special token, such as eos_token."""
    found: list[_Special] = [getattr(_read(side / name, _SIDE), key) for name in _SIDE_FILES]
    values = [value.content if isinstance(value, _Token) else value for value in found]
    return [value for value in values if value]


def named_id(side: Path, key: str, id_of: Callable[[str], int | None], default: int) -> int:
    """Id of the special token that they name, if there is such a piece."""
    return next((id_ for name in named(side, key) if (id_ := id_of(name)) is not None), default)


def added_tokens(side: Path, size: int) -> dict[str, int]:
    """Pieces with ids from `size` on that the files in a directory add to a SentencePiece model."""
    added = _read(side / "added_tokens.json", _ADDED)
    decoder = _read(side / "tokenizer_config.json", _SIDE).added_tokens_decoder or {}
    added |= {token.content: id_ for id_, token in decoder.items()}
    return {piece: id_ for piece, id_ in added.items() if id_ >= size}


def chat_template_of(side: Path) -> str | None:
    """The directory's chat template, in jinja."""
    if (jinja := side / "chat_template.jinja").is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{jinja} is no text in UTF-8: {error}") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _read(side / name, _SIDE).chat_template
        if isinstance(found, list):
            found = next((t.template for t in found if t.name == "default"), None)
        if found is not None:
            return found
    return None


def ends_of(side: Path) -> tuple[int, ...]:
    """The ids of eos_token_id in generation_config.json."""
    found = _read(side / "generation_config.json", _SIDE).eos_token_id
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def check_files(path: Path) -> None:
    """Of a tokenizer and beside it nothing may be a pipe, which never ends, or a Git LFS pointer: see check_file."""
    directory, patterns = (path, ("*.model*", "tokenizer.json", *FILES)) if path.is_dir() else (path.parent, FILES)
    for file in [path, *sorted(file for pattern in patterns for file in directory.glob(pattern))]:
        if os.path.lexists(file) and not file.is_dir():
            check_file(str(file))


def sentencepiece_file(directory: Path) -> Path | None:
    """The SentencePiece model of a directory."""
    candidates = [directory / "tokenizer.model", *sorted(directory.glob("*.model*"))]
    return next((p for p in candidates if p.is_file()), None)


def read_by_name(path: str) -> str:
    """The usual name of the file that a path is: tokenizer.json or tokenizer.model; nothing: it is a directory."""
    name = own_name(path)
    if os.path.isdir(path) or (is_remote(path) and not re.search(r"\.(json|model[^/]*)$", name)):
        return ""
    return "tokenizer.json" if name.endswith(".json") else "tokenizer.model"


def from_address(address: str, load: Callable[[Path], Any]) -> Any:
    """What `load` makes of copies of a tokenizer and of the files beside it; notes and errors name the address.

    Raises:
        ValueError: there is none.
        OSError: the address does not answer.
    """
    above, name = address.rstrip("/"), ""
    if read_by_name(address):
        above, name = address.rsplit("/", 1)
        if not exists(address):
            raise ValueError(f"tokenizer {address} does not exist")
    names = {name} if name else {"tokenizer.model", "tokenizer.json"}
    if not name and is_directory(above):
        names |= {file for file in files_below(above) if "/" not in file and ".model" in file}
    with local_directory(above, sorted(names.union(FILES))) as copy:
        try:
            tokenizer = load(Path(copy, name))
        except ValueError as error:
            raise ValueError(str(error).replace(copy, above)) from None
    tokenizer.notes = tuple(note.replace(copy, above) for note in tokenizer.notes)
    return tokenizer
