"""Everything that the steps of a run need, made from its configuration."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from mixtral_jax.data import progress
from mixtral_jax.data.loader import Loader, References
from mixtral_jax.data.prepare.cache import digest
from mixtral_jax.data.prepare.prepare import PreparedData, prepare
from mixtral_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.model import Mixtral
from mixtral_jax.train.checkpoints.checkpointer import Found, Say, restore_state
from mixtral_jax.train.config.load import check_vocabulary
from mixtral_jax.train.config.schema import DpoStageConfig, RunConfig, TuningConfig, check_sizes
from mixtral_jax.train.feed import batch_share, make_put
from mixtral_jax.train.objective import Objective, next_token
from mixtral_jax.train.optimizer import Optimizer, make_optimizer
from mixtral_jax.train.plan.placement import placement_warnings
from mixtral_jax.train.preference.objective import preference
from mixtral_jax.train.preference.references import live, precomputed
from mixtral_jax.train.run.first_screen import first_screen
from mixtral_jax.train.run.masks import mask_lines
from mixtral_jax.train.run.peers import agree
from mixtral_jax.train.run.resume import check_same_base, check_same_data, config_differences
from mixtral_jax.train.state import TrainState, abstract_state, init_state, start_from
from mixtral_jax.train.step import make_eval_step, make_train_step
from mixtral_jax.train.weights import (
    abstract_params,
    base_warnings,
    base_weights,
    fresh_adapters,
    fresh_weights,
    is_trained,
    join,
    keep,
    leaves,
    make_merge,
    trainable_table,
)

# The objective of each stage.
OBJECTIVES: Mapping[str, Callable[[Any], Objective]] = {
    "pretrain": lambda config: next_token(config.router, config.model),
    "sft": lambda config: next_token(config.router, config.model, config.neftune, entropy=True, skip_masked=True),
    "dpo": lambda config: preference(config.dpo, config.router, config.model, config.neftune),
}


class Parts(NamedTuple):
    """What the steps of a run need."""

    mesh: jax.sharding.Mesh | None
    train_step: Any  # jitted: (state, frozen, batch) -> (state, report)
    eval_step: Callable[[Any, Any], Any]  # (params, batch)
    merge: Callable[[Any, Any], Mixtral]
    state: TrainState
    frozen: Any
    put: Callable[[Any], Any]  # a host batch onto the devices, with what the reference says of it
    references: References | None  # precomputed, by source
    share: tuple[int, int]  # of the rows of a micro-batch
    prepared: PreparedData
    loader: Loader
    tokenizer: Tokenizer
    start: int  # updates done
    first_row: int  # of the data, for the next update
    tokens: int  # seen so far


def build(config: RunConfig, mesh: jax.sharding.Mesh | None, found: Found | None, say: Say) -> Parts:
    """Data, model, state, and the compiled step."""
    data = config.data
    if mesh is not None:
        check_sizes(config, mesh.shape)
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocabulary(config, tokenizer.vocab_size)
    share = batch_share(mesh, config.rows_per_micro_batch)
    speaks = jax.process_index() == 0
    prepared = prepare(data, config.seq_len, config.seed, progress=speaks)
    if prepared.fresh and speaks:
        progress.say(prepared.summary())
    agree(
        configuration=digest(config.model_dump(mode="json", exclude={"output_dir", "data"})),  # paths may differ
        data=prepared.fingerprint,
        checkpoint=-1 if found is None else found.step,
    )
    first_row = 0
    if found is not None:
        first_row = check_same_data(found, prepared.fingerprint, data.restart)
        check_same_base(found, config)
        say(f"resuming from checkpoint {found.step} at row {first_row}")
        for line in config_differences(found.meta["config"], config.model_dump(mode="json")):
            say(f"  changed {line}")
    first_screen(config, mesh, prepared, say)

    optimizer = make_optimizer(config.optimizer, config.steps, config.router_factor)
    weights = abstract_params(config, mesh)
    for line in trainable_table(config, weights):
        say(f"{'trained':>8}  {line}")
    for line in (*placement_warnings(config, mesh, leaves(weights)), *([] if found else base_warnings(config))):
        say(f"{'warning':>8}  {line}")
    if isinstance(config, TuningConfig):
        for line in mask_lines(config, prepared.train, tokenizer):
            say(f"{'learned':>8}  {line}")
    put, references = make_put(mesh, share), None
    if isinstance(config, DpoStageConfig):
        say(f"{'reference':>8}  {config.reference}")
        if config.reference == "precomputed":
            references = precomputed(config, prepared, base_weights(config, weights), put, share, say)
    state, frozen = _start(config, mesh, weights, optimizer, found)
    merge, objective = make_merge(config), OBJECTIVES[config.stage](config)
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, state)
    train_step = make_train_step(objective, optimizer, merge, shardings, config.seed if config.noisy else None)
    eval_step = make_eval_step(objective, merge)
    loader = Loader(
        prepared, global_batch_size=config.global_batch_size, micro_batch_size=config.rows_per_micro_batch,
        shard=share, start_row=first_row, references=references,
    )  # fmt: skip
    return Parts(
        mesh, train_step, lambda params, batch: eval_step(params, frozen, batch), merge, state, frozen,
        _asking(config, weights, frozen, put), references, share, prepared, loader, tokenizer,
        0 if found is None else found.step, first_row, 0 if found is None else int(found.dataset["tokens"]),
    )  # fmt: skip


def _start(
    config: RunConfig, mesh: jax.sharding.Mesh | None, weights: Any, optimizer: Optimizer, found: Found | None
) -> tuple[TrainState, Any]:
    """(state, frozen): from a checkpoint, from init_from, or from random numbers; the base under LoRA is frozen."""
    trained = is_trained(config)
    shapes = keep(weights, trained)
    abstract = abstract_state(shapes, optimizer, None if mesh is None else jax.tree.map(lambda x: x.sharding, shapes))
    if config.adapters is None:
        if found is not None:
            return restore_state(found, abstract), None
        if config.init_from is None:
            return init_state(lambda: fresh_weights(config), optimizer, abstract), None
        return start_from(base_weights(config, weights), optimizer, abstract), None
    base = base_weights(config, weights)
    frozen = keep(base, lambda path: not trained(path))
    if found is not None:
        return restore_state(found, abstract), frozen
    params = join(fresh_adapters(config, weights), keep(base, trained))
    return start_from(params, optimizer, abstract), frozen


def _asking(config: RunConfig, weights: Any, frozen: Any, put: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`put`, and of a live reference the numbers of every batch. Where all of the base is frozen, it needs no copy."""
    if not isinstance(config, DpoStageConfig) or config.reference not in ("frozen", "lora_base"):
        return put
    whole = config.adapters is not None and not config.router_factor
    return live(config, frozen if whole else base_weights(config, weights), put)
