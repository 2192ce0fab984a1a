"""`eval`: loss, perplexity, bits per byte and accuracy of a checkpoint, or how it ranks pairs, source by source."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.data.loader import EvalSource, eval_sources
from mixtral_jax.data.prepare import digest, prepare
from mixtral_jax.data.records import stage_in
from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.parallel import make_mesh
from mixtral_jax.train.base import base_weights, newest_step, pin_base
from mixtral_jax.train.build import sequence_logps_of
from mixtral_jax.train.commands.benchmark import benchmark
from mixtral_jax.train.commands.long_context import LongContext, long_context
from mixtral_jax.train.config import DpoStageConfig, MachineConfig, RunConfig, check_sizes
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.evals import TaskOptions, listing
from mixtral_jax.train.feed import batch_share, make_put
from mixtral_jax.train.hooks import measure_sources
from mixtral_jax.train.meetings import agree, first_alone
from mixtral_jax.train.objectives import OBJECTIVES
from mixtral_jax.train.preference import live
from mixtral_jax.train.read_model import read_model, with_base, with_tokenizer
from mixtral_jax.train.run import failures_reported, kernels_of, sizes_of
from mixtral_jax.train.step import make_eval_step
from mixtral_jax.train.weights import abstract_params


def evaluate(
    checkpoint: str | None, config: RunConfig | MachineConfig, *, as_json: bool = False, tasks: str | None = None,
    include: Sequence[str] | None = None, template: str | None = None, out: str | None = None,
    passkey: bool = False, by_length: str | None = None, lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None, samples: int | None = None, seed: int | None = None, **options: Any,
) -> int:  # fmt: skip
    """Print loss, perplexity, bits per byte and accuracy of each validation source; 3 where a loss is not finite.

    Args:
        tasks: in place of that the scores of these, comma-separated; the other arguments are for them, see `benchmark`.
            `list` prints the local ones, and needs no checkpoint.
        passkey, by_length: in place of that what long contexts are worth; see LongContext, as of those that follow.

    Raises:
        UserError: as `measure`, `benchmark` and `long_context`; there is neither a run file nor anything else to do.
    """
    if checkpoint is None and tasks != "list":
        raise UserError("eval needs a checkpoint")
    asked = LongContext(passkey, by_length, lengths, depths, samples, seed)
    chosen = TaskOptions(include=include or (), **options)
    if checkpoint is not None and (passkey or by_length):
        if tasks is not None or (chosen, template) != (TaskOptions(), None):
            raise UserError("--passkey and --by-length go without --tasks, --limit, --template and their like")
        return long_context(checkpoint, config, asked, out=out, as_json=as_json)
    if asked != LongContext():
        raise UserError("--lengths, --depths, --samples and --seed are for --passkey and --by-length: neither is there")
    if checkpoint is None or tasks == "list":
        print(listing(chosen.data_dir))
        return ExitCode.DONE
    if tasks is not None:
        names = [name for name in tasks.split(",") if name]
        if not names:
            raise UserError("--tasks names none")
        if not chosen.apply_chat_template and (template is not None or not chosen.fewshot_as_multiturn):
            raise UserError("--template and --no-fewshot-as-multiturn are for chats: add --apply-chat-template")
        return benchmark(checkpoint, names, config, chosen, template=template, out=out, as_json=as_json)
    if not isinstance(config, RunConfig):
        raise UserError("eval needs CFG, whose data.validation it measures, or --tasks, --passkey or --by-length")
    if (chosen, template, out) != (TaskOptions(), None, None):
        raise UserError("--limit, --out and their like are for --tasks, which is not there")
    with failures_reported(None):
        metrics = measure(checkpoint, config)
    if jax.process_index() == 0:
        names = [source.name for source in config.data.validation]
        print(json.dumps({"checkpoint": checkpoint, **metrics}) if as_json else _table(metrics, names))
    if not math.isfinite(metrics["eval/loss"]):
        print("exit 3: the loss is not finite", file=sys.stderr)
        return ExitCode.NOT_FINITE
    return ExitCode.DONE


def measure(checkpoint: str, config: RunConfig) -> dict[str, float]:
    """eval/{loss,perplexity,bits_per_byte,accuracy} over the validation sources of a run file, and eval/<source>/*.

    Of pairs eval/{loss,rewards/accuracies,rewards/margins,pairs}, against the reference that the file's run would have.

    Raises:
        UserError: the file has no validation sources, or its tokenizer does not fit the model.
    """
    stage_in(config.data.staging_dir, config.data.staging_bytes)
    config = with_tokenizer(config, checkpoint)
    data = config.data
    if not data.validation:
        raise UserError("data.validation is empty: there is nothing to evaluate")
    place = newest_step(checkpoint)  # once: the run may go on
    agree(
        configuration=digest(config.model_dump(mode="json", exclude={"output_dir", "data"})),
        checkpoint=Path(place).name,
    )
    mesh = make_mesh(config.mesh)
    kernels_of(config, sizes_of(mesh))  # refused before a weight is read
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        model = read_model(checkpoint, mesh=mesh, compute=config.compute, path=place)
        pieces = load_tokenizer(data.tokenizer).vocab_size
        if pieces > model.config.vocab_size:
            raise UserError(
                f"data.tokenizer has {pieces} pieces, the model of {checkpoint} knows {model.config.vocab_size}"
            )
        if mesh is not None:
            check_sizes(config, mesh.shape, training=False)
        sources, put = open_validation(config, mesh)
        agree(validation=" ".join(source.fingerprint for source in sources.values()))

        if isinstance(config, DpoStageConfig) and config.reference != "none":
            started, _ = pin_base(*with_base(config, place))
            put = live(sequence_logps_of(config), base_weights(started, abstract_params(config, mesh)), put)
        score = make_eval_step(OBJECTIVES[config.stage](config), lambda model, _: model)
        return measure_sources(lambda batch: score(model, None, put(batch)), sources)


def open_validation(
    config: RunConfig, mesh: jax.sharding.Mesh | None
) -> tuple[dict[str, EvalSource], Callable[[Any], Any]]:
    """The validation sources of a run file, prepared, and the way of their batches onto the devices."""
    rows = config.eval.batch_size or config.rows_per_micro_batch
    share = batch_share(mesh, rows)
    with first_alone(config.data.cache_dir):
        prepared = prepare(config.data, config.seq_len, config.seed, progress=jax.process_index() == 0, train=False)
    return eval_sources(prepared, batch_size=rows, shard=share, batches=config.eval.batches), make_put(mesh, share)


def _table(metrics: dict[str, float], sources: Sequence[str]) -> str:
    forms = {"loss": (8, 4), "perplexity": (10, 3), "bits_per_byte": (9, 4), "accuracy": (8, 4)}
    forms |= {"pairs": (6, 0), "rewards/accuracies": (18, 4), "rewards/margins": (15, 4)}
    names = [name for name in forms if f"eval/{name}" in metrics]  # answers have no text that bits a byte would be of
    width = max(len("source"), *map(len, sources), len("all"))
    lines = ["  ".join([f"{'source':{width}}", *(f"{n.replace('_per_', '/'):>{forms[n][0]}}" for n in names)])]
    for label, prefix in [*((name, f"eval/{name}/") for name in sources), ("all", "eval/")]:
        values = [(metrics.get(prefix + name, math.nan), *forms[name]) for name in names]
        lines.append("  ".join([f"{label:{width}}", *(f"{value:{wide}.{digits}f}" for value, wide, digits in values)]))
    return "\n".join(lines)
