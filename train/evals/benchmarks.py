"""Tasks of lm-evaluation-harness: found by name, run in process, their scores and samples kept."""

import contextlib
import fnmatch
import importlib
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixtral_jax.data.prepare import digest, write_atomically
from mixtral_jax.data.progress import meter
from mixtral_jax.data.text import Tokenizer
from mixtral_jax.model import Mixtral
from mixtral_jax.train.errors import UserError, did_you_mean
from mixtral_jax.train.evals.tasks import PREFIX, harness, own_code_eval, passes, rows, with_local
from mixtral_jax.train.meetings import agree
from mixtral_jax.train.run_files import json_object

Tasks = Mapping[str, Any]  # the harness's TaskDict
ERROR = "_stderr"  # behind the name of a metric
BOOTSTRAPS = 1000  # resamples for the standard error of a metric that has no formula for it
_SEED, _NUMPY_SEED, _SHOTS_SEED = 0, 1234, 1234  # those of the harness's own command line
# Settings, since variables of the environment are read once, when these are imported, which may be long ago.
_OFFLINE = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("evaluate.config", "HF_EVALUATE_OFFLINE"),
)


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are found and run; the words are those of the harness."""

    include: Sequence[str] = ()  # directories of YAML task files
    data_dir: str | None = None  # of local tasks; None: as the variable MIXTRAL_JAX_DATA says
    num_fewshot: int | None = None  # None: as each task says
    limit: int | None = None  # documents of each task; None: all
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True  # each example is a turn of the chat
    system: str | None = None
    network: bool = False  # data may be fetched from the hub
    allow_code: bool = False  # what the model writes may be run


def find_tasks(names: Sequence[str], options: TaskOptions, *, longest: int) -> Tasks:
    """The tasks, groups and tags of these names, with their data; local ones before others. All processes call this.

    `*` stands for what is in the names of tasks, not of groups and tags, whose tasks it would find again. `longest` are
    the tokens that the model reads, see `HarnessModel`.

    Raises:
        UserError: lm-eval is not installed, a name is of no task, data are not there or not those of the other
            processes, code would be run, or cannot be, a number is too small, or an answer too long for the model.
    """
    harness()
    if absent := [directory for directory in options.include if not Path(directory).is_dir()]:
        raise UserError(f"--include {absent[0]} is no directory of task files")
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if (number := getattr(options, name)) is not None and number < least:
            raise UserError(f"{name} is {number}: it must be at least {least}")
    with _manners(options.network), own_code_eval():
        tasks = _loaded(names, options)
    from mixtral_jax.train.evals.harness import check_room

    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            _check_code(name, options.allow_code)
        if task.OUTPUT_TYPE == "generate_until":
            check_room(name, task.config.generation_kwargs or {}, longest)
        shots = task.get_config("num_fewshot")
        if shots is None or (options.num_fewshot is not None and shots != 0):  # 0 in a task's file is meant so
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
    documents = [(name, len(docs := task.eval_docs), docs[:1], docs[-1:])
                 for name, task in sorted(tasks["tasks"].items())]  # fmt: skip
    agree(tasks=digest(sorted(tasks["tasks"])), documents=digest(repr(documents)))
    return tasks


def _loaded(names: Sequence[str], options: TaskOptions) -> Tasks:
    from lm_eval.tasks import TaskManager

    def matching(name: str) -> list[str]:
        return [name] if name in (*rows(), *own.all_tasks) else fnmatch.filter((*rows(), *own.all_subtasks), name)

    own = TaskManager(include_path=list(options.include), include_defaults=False)
    if not all(matching(name) or name.startswith(PREFIX) for name in names):  # the harness's own are 14,683
        own = TaskManager(include_path=list(options.include))
    for name in names:
        if not matching(name):
            raise UserError(f"task {name} is unknown{did_you_mean(name, (*rows(), *own.all_tasks))}")
    found = dict.fromkeys(each for name in names for each in matching(name))
    try:
        return own.load(with_local(list(found), options.data_dir, options.num_fewshot))
    except UserError:
        raise
    except Exception as error:  # task files and the hub's client fail in every way
        away = isinstance(error, OSError) and not options.network
        hint = "; --network lets tasks fetch data from the hub" if away else ""
        raise UserError(f"tasks {','.join(names)}: {str(error) or type(error).__name__}{hint}") from error


def _check_code(name: str, allowed: bool) -> None:
    if not allowed:
        raise UserError(
            f"task {name} runs code that the model writes: allow it by --allow-code or eval.tasks.allow_code"
        )
    if not passes(""):
        raise UserError(f"task {name} runs programs, and on this machine not even an empty one runs to its end")


@dataclass(frozen=True)
class Results:
    """What tasks gave; `documents` and `shots` by task, `scores` by task (and group) and metric."""

    scores: Mapping[str, Mapping[str, float]]
    documents: Mapping[str, int]
    shots: Mapping[str, int]
    versions: Mapping[str, Any]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def metrics(self) -> dict[str, float]:
        """As a line of metrics.jsonl has them: eval/<task>/<metric>."""
        return {f"eval/{task}/{metric}": value for task, own in self.scores.items() for metric, value in own.items()}

    def table(self) -> str:
        """A line for each score, with its standard error."""
        width = max(map(len, ("task", *self.scores)))
        lines = [f"{'task':{width}}  shots  documents  {'metric':24}   value  stderr"]
        for task, own in self.scores.items():
            for metric, value in own.items():
                if not metric.endswith(ERROR):
                    error = own.get(metric + ERROR)
                    shown = "" if error is None else f"  {error:.4f}"
                    counts = f"{self.shots.get(task, ''):>5}  {self.documents.get(task, ''):>9}"
                    lines.append(f"{task:{width}}  {counts}  {metric:24}  {value:.4f}{shown}")
        return "\n".join(lines)

    def write(self, directory: Path, *, whole_stays: bool = False, **about: Any) -> list[str]:
        """results.json, with what else is known `about` them, and samples_<task>.jsonl; null: a score is not finite.

        Other tasks that are there stay. `whole_stays`: so do those of all documents, where this is a part (`limit`);
        they are returned.
        """
        directory.mkdir(parents=True, exist_ok=True)
        found = json_object(file := directory / "results.json").get("tasks")
        former = found if isinstance(found, dict) else {}
        is_part = whole_stays and about["options"]["limit"] is not None
        whole = [task for task in self.scores if is_part and _is_whole(former.get(task))]
        tasks = former | {
            task: {**about, "shots": self.shots.get(task), "documents": self.documents.get(task),
                   "version": self.versions.get(task),
                   "scores": {name: value if math.isfinite(value) else None for name, value in own.items()}}
            for task, own in self.scores.items() if task not in whole
        }  # fmt: skip
        for task, samples in self.samples.items():
            if task in whole:
                continue
            lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
            write_atomically(directory / f"samples_{task}.jsonl", "".join(lines))
        write_atomically(file, json.dumps({"tasks": tasks}, indent=2, default=str) + "\n")
        return whole


def _is_whole(kept: Any) -> bool:
    """Whether an entry of results.json is of all documents."""
    options = kept.get("options") if isinstance(kept, dict) else None
    return isinstance(options, dict) and options.get("limit") is None


def run_tasks(
    model: Mixtral,
    tokenizer: Tokenizer,
    tasks: Tasks,
    options: TaskOptions,
    *,
    template: Any = None,
    check: Callable[[], None] = lambda: None,
) -> Results:
    """Ask the model what `find_tasks` found. All processes call this alike, under the mesh, and have all scores.

    Args:
        template: of chats, see `load_template`.
        check: called at every batch, every few tokens that are written, and every document of programs; may raise.
    """
    with _manners(options.network), own_code_eval(check):
        from lm_eval import evaluator

        from mixtral_jax.train.evals.harness import HarnessModel

        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=_SHOTS_SEED)  # each evaluation goes on drawing where the one before ended
        found = evaluator.evaluate(
            HarnessModel(model, tokenizer, template, partial(_metered, check)), tasks, limit=options.limit,
            bootstrap_iters=BOOTSTRAPS, system_instruction=options.system,
            apply_chat_template=options.apply_chat_template, fewshot_as_multiturn=options.fewshot_as_multiturn,
            confirm_run_unsafe_code=options.allow_code,
        )  # fmt: skip
    return Results(
        {task: _named(own) for task, own in found["results"].items()},
        {task: counts["effective"] for task, counts in found["n-samples"].items()},
        found["n-shot"], found["versions"], found["samples"],
    )  # fmt: skip


@contextlib.contextmanager
def _metered(check: Callable[[], None], title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A meter on process 0 that calls `check` whenever it moves."""
    with meter(title, total, show=jax.process_index() == 0) as advance:

        def moved(done: int) -> None:
            check()
            advance(done, "")

        yield moved


def _named(own: Mapping[str, Any]) -> dict[str, float]:
    """Scores by `metric`, and where it has been measured behind several filters by `metric,filter`; each with its
    `_stderr` behind that.
    """
    metrics = [key.partition(",")[0] for key in own]
    found = {}
    for key, value in own.items():
        metric, comma, behind = key.partition(",")
        name = metric.removesuffix(ERROR)
        if comma and isinstance(value, int | float):
            whole = name if metrics.count(name) == 1 else f"{name},{behind}"
            found[whole + metric[len(name) :]] = float(value)
    return found


@contextlib.contextmanager
def _manners(network: bool) -> Iterator[None]:
    """The harness quiet, in one process, with its command's seeds, and the hub shut unless told; all is put back."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    drawn, numpys = random.getstate(), np.random.get_state()
    random.seed(_SEED), np.random.seed(_NUMPY_SEED)
    with contextlib.ExitStack() as after:
        after.callback(np.random.set_state, numpys)
        after.callback(random.setstate, drawn)
        for name in ("DISABLE_MULTIPROC", "TQDM_DISABLE"):
            before = os.environ.get(name)
            after.callback(os.environ.pop if before is None else os.environ.__setitem__, name, before or "")
            os.environ[name] = "1"
        for module, setting in _OFFLINE:
            holder = importlib.import_module(module)
            after.callback(setattr, holder, setting, getattr(holder, setting))
            setattr(holder, setting, not network)
        after.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
