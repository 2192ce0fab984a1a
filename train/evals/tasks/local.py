"""Benchmarks on files of this machine: task files of lm-evaluation-harness whose data set is a file of ours."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import FrozenConfig
from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import Census, read_lumps, source_files
from mixtral_jax.train.config import read_tree
from mixtral_jax.train.errors import UserError, did_you_mean
from mixtral_jax.train.evals.tasks.code import own_code_eval

PREFIX = "local_"  # else `boolq` would sometimes be the hub's and sometimes a file
VARIABLE = "MIXTRAL_JAX_DATA"
_LANGUAGES = ("fr", "de", "es", "it")
_ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json")


class Row(FrozenConfig):
    """One row of tasks.yaml, which says what each means."""

    of: str
    file: str
    licence: str
    hub: str | None = None
    part: str | None = None
    shots: int = 0
    letters: bool = False
    set: dict[str, Any] = {}


@functools.cache
def rows() -> dict[str, Row]:
    """The local tasks by name."""
    table = read_tree(Path(__file__).with_name("tasks.yaml")).values
    return {
        PREFIX + key.format(lang=lang): Row(**{"file": key.format(lang=lang), **row, "of": row["of"].format(lang=lang)})
        for key, row in table.items()
        for lang in (_LANGUAGES if "{lang}" in key else ("",))
    }


def harness() -> Path:
    """Where the task files of lm-evaluation-harness are.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks are run by lm-eval, which is not installed: pip install 'mixtral-jax[eval]'")
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def with_local(names: Sequence[str], data_dir: str | None, num_fewshot: int | None = None) -> list[Any]:
    """What the harness takes for tasks: names of its own as they are, in the place of ours tasks and groups of them.

    Args:
        data_dir: where the files are; None: what the variable MIXTRAL_JAX_DATA says.
        num_fewshot: examples that will be asked for; None: as many as the paper has.

    Raises:
        UserError: a file is not there, or lacks what its task reads.
    """
    return [
        _built(name, row, _directory(name, data_dir), row.shots if num_fewshot is None else num_fewshot)
        if (row := rows().get(name))
        else name
        for name in names
    ]


def listing(data_dir: str | None) -> str:
    """Of each local task its name, shots, metrics, file, which is there, and where that comes from, as a table."""
    directory = Path(data_dir or os.environ.get(VARIABLE, ""))
    table = [("task", "shots", "metric", "file", "there", "on the hub", "split", "licence")]
    for name, row in rows().items():
        base = next(_bases(row, resolve=False))
        metrics = [filters["name"] for filters in row.set.get("filter_list", ())] or [
            str(metric["metric"]).rpartition(".")[2] for metric in base["metric_list"][:2]
        ]
        place = _place(directory, row, _tested(base), tested=True)
        there, hub = "-" if place is None else place.name, _hub(row, base)
        table.append((name, str(row.shots), ", ".join(metrics), row.file, there, hub, _tested(base), row.licence))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def _built(name: str, row: Row, directory: Path, examples: int) -> Any:
    """A task, or a group of one for each part of its file."""
    from lm_eval.api.group import Group

    bases = list(_bases(row))
    hub, test, shots = _hub(row, bases[0]), _tested(bases[0]), _shown(bases[0])
    place = _place(directory, row, test, tested=True)
    if place is None:
        raise UserError(
            f"{name}: {directory} has no {row.file}.parquet, .jsonl or .jsonl.gz, nor a directory of that name: it is "
            f"the split {test} of {hub} on the Hugging Face hub (licence: {row.licence})"
        )
    beside = _place(directory, row, shots, tested=False) if examples and shots else None
    try:
        splits = {test: _read(place, test, row)}
        if shots and beside:
            splits[shots] = _read(beside, shots, row)
        if not splits[test]:
            raise ValueError("it has no rows")
        if row.part is None:
            return _task(name, row, bases[0], splits)
        group = Group.from_config({"group": name, "aggregate_metric_list": [{"metric": "acc"}]})
        known = [base["dataset_name"] for base in bases]
        for part in (r[row.part] for found in splits.values() for r in found):
            if part not in known:
                raise ValueError(f"{row.part} {part!r} is none of the {len(known)}{did_you_mean(part, known)}")
        for base in bases:
            own = {key: [r for r in found if r[row.part] == base["dataset_name"]] for key, found in splits.items()}
            if own[test]:
                group.add(_task(f"{name}_{base['dataset_name']}", row, base, own))
        return group
    except Exception as error:  # the harness tries the first document, and fails in many ways
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: {place} is not like {hub} on the hub ({why})") from error


def _task(name: str, row: Row, base: Mapping[str, Any], splits: Mapping[str, Sequence[Any]]) -> Any:
    """The harness's task on rows of ours. Where its examples are not there, they are other documents of the test."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    sets = {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items() if rows}
    changes = {"task": name, "custom_dataset": lambda **_: sets, **row.set}
    if row.shots:
        changes["num_fewshot"] = row.shots
    if (shown := _shown(base)) and shown not in sets:
        test = _tested(base)  # the harness leaves a document out of its own examples where both splits have one name
        changes |= {"training_split": None, "validation_split": None, "test_split": test, "fewshot_split": test}
    return ConfigurableTask(config={**base, **changes})


def _bases(row: Row, *, resolve: bool = True) -> Iterator[dict[str, Any]]:
    """The task files of the harness; where they `resolve`, with the functions that they name."""
    root = harness()
    from lm_eval.tasks._yaml_loader import load_yaml

    importlib.import_module("mixtral_jax.train.evals.tasks.majority")  # a filter of the harness from then on
    with own_code_eval():
        for path in sorted(root.glob(f"{row.of}.yaml")):
            try:
                yield load_yaml(path, resolve_func=resolve)
            except ImportError as error:  # of a package that only some tasks need
                raise UserError(f"{row.of} cannot be loaded: {error}") from error


def _tested(base: Mapping[str, Any]) -> str:
    return base.get("test_split") or base["validation_split"]


def _shown(base: Mapping[str, Any]) -> str | None:
    """The split of the examples; None: they stand in the task file."""
    own = "samples" in base.get("fewshot_config", {})
    return None if own else base.get("fewshot_split") or base.get("training_split") or "train"


def _hub(row: Row, base: Mapping[str, Any]) -> str:
    return row.hub or ", ".join(filter(None, (base["dataset_path"], base.get("dataset_name"))))


def _directory(name: str, data_dir: str | None) -> Path:
    place = data_dir or os.environ.get(VARIABLE)
    if not place:
        raise UserError(f"{name} reads a file: say where, by --data-dir, eval.tasks.data_dir or {VARIABLE}")
    return Path(place).expanduser()


def _place(directory: Path, row: Row, split: str, *, tested: bool) -> Path | None:
    """The file of a split: NAME.SPLIT, or NAME or NAME_sample of what is tested; or the directory NAME with all."""
    stems = [f"{row.file}.{split}", *((row.file, f"{row.file}_sample") if tested else ())]
    places = [directory / (stem + ending) for stem in stems for ending in _ENDINGS] + [directory / row.file]
    return next((place for place in places if place.exists()), None)


def _read(place: Path, split: str, row: Row) -> list[dict[str, Any]]:
    """The rows of a file, with the columns that the hub's have."""
    source = SourceConfig(name="task", path=str(place), split=split if place.is_dir() else None)
    census = Census(skip=False)
    lumps = (lump for file in source_files(source) for lump in read_lumps(source, file, (), census))
    found = []
    for lump in lumps:
        for number, record in lump.parse(census):
            try:
                found.append(_as_on_the_hub(record, row.letters))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{lump.where(number)}: {error!r}") from error
    return found


def _as_on_the_hub(row: dict[str, Any], letters: bool) -> dict[str, Any]:
    """Files made for reading have the answer as true or false, or as an index into a list of choices."""
    answer = row.get("answer")
    if isinstance(answer, bool):
        return {**row, "label": int(answer)}
    if letters and isinstance(row.get("choices"), list):
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": labels}
        if not isinstance(answer, int) or answer not in range(len(labels)):
            raise ValueError(f"answer is {answer!r}, of {len(labels)} choices, the first of which is 0")
        return {**row, "question_stem": row["question"], "choices": choices, "answerKey": labels[answer]}
    return row
