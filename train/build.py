"""Everything that the steps of a run need, made from its configuration."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mixtral_jax.convert import arrays_identity
from mixtral_jax.data import progress
from mixtral_jax.data.loader import EvalSource, Loader, eval_sources
from mixtral_jax.data.prepare import PreparedData, digest, prepare
from mixtral_jax.data.records import stage_in
from mixtral_jax.data.rows import Position, batches
from mixtral_jax.data.text import Tokenizer, load_tokenizer
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.train.base import base_weights, check_base_shape, first_params, pin_base
from mixtral_jax.train.checkpoints import Found, Say, patiently
from mixtral_jax.train.config import DpoStageConfig, RunConfig, TuningConfig, check_sizes, check_vocabulary, read_config
from mixtral_jax.train.evals import Tasks, run_tasks
from mixtral_jax.train.feed import batch_share, make_put
from mixtral_jax.train.meetings import agree, first_alone, meet
from mixtral_jax.train.objectives import OBJECTIVES
from mixtral_jax.train.optimizer import Params, RatePart, make_optimizer
from mixtral_jax.train.phases import Phase, Phases
from mixtral_jax.train.plan import placement_warnings
from mixtral_jax.train.preference import Put, live, make_sequence_logps, precomputed
from mixtral_jax.train.run import (
    Account,
    begin_at,
    changed_since,
    first_screen,
    mask_lines,
    restored,
    task_options,
    tasks_of,
    tree_changes,
)
from mixtral_jax.train.state import TrainState, abstract_state, start_from
from mixtral_jax.train.step import make_eval_step, make_train_step
from mixtral_jax.train.text import generate
from mixtral_jax.train.weights import (
    abstract_params,
    is_trained,
    keep,
    leaves,
    make_base_merge,
    make_merge,
    trainable_table,
)


class Parts(NamedTuple):
    """What the steps of a run need."""

    train_step: Any  # jitted: (state, frozen, batch) -> (state, report)
    eval_step: Callable[[Params, Any], Any]  # (params, batch) -> sums
    merge: Callable[[Params], Mixtral]  # trained parameters -> the whole model
    frozen: Any  # the base under adapters, else None
    put: Put  # a host batch onto the devices, with what the reference says of it
    open_loader: Callable[[Account, int], Loader]  # batches behind a step
    held_out: Mapping[str, EvalSource]
    tokenizer: Tokenizer
    account: Account  # where the run stands in its data
    tokens: int  # seen so far
    base: Mapping[str, Any] | None  # which weights the run stands on
    tasks: Tasks | None  # benchmarks


def prepare_data(config: RunConfig) -> PreparedData:
    """All that the run reads, as rows on disk; what was made just now is said."""
    speak = jax.process_index() == 0
    with first_alone(config.data.cache_dir):
        prepared = prepare(config.data, config.seq_len, config.seed, progress=speak)
    if prepared.fresh and speak:
        progress.say(prepared.summary())
    return prepared


def settle_steps(config: RunConfig, begin: Callable[[], None] = lambda: None, found: Found | None = None) -> RunConfig:
    """The config with `steps` instead of `data.epochs`: the last step reaches the last row of the last epoch.

    Args:
        begin: called by all processes where data are to be prepared for it.
        found: the checkpoint that is gone on from; the rows that were read before count, in whatever batches.

    Raises:
        UserError: the processes have not the same configuration; they would do different things from here on.
    """
    agree(configuration=digest(config.model_dump(mode="json", exclude={"output_dir", "data"})))  # paths may differ
    epochs = config.data.epochs
    if config.steps or epochs is None:
        return config
    begin()
    prepared = prepare_data(config)
    start = (found and Position.read(found.step, found.dataset)) or Position(found.step if found else 0)
    read = {name: start.drawn.get(name, 0) for name in prepared.sources.keys() - {*start.others(prepared.sources)}}
    trained = max(0, sum(read.values()) - start.lost)  # a roll back changes nothing for the length of the run
    left = batches(epochs, sum(source.rows for source in prepared.train), config.global_batch_size, trained)
    return read_config(config, steps=start.step + left, data={"epochs": None})


def build(
    config: RunConfig, mesh: jax.sharding.Mesh | None, found: Found | None, say: Say, phases: Phases | None = None
) -> tuple[Parts, TrainState]:
    """Data, then weights, programs and the state to begin with; what a person should know is said on the way."""
    if mesh is not None:
        check_sizes(config, mesh.shape)
    stage_in(config.data.staging_dir, config.data.staging_bytes)
    tokenizer, tasks = load_tokenizer(config.data.tokenizer), tasks_of(config)
    check_vocabulary(config, tokenizer.vocab_size)
    prepared = prepare_data(config)
    account = _account(config, found, prepared, say)
    first_screen(config, mesh, prepared, account.start, say)
    weights, trained = abstract_params(config, mesh), is_trained(config)
    for title, lines in {
        "note": tokenizer.notes,
        "trained": trainable_table(config, weights),
        "warning": [*placement_warnings(config, mesh, leaves(weights)), *([] if found else check_base_shape(config))],
        "learned": mask_lines(config, prepared.train, tokenizer) if isinstance(config, TuningConfig) else [],
    }.items():
        for line in lines:
            say(f"{title:>8}  {line}")
    share = batch_share(mesh, config.rows_per_micro_batch)
    started, noted = pin_base(config, found and found.meta.get("base"))
    agree(base="none" if noted is None else f"step {noted['step']} with digest {noted['digest']}")
    put, references, frozen, base = make_put(mesh, share), None, None, None
    if isinstance(started, DpoStageConfig):
        say(f"{'reference':>8}  {reference_line(started)}")
        if started.reference == "precomputed":  # before the run's own weights: one model in memory at a time
            references = numbers_of_reference(started, weights, prepared, put, share, say)
    if found is None or config.adapters is not None:
        base = base_weights(started, weights)
    if config.adapters is not None:
        frozen = keep(base, lambda path: not trained(path))
    if isinstance(config, DpoStageConfig) and config.reference in ("frozen", "lora_base"):
        whole = frozen is not None and not config.trains_of_base  # else a copy: the base is trained on
        put = live(sequence_logps_of(config), frozen if whole else base_weights(started, weights), put)
    layout = partial(
        Loader, prepared, global_batch_size=config.global_batch_size, micro_batch_size=config.rows_per_micro_batch,
        shard=share, references=references,
    )  # fmt: skip
    rows, sample = config.eval.batch_size or config.rows_per_micro_batch, config.eval.batches
    held_out = eval_sources(prepared, batch_size=rows, shard=share, batches=sample, references=references)
    optimizer = make_optimizer(config.optimizer, config.steps, config.router_factor, rate_parts(config))
    abstract = abstract_state(keep(weights, trained), optimizer)
    if found is not None:
        state = _restored(config, found, abstract, phases or Phases(), say)
    else:
        state = start_from(first_params(started, base, keep(weights, trained)), optimizer, abstract)
    merge, objective = make_merge(config), OBJECTIVES[config.stage](config)
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, abstract)
    eval_step = make_eval_step(objective, merge)
    parts = Parts(
        train_step=make_train_step(objective, optimizer, merge, shardings, config.seed if config.noisy else None),
        eval_step=lambda params, batch: eval_step(params, frozen, batch),
        merge=lambda params: merge(params, frozen),
        frozen=frozen, put=put, held_out=held_out, tokenizer=tokenizer, account=account,
        open_loader=lambda account, step: layout(start_row=account.row(step), order=account.order),
        tokens=0 if found is None else int(found.dataset["tokens"]), base=noted, tasks=tasks,
    )  # fmt: skip
    return parts, state


def rate_parts(config: RunConfig) -> list[RatePart]:
    """What the phases of the data say of the learning rate."""
    return [
        RatePart(phase.from_step, rate.schedule, rate.final_fraction or 0.0)
        for phase in config.data.mixed
        if (rate := phase.learning_rate) is not None
    ]


def _account(config: RunConfig, found: Found | None, prepared: PreparedData, say: Say) -> Account:
    """Where the run stands in its data; the processes and the checkpoint must mean the same run."""
    agree(
        data=prepared.fingerprint,
        checkpoint=-1 if found is None else found.step,
        validation=" ".join(source.fingerprint for source in prepared.validation),
    )
    changed = changed_since(found, config)
    start = begin_at(found, prepared, config, changed, say)
    if found is not None:
        say(f"resuming from {found.name} at row {start.row}")
    for line in changed:
        say(f"  changed {line}")
    seen = {} if found is None else found.dataset.get("seen", {})
    return Account(prepared, start, config.global_batch_size, seen, say)


def _restored(config: RunConfig, found: Found, abstract: TrainState, phases: Phases, say: Say) -> TrainState:
    what, changed = f"{found.name} could not be read", tree_changes(changed_since(found, config))
    with phases.during(Phase.RESTORING):
        return patiently(what, lambda: restored(found, abstract, changed), say, alone=False)


def continuations(parts: Parts, config: RunConfig, params: Params, prompts: list[Any]) -> list[str]:
    """What the model with these parameters makes of texts or chats."""
    return generate(
        parts.merge(params), prompts, tokenizer=parts.tokenizer, template=config.data.template, seed=config.seed,
        max_new_tokens=config.sample.max_new_tokens, temperature=config.sample.temperature,
    )  # fmt: skip


def benchmark(
    parts: Parts, config: RunConfig, directory: Path, say: Say, params: Params, step: int, check: Callable[[], None]
) -> dict[str, float]:
    """eval/<task>/<metric> of these parameters; process 0 keeps scores and samples in <directory>/<step>."""
    assert parts.tasks is not None and config.eval.tasks is not None
    options, template = task_options(config.eval.tasks), config.data.template
    model = parts.merge(params)
    results = run_tasks(model, parts.tokenizer, parts.tasks, options, template=template, check=check)
    if jax.process_index() == 0:
        results.write(directory / str(step), options=vars(options))
    say(f"tasks at step {step}:\n{results.table()}")
    meet("benchmarks")  # programs that a model wrote take longer on one machine than on another
    return results.metrics


def reference_line(config: DpoStageConfig) -> str:
    """The kind of reference, and where it is not what the policy begins as."""
    if config.reference == "none" or config.lora is None or config.lora.init_from is None:
        return config.reference
    return f"{config.reference}: without the adapter {config.lora.init_from}, so the policy differs from it at step 0"


def sequence_logps_of(config: DpoStageConfig) -> Callable[[Any, Any], jax.Array]:
    """What a reference says of a batch, of parameters without adapters."""
    return make_sequence_logps(make_base_merge(config), config.dpo.ld_alpha)


def numbers_of_reference(
    config: DpoStageConfig, weights: Any, prepared: PreparedData, put: Put, share: tuple[int, int], say: Say
) -> dict[str, np.ndarray]:
    """The log-probabilities of all rows under the weights that the run starts from, for the loader to add."""
    reference = base_weights(config, weights)
    made_of = {
        "weights": arrays_identity(reference),
        "model": config.model.model_dump(mode="json"),
        "compute": config.compute.model_dump(mode="json") | {"dtype": compute_dtype(config.compute.dtype).name},
        "platform": jax.default_backend(),  # which decides what `auto` is
        "ld_alpha": config.dpo.ld_alpha,
        "micro_batch": config.rows_per_micro_batch,
    }
    ask = live(sequence_logps_of(config), reference, put)
    sources, cache = (*prepared.train, *prepared.validation), config.data.cache_dir
    return precomputed(sources, ask, made_of, cache, config.rows_per_micro_batch, share, say)
