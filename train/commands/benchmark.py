"""`eval --tasks`: what lm-evaluation-harness measures of a checkpoint, printed, and kept beside the run."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from mixtral_jax.data.progress import say
from mixtral_jax.data.text import Tokenizer
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.parallel import make_mesh
from mixtral_jax.train.base import newest_step
from mixtral_jax.train.config import MachineConfig, RunConfig, load_config, shape_of
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.evals import TaskOptions, find_tasks, run_tasks
from mixtral_jax.train.meetings import agree
from mixtral_jax.train.read_model import read_model, read_tokenizer, results_directory, run_place, run_template
from mixtral_jax.train.run import RunDirectory, failures_reported, open_files
from mixtral_jax.train.run_files import lines_backwards


def benchmark(
    checkpoint: str, names: Sequence[str], config: RunConfig | MachineConfig, options: TaskOptions, *,
    template: str | None = None, out: str | None = None, as_json: bool = False,
) -> int:  # fmt: skip
    """Print the scores of tasks, and write them and the samples into <run>/eval/<step>, or `out`.

    Args:
        template: chat format; None: that of the run, else of the tokenizer's directory, else by its control tokens.
        out: another directory; None: a model directory, which is no run, gets no files.

    Raises:
        UserError: as find_tasks and read_model; no tokenizer is found, or it does not fit the model.
    """
    with failures_reported(None):
        own, place = run_template(checkpoint), newest_step(checkpoint)
        tasks = find_tasks(names, options, longest=shape_of(place).max_position_embeddings)
        tokenizer, directory = read_tokenizer(checkpoint), results_directory(checkpoint, place, out)
        agree(checkpoint=Path(place).name)
        with model_of(checkpoint, place, config, tokenizer) as model:
            results = run_tasks(model, tokenizer, tasks, options, template=template or own)
    if jax.process_index() > 0:
        return ExitCode.DONE
    print(json.dumps({"checkpoint": checkpoint, **results.metrics}) if as_json else results.table())
    if directory is not None:
        # a run's directory of a step is of one checkpoint, however it is called and whoever asked
        left_out = results.write(directory, whole_stays=not out, checkpoint=checkpoint, options=vars(options))
        say(f"scores and samples are in {directory}")
        if left_out:
            say(f"note: those of {', '.join(left_out)} stay, of all documents; a part is not kept")
    step = Path(place).name
    if not out and (run := run_place(checkpoint)) is not None and step.isdigit():  # else a copy under another name
        if options.limit is None:
            _note(run, int(step), results.metrics)
        else:
            say("note: nothing is added to metrics.jsonl, as --limit leaves documents out")
    return ExitCode.DONE


@contextlib.contextmanager
def model_of(checkpoint: str, place: str, config: RunConfig | MachineConfig, tokenizer: Tokenizer) -> Iterator[Mixtral]:
    """The model at `place`, the checkpoint's newest step, on the mesh that is asked for, which is set.

    Raises:
        UserError: the tokenizer does not fit it.
    """
    mesh, compute = make_mesh(config.mesh), config.compute
    whole = compute_dtype(compute.dtype) == "float32"  # cast once; lower precisions keep the router as on disk
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        model = read_model(checkpoint, mesh=mesh, dtype="float32" if whole else None, compute=compute, path=place)
        if (pieces := tokenizer.vocab_size) > (known := model.config.vocab_size):
            raise UserError(f"the tokenizer of {checkpoint} has {pieces} pieces, the model knows {known}")
        yield model


def _note(place: Path, step: int, metrics: dict[str, float]) -> None:
    """A line in the run's metrics.jsonl and trackers, unless a process that lives writes there."""
    run, config = RunDirectory(place), load_config(place / "config.yaml").config
    with contextlib.ExitStack() as opened:
        try:
            run.hold(None)
        except UserError as error:
            say(f"note: nothing is added to metrics.jsonl: {error}")
            return
        opened.callback(run.release)
        newest = max((line["step"] for line in lines_backwards(run.metrics)), default=step)
        writer, _ = open_files(run, config, max(newest, step), False, opened)
        writer.write(step, metrics)
