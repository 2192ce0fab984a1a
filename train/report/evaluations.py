"""Tables of evaluations: what metrics.jsonl says of sources and tasks, and what `eval` left in <run>/eval/<step>/."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.train.pages import heat_map, table
from mixtral_jax.train.run_files import json_object, number

_ALL, _ERROR = "all", "_stderr"
_GROUPS = ("rewards", "logps")  # of metrics, and no names of sources


def evaluations(place: Path, last: Mapping[str, tuple[int, float]]) -> Iterator[str]:
    """Html of each; `last` has the newest value of each metric, and its step."""
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for key, value in last.items():
        kind, *names, metric = key.split("/")
        if kind == "eval":
            name = names.pop(0) if names and names[0] not in _GROUPS else _ALL
            found.setdefault(name, {})["/".join([*names, metric])] = value
    sources = {name: of for name, of in sorted(found.items(), key=lambda item: item[0] != _ALL) if "loss" in of}
    if sources:
        metrics = sorted({metric for of in sources.values() for metric in of})
        step = max(step for of in sources.values() for step, _ in of.values())
        rows = [
            [name, *(of[metric][1] if metric in of and of[metric][0] == step else None for metric in metrics)]
            for name, of in sources.items() if of["loss"][0] == step  # others are of the run no more
        ]  # fmt: skip
        yield table(["source", *metrics], rows, caption=f"Sources, after step {step}")
    tasks = [
        [name, metric, value, of.get(metric + _ERROR, (0, None))[1], step]
        for name, of in found.items() if name not in sources
        for metric, (step, value) in of.items() if not metric.endswith(_ERROR)
    ]  # fmt: skip
    if tasks:
        yield table(["task", "metric", "score", "standard error", "after step"], tasks, caption="Tasks", sortable=True)
    for directory in sorted(place.glob("eval/*"), key=lambda path: (len(path.name), path.name)):
        yield from _passkey(json_object(directory / "passkey.json"), directory.name)
        yield from _by_length(json_object(directory / "by_length.json"), directory.name)


def _passkey(found: Mapping[str, Any], step: str) -> Iterator[str]:
    """The picture of Mixtral's paper (2401.04088, figure 4): retrieval by length of the context and depth in it."""
    lengths, depths, accuracy = (_list(found, key) for key in ("lengths", "depths", "accuracy"))
    grid = [[number(value) for value in row] if isinstance(row, list) else [] for row in accuracy]
    if grid and len(grid) == len(depths) and all(len(row) == len(lengths) and None not in row for row in grid):
        percent = [[100 * (value or 0) for value in row] for row in grid]
        yield heat_map(
            f"Passkeys retrieved, of {found.get('samples')} in each cell, after step {step}", percent,
            rows=[f"{100 * depth:g} %" for depth in depths], columns=[str(length) for length in lengths],
            names=("depth", "context in tokens"), unit=" %", limits=(0, 100),
        )  # fmt: skip


def _by_length(found: Mapping[str, Any], step: str) -> Iterator[str]:
    for key, title in (("position", "by position"), ("context", "by length of the context")):
        parts = [part for part in _list(found, key) if isinstance(part, dict)]
        columns = list(dict.fromkeys(name for part in parts for name in part))
        rows = [[number(part.get(name)) for name in columns] for part in parts]
        if rows:
            of = f" of {found['data']}" if isinstance(found.get("data"), str) else ""
            yield table(columns, rows, caption=f"Loss {title}{of}, after step {step}")


def _list(found: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = found.get(key)
    return value if isinstance(value, list) else []
