"""Everything that the steps of a run need, made from its configuration."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from data.loader import Loader, open_loader
from data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.sharding import param_shardings
from train.checkpoint import Found, Say, restore_state
from train.config import RunConfig, check_vocabulary
from train.feed import batch_share, make_put
from train.first_screen import first_screen
from train.objectives import Objective, next_token
from train.optimizer import make_optimizer
from train.resume import check_same_data, config_differences
from train.state import TrainState, abstract_state, init_state, read_weights, start_from
from train.step import make_eval_step, make_train_step

# The objective of each stage.
OBJECTIVES: Mapping[str, Callable[[Any], Objective]] = {
    "pretrain": lambda config: next_token(config.router, config.model),
    "sft": lambda config: next_token(config.router, config.model),
}


class Parts(NamedTuple):
    """What the steps of a run need."""

    mesh: jax.sharding.Mesh | None
    train_step: Any  # jitted: (state, frozen, batch) -> (state, report)
    eval_step: Callable[[Any, Any], Any]  # (params, batch)
    merge: Callable[[Any, Any], Mixtral]
    state: TrainState
    frozen: Any
    put: Callable[[Any], Any]
    share: tuple[int, int]  # of the rows of a micro-batch
    loader: Loader
    tokenizer: Tokenizer
    start: int  # updates done
    first_row: int  # of the data, for the next update
    tokens: int  # seen so far


def build(config: RunConfig, mesh: jax.sharding.Mesh | None, found: Found | None, say: Say) -> Parts:
    """Data, model, state, and the compiled step."""
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocabulary(config, tokenizer.vocab_size)
    share = batch_share(mesh, config.rows_per_micro_batch)
    first_row = 0 if found is None else int(found.dataset["next_row"])
    loader = _open(config, data, share, first_row)
    if found is not None:
        row = check_same_data(found, loader.fingerprint, data.restart)
        if row != first_row:
            loader.close()
            first_row, loader = row, _open(config, data, share, row)
        say(f"resuming from checkpoint {found.step} at row {first_row}")
        for line in config_differences(found.meta["config"], config.model_dump(mode="json")):
            say(f"  changed {line}")
    first_screen(config, mesh, loader, say)

    model = abstract_model(config.model, config.compute)
    graphdef, _ = nnx.split(model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(nnx.to_pure_dict(nnx.state(model)), optimizer, param_shardings(model, mesh))
    if found is not None:
        state = restore_state(found, abstract)
    elif config.init_from is not None:
        state = start_from(read_weights(config.init_from, abstract.params), optimizer, abstract)
    else:
        state = init_state(lambda: _fresh_params(config), optimizer, abstract)

    def merge(params: Any, frozen: Any) -> Mixtral:
        return nnx.merge(graphdef, params)

    objective = OBJECTIVES[config.stage](config)
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, abstract)
    train_step = make_train_step(objective, optimizer, merge, shardings)
    eval_step = make_eval_step(objective, merge)
    return Parts(
        mesh, train_step, lambda params, batch: eval_step(params, None, batch), merge, state, None,
        make_put(mesh, share), share, loader, tokenizer, 0 if found is None else found.step, first_row,
        0 if found is None else int(found.dataset["tokens"]),
    )  # fmt: skip


def _fresh_params(config: RunConfig) -> Any:
    model = Mixtral(config.model, config.compute, key=jax.random.key(config.seed))
    return nnx.to_pure_dict(nnx.state(model))


def _open(config: RunConfig, data: Any, share: tuple[int, int], first_row: int) -> Loader:
    return open_loader(
        data,
        seq_len=config.seq_len,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.rows_per_micro_batch,
        seed=config.seed,
        shard=share,
        start_row=first_row,
    )
