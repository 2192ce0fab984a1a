"""Which files of a source are data, and of which split: names are read as the Hugging Face hub reads them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fsspec.utils import glob_translate
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import columnar, files
from mixtral_jax.data.records.sources import SETS, compression, data_files, file_format, format_by_name

_WORDS = {
    "train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"
}  # fmt: skip
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NUMBERED = re.compile(r"(.*?)(\d{5})-of-(\d{5})")
_ABOUT = re.compile(
    r"readme([^a-z0-9].*)?|(licen[cs]e|notice|copying|citation|contributing|code_of_conduct|change_?log|datasheet|"
    r"data_?(set_?)?card|requirements)(\..*)?",
    re.IGNORECASE,
)
_BESIDE = re.compile(  # kinds of files that are no records, whatever their names
    r"\.(md|rst|tex|html?|pdf|py|ipynb|sh|js|css|c|cc|cpp|h|java|go|rs|ya?ml|toml|cfg|ini|lock|log|png|jpe?g|gif|svg)$",
    re.IGNORECASE,
)
_STATE = "state.json"  # beside the files of a data set that was saved
_ABOUT_JSON = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", _STATE)
_DOCUMENT = re.compile(r"\.md(\.gz|\.zst)?$", re.IGNORECASE)
_SHOWN = 4  # names


class Chosen(NamedTuple):
    """The files and data set directories of a source, and a line that says which they are and what was left out."""

    files: tuple[str, ...]
    described: str


def choose(source: SourceConfig) -> Chosen:
    """What a source reads, sorted within each of its paths.

    A file that is named is data, whatever its name. Of a directory, and of what a glob matches, cards and licences are
    not, if there is anything else; documents (.md) beside records are neither. A split is looked for where the hub
    does: the card's `configs`, `data/SPLIT-00000-of-00001`, names of folders, names of files. A directory of several
    splits needs `split`; one whose names say nothing is all `train`.

    Raises:
        ValueError: nothing is there, a split is not there or has to be named, or something is no file: see check_file.
    """
    chosen: list[str] = []
    described: list[str] = []
    for path in source.paths:
        try:
            found, words = _of_path(source, os.path.expanduser(path.removeprefix("file://")))
            for place in found:
                for file in data_files(place):
                    files.check_file(file)
        except ValueError as error:
            raise ValueError(f"source {source.name!r}: {error}") from None
        chosen += found
        described.append(words)
    return Chosen(tuple(files.distinct(chosen)), "; ".join(described))


def source_files(source: SourceConfig) -> list[str]:
    """The files and directories alone."""
    return list(choose(source).files)


def _of_path(source: SourceConfig, path: str) -> tuple[list[str], str]:
    path = _revision(path)
    is_there = not files.is_remote(path) and files.exists(path)  # then brackets are a part of its name
    root, pattern = (path, "") if is_there else files.split_glob(path)
    matches = files.matching(root, pattern) if pattern else [""] * files.exists(root)
    if not matches:
        raise ValueError(f"no file matches {path}")
    if not pattern and not files.is_directory(path):
        _check_split(source.split, path)
        return [path], path
    direct, below, sets = set(), [], []
    for match in matches:
        place = files.join(root, match)
        if not files.is_directory(place):
            direct.add(match)
        elif file_format(source, place) in SETS:
            sets.append(place)
        else:
            below += [f"{match}/{name}".strip("/") for name in files.files_below(place)]
    inside = tuple(f"{place}/" for place in sets)
    names = sorted({n for n in direct.union(below) if not files.join(root, n).startswith(inside)})
    about = {name for name in names if _is_about(os.path.basename(name))}
    if sets and len(about) == len(names):
        return sets, ", ".join(sets)
    aside = about | _kept_aside(root, names)
    data = [n for n in names if (n in direct or format_by_name(n)) and n not in aside]
    if source.format == "auto" and any(format_by_name(name) != "text" for name in data):
        data = [name for name in data if not _DOCUMENT.search(name)]
    if not data and len(about) == len(names):
        data = [name for name in names if format_by_name(name)]
    if not data:
        raise ValueError(f"{path} is a directory without data files that are known by name: {_some(names)}")
    unread = [n for n in names if n not in about | direct and format_by_name(n) is None and not _BESIDE.search(n)]
    is_whole = not pattern or any(name not in direct for name in data)
    chosen, splits = _choose_split(source.split, root, data, about, unread, is_whole=is_whole)
    if is_whole:
        _refuse_gaps(root, chosen, names)
    places = set(files.distinct(files.join(root, name) for name in chosen))
    chosen = [name for name in chosen if files.join(root, name) in places]
    texts = [name for name in chosen if format_by_name(name) == "text"]
    if source.format == "auto" and len(texts) not in (0, len(chosen)):
        records = _some(name for name in chosen if format_by_name(name) != "text")
        raise ValueError(
            f"{root} holds records ({records}) and texts ({_some(texts)}): set path to a glob of one of them"
        )
    _refuse_twins(root, chosen)
    taken = set(chosen)
    others = {split: [n for n in of_it if n not in taken] for split, of_it in splits.items()}
    said = taken.union(*others.values())
    left = {"": [name for name in names if name not in said], **others}
    words = f"{root or '.'}: {f'split {source.split}: ' if source.split else ''}{_some([*sets, *chosen])}"
    if any(left.values()):
        words += f"; not read: {_by_split(left)}"
    return [*sets, *(files.join(root, name) for name in chosen)], words


def _revision(path: str) -> str:
    """Of the hub's cache, which holds each revision of a data set, the main one; any other path is itself."""
    above, main = os.path.join(path, "snapshots"), os.path.join(path, "refs", "main")
    if os.path.isdir(above) and os.path.isfile(main):
        with open(main, encoding="utf-8") as stream:
            return os.path.join(above, stream.read().strip())
    if os.path.isdir(above) and os.path.isdir(os.path.join(path, "blobs")):
        revisions = sorted(os.listdir(above))
        if len(revisions) > 1:
            raise ValueError(
                f"{path} holds the revisions {_some(revisions)}, and no refs/main: set path to one of {above}"
            )
        return os.path.join(above, *revisions)
    return path


def _kept_aside(root: str, names: Sequence[str]) -> set[str]:
    """What `datasets` keeps for itself (cache-*.arrow) beside the files of a data set that is saved there."""
    aside = set[str]()
    for name in names:
        above, base = os.path.split(name)
        beside = {n for n in names if os.path.dirname(n) == above and n.endswith(".arrow")} if base == _STATE else ()
        if beside:
            own = columnar.noted(files.join(root, name), lambda it: {e["filename"] for e in it["_data_files"]})
            aside.update(n for n in beside if os.path.basename(n) not in own)
    return aside


def _is_about(name: str) -> bool:
    """Whether a file is about the data: a card, a licence, what the hub's library notes beside its files."""
    is_text = format_by_name(name) in (None, "text")
    return name.lower() in _ABOUT_JSON or (is_text and _ABOUT.fullmatch(name) is not None)


def _refuse_twins(root: str, names: Sequence[str]) -> None:
    """A file and its compressed copy, or the same records in two formats, would be learned twice."""
    seen: dict[str, str] = {}
    for name in names:
        stem = name[: -len(compression(name)) or None].lower()
        if format_by_name(name) != "text" and "-" not in os.path.splitext(stem)[1]:
            stem = os.path.splitext(stem)[0]
        if (twin := seen.setdefault(stem, name)) != name:
            raise ValueError(f"{root} holds the same twice, as {twin} and as {name}: set path to a glob of one of them")


def _refuse_gaps(root: str, chosen: Sequence[str], names: Sequence[str]) -> None:
    """Of parts that say how many they are (`train-00000-of-00003`, counted from 0 or 1) none may be missing."""
    there: dict[tuple[str, int], set[int]] = {}
    for part in filter(None, map(_NUMBERED.match, names)):
        there.setdefault((part[1], int(part[3])), set()).add(int(part[2]))
    for before, count in sorted({(part[1], int(part[3])) for part in filter(None, map(_NUMBERED.match, chosen))}):
        numbers = there[before, count]
        first = int(count in numbers)
        if missing := sorted(set(range(first, first + count)) - numbers):
            raise ValueError(
                f"{root} lacks {before}{missing[0]:05}-of-{count:05} and so {len(missing):,} of {count:,} parts (an "
                "incomplete download?): fetch them, or set path to a glob of those that are there"
            )


def _choose_split(
    split: str | None, root: str, data: list[str], about: set[str], unread: list[str], *, is_whole: bool
) -> tuple[list[str], dict[str, list[str]]]:
    """The files of the split, and the splits that there are; a name that claims one counts, though it is not read."""
    card = _card_splits(root, [*data, *unread]) if is_whole and "README.md" in about else {}
    splits = {name: [n for n in of_it if n not in unread] for name, of_it in (card or _splits(root, data)).items()}
    splits = {name: of_it for name, of_it in splits.items() if of_it}
    lost = {name: of_it for name, of_it in (card or _splits(root, unread)).items() if is_whole and name not in splits}
    if lost and split not in splits:
        raise ValueError(
            f"{root} holds {_by_split(lost)}, of no kind that is read, beside {_some(data)}: make JSON lines of it, or "
            "set path to a glob of what is meant"
        )
    if split is None:
        said = set[str]().union(*splits.values())
        rest = [name for name in data if name not in said]
        if not is_whole or not splits or (len(splits) == 1 and not rest):
            return data, splits
        if len(splits) == 1 and card:
            return next(iter(card.values())), splits
        raise ValueError(
            f"{root} holds the splits {_by_split({**splits, 'none': rest})}: set split to one of them, or path to a "
            "glob that takes what is meant"
        )
    if not splits and is_whole and split == "train":  # as the hub has it
        return data, splits
    if split not in splits:
        known = f"its splits are {', '.join(splits)}" if splits else "no name there says one: leave split out"
        raise ValueError(f"{root} has no split {split!r}: {known}")
    return splits[split], splits


def _splits(root: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files whose names say so, by the first of the hub's rules that says anything; empty: none does."""
    found: dict[str, list[str]] = {}
    below = "data/" if os.path.basename(root) == "data" else ""
    for name in names:
        if shard := _SHARD.fullmatch(below + name):
            found.setdefault(shard[1], []).append(name)
    for ending in () if found else ("([-._ 0-9][^/]*)?/", "[-._ 0-9][^/]*$"):  # of a folder, of a file
        for split, words in _WORDS.items():
            pattern = re.compile(rf"(^|.*[-/._ 0-9])({words}){ending}", re.IGNORECASE)
            if of_it := [name for name in names if pattern.match(name)]:
                found[split] = of_it
        if found:
            break
    return found


def _card_splits(root: str, names: Sequence[str]) -> dict[str, list[str]]:
    """What the card says in its `configs`; empty where it says nothing."""
    card = files.join(root, "README.md")
    with files.open_file(files.check_file(card)) as stream:
        text = stream.read(1 << 22).decode("utf-8", "replace").removeprefix("\ufeff")
    front = re.match(r"---[ \t]*\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    told = re.search(r"""^(["']?)configs\1\s*:.*\n([] \t#},-].*\n|\s*\n)*""", front[1], re.MULTILINE) if front else None
    if told is None:
        return {}
    try:
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(told[0])):
            raise ValueError("it has YAML aliases")
        listed = YAML(typ="safe", pure=True).load(told[0])["configs"] or ()
        configs = {str(c["config_name"]): c for c in listed if c.get("data_files") or c.get("data_dir")}
        default = [name for name, c in configs.items() if c.get("default") is True or name == "default"]
        if configs and not default and len(configs) > 1:
            raise ValueError(f"it has several and none is the default: {_some(configs)}")
        found = _of_config(configs[(default or list(configs))[0]], names) if configs else {}
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"configs of {card}: {message}: set path to one of its folders, or to a glob") from None
    if configs and not found:
        raise ValueError(f"configs of {card} name no file that is there and can be read: set path to a glob")
    return found


def _of_config(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files of one configuration of a card."""
    base = os.path.normpath(f"{config.get('data_dir') or '.'}/") + "/"
    inside = {n.removeprefix(base): n for n in names if base == "./" or n.startswith(base)}
    told = config.get("data_files")
    if told is None:
        own = _splits(base[:-1], list(inside)) or {"train": list(inside)}
        return {split: [inside[name] for name in of_it] for split, of_it in own.items()}
    if isinstance(told, list) and any(isinstance(entry, dict) for entry in told):
        told = {str(entry["split"]): entry["path"] for entry in told}
    elif not isinstance(told, dict):
        told = {"train": told}
    found = {}
    for split, patterns in told.items():
        wanted = [glob_translate(os.path.normpath(p)) for p in ([patterns] if isinstance(patterns, str) else patterns)]
        if of_it := [inside[name] for name in inside if any(re.match(w, name) for w in wanted)]:
            found[str(split)] = of_it
    return found


def _check_split(split: str | None, path: str) -> None:
    """One file may be asked for a split that its name says, for no other."""
    root, name = os.path.split(path)
    said = _splits(root, [name])
    if split is not None and split not in said:
        what = f"split {', '.join(said)}" if said else "no split"
        raise ValueError(f"{path} is one file, whose name says {what}: leave split {split!r} out")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _by_split(splits: Mapping[str, Sequence[str]]) -> str:
    """`train (a, b), test (c)`; names under "" without a split before them."""
    return ", ".join(f"{split} ({_some(of_it)})" if split else _some(of_it) for split, of_it in splits.items() if of_it)
