"""What is wrong with a run, as far as a second can tell: before a directory, a row or a weight is made."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import jax

from mixtral_jax.data.prepare import check_first_records
from mixtral_jax.data.records import choose, file_system, is_remote, stage_in, staging_room
from mixtral_jax.data.text import Tokenizer, load_template, load_tokenizer
from mixtral_jax.kernels import Choice, choose_kernels
from mixtral_jax.model import compute_dtype
from mixtral_jax.parallel import MESH_AXES, machine
from mixtral_jax.train.base import by_tensorflow, check_base, stands_on_base
from mixtral_jax.train.config import RunConfig, check_sizes, check_vocabulary
from mixtral_jax.train.errors import ExitCode, UserError, failure_of
from mixtral_jax.train.evals import TaskOptions, Tasks, find_tasks
from mixtral_jax.train.hooks import TasksConfig
from mixtral_jax.train.plan import resident


def check(config: RunConfig, sizes: Mapping[str, int], *, resumes: bool) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a run in which nothing is known to be wrong, and what a person should know of its base.

    Args:
        sizes: of the mesh's axes on the devices that are there.
        resumes: a checkpoint is there, so that init_from is read again only where the run stands on it.

    Raises:
        UserError: one line for each problem: the mesh, the kernels, the tokenizer, the template, sources without files
            or whose first records are of another kind, a base that is not there or does not fit, a cache that cannot
            be made.
        OSError: a file system that does not answer.
    """
    problems: list[str] = []

    def looked(look: Callable[[], Any]) -> Any:
        try:
            return look()
        except (ValueError, OSError) as error:
            failure = failure_of(error)
            if failure.exit_code != ExitCode.USAGE:
                raise
            problems.append(failure.sentence)

    stage_in(config.data.staging_dir, config.data.staging_bytes)
    looked(partial(check_sizes, config, sizes))
    looked(partial(kernels_of, config, sizes))
    problems += _without_effect(config)
    text = tokenizer = looked(lambda: load_tokenizer(config.data.tokenizer))
    if tokenizer is not None:
        looked(lambda: check_vocabulary(config, tokenizer.vocab_size))
        if config.data.examples != "text":  # a tokenizer of its own: a template changes it
            text = looked(lambda: load_template(config.data.template, load_tokenizer(config.data.tokenizer)))
    for source in (*config.data.train, *config.data.validation):
        chosen = looked(partial(choose, source))
        if chosen is not None and text is not None:
            looked(partial(check_first_records, config.data, source, chosen.files, text))
    notes = looked(lambda: check_base(config, resumes)) if stands_on_base(config) or not resumes else None
    if is_remote(config.data.cache_dir):
        looked(partial(file_system, config.data.cache_dir))
        looked(partial(check_place, "data.staging_dir", staging_room()[0]))
    elif not os.path.isdir(config.data.cache_dir):  # one that is full of rows may be read only
        looked(partial(check_place, "data.cache_dir", config.data.cache_dir))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return tokenizer, notes or []


def _without_effect(config: RunConfig) -> Iterator[str]:
    """What is asked for and would never happen: no fault of a configuration that is read again behind its run."""
    if not resident(config, dict.fromkeys(MESH_AXES, 1))["parameters"]:
        yield "lora trains nothing: lora.targets names no matrix that this model has"
    saves = config.checkpoint.every or config.checkpoint.every_minutes or config.early_stopping or config.resume_from
    if config.on_nonfinite == "rollback" and not saves:
        yield "on_nonfinite is rollback, but checkpoint.every is null: there is nothing to go back to"
    if config.sample.every is not None and not config.sample.prompts:
        yield "sample.every is set, but sample.prompts is empty: there is nothing to continue"


def tasks_of(config: RunConfig) -> Tasks | None:
    """The benchmarks of a run; all processes call this.

    Raises:
        UserError: see `find_tasks`.
    """
    told, longest = config.eval.tasks, config.model.max_position_embeddings
    return None if told is None else find_tasks(told.names, task_options(told), longest=longest)


def task_options(tasks: TasksConfig) -> TaskOptions:
    """How the benchmarks of a run are found and run."""
    return TaskOptions(**tasks.model_dump(exclude={"names", "every"}))


def kernels_of(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, Choice]:
    """What each product of the step runs on, on this machine's devices.

    Raises:
        ValueError: a back-end that cannot run here is asked for, or `auto` has none.
    """
    dtype = compute_dtype(config.compute.dtype).name
    return choose_kernels(
        config.model, config.compute, machine(), seq_len=config.seq_len, dtype=dtype, context=sizes["context"]
    )


def sizes_of(mesh: jax.sharding.Mesh | None) -> dict[str, int]:
    """Of every axis; 1 where nothing is sharded."""
    return dict.fromkeys(MESH_AXES, 1) if mesh is None else dict(mesh.shape)


def check_place(key: str, path: str | Path) -> None:
    """Whether a directory can be made there, or written to.

    Raises:
        UserError: the nearest one that exists is a file, or may not be written to; or nothing here reads
            such addresses.
    """
    scheme, address, _ = str(path).partition("://")
    if address:
        if by_tensorflow(str(path)):
            return
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(f"{key}: {path} cannot be read: {error}") from error
        return
    place = Path(path).absolute()
    nearest = next(parent for parent in (place, *place.parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise UserError(f"{key}: {path} is not writable: {nearest} is no directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {path} is not writable: {nearest} may not be written to")
