"""Tables of evaluations: what metrics.jsonl says of sources and tasks, and what separate evaluations left."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mixtral_jax.train.pages import table

_ALL = "all"


def evaluations(place: Path, last: Mapping[str, tuple[int, float]]) -> Iterator[str]:
    """Html of each; `last` has the newest value of each metric, and its step."""
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for key, value in last.items():
        if key.startswith("eval/"):
            name, _, metric = key.removeprefix("eval/").rpartition("/")
            of, _, group = name.partition("/") if name not in ("rewards", "logps") else (_ALL, "", name)
            found.setdefault(of or _ALL, {})["/".join(filter(None, (group, metric)))] = value
    sources = {name: of for name, of in sorted(found.items(), key=lambda item: item[0] != _ALL) if "loss" in of}
    metrics = sorted({metric for of in sources.values() for metric in of})
    if sources:
        step = max(step for of in sources.values() for step, _ in of.values())
        rows = [[name, *(of.get(metric, (0, None))[1] for metric in metrics)] for name, of in sources.items()]
        yield table(["source", *metrics], rows, caption=f"After step {step}")
    tasks = [
        [name, metric, value, step]
        for name, of in found.items()
        if name not in sources
        for metric, (step, value) in of.items()
    ]
    if tasks:
        yield table(["task", "metric", "score", "after step"], tasks, sortable=True)
