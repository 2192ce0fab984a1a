"""What a checkpoint stands for: its model (a run's adapters on the base under them, too), its tokenizer, its run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mixtral_jax import checkpoint as arrays
from mixtral_jax.config import ComputeConfig
from mixtral_jax.convert import is_training_checkpoint, kept_tokenizer, load
from mixtral_jax.data.records import is_remote
from mixtral_jax.data.text import Tokenizer, load_tokenizer
from mixtral_jax.model import Mixtral
from mixtral_jax.train.base import base_weights, holds_adapters, newest_step, pin_base
from mixtral_jax.train.config import RunConfig, load_config, run_and_step
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import kept_template
from mixtral_jax.train.weights import abstract_params, is_trained, join, keep, make_merge


def read_model(
    checkpoint: str, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = None, compute: ComputeConfig,
    path: str | None = None,
) -> Mixtral:  # fmt: skip
    """The model at `checkpoint`: an Orbax or Hugging Face directory, a run, or one of its steps.

    Args:
        path: which of a run's steps, where the caller knows; None: the newest.
        mesh: where the parameters are placed.
        dtype: of whole weights in memory; None: as on disk. A base under adapters is held as its run says.

    Raises:
        UserError: it is a run of adapters, and their base is not where the run says.
        ValueError: the checkpoint is not whole, or of no known kind.
    """
    run, path = run_config(checkpoint), path or newest_step(checkpoint)
    if run is None or run.adapters is None or not holds_adapters(path):
        return load(path, mesh, dtype=dtype, compute=compute)
    if run.init_from is not None and not is_remote(run.init_from) and not Path(run.init_from).exists():
        raise UserError(
            f"{checkpoint} holds the adapters of a LoRA run, and their base, init_from {run.init_from}, is not there: "
            "run this from the directory in which it was trained, or bring the base to that place"
        )
    run, _ = pin_base(run.model_copy(update={"compute": compute}), arrays.read_item(path, "meta").get("base"))
    weights, trained = abstract_params(run, mesh), is_trained(run)
    own = arrays.restore(path, {"params": keep(weights, trained)}, partial=True)["params"]
    base = keep(base_weights(run, weights), lambda name: not trained(name))
    return make_merge(run)(join(own, base), None)


def noted_base(checkpoint: str, init_from: str | None) -> Mapping[str, Any] | None:
    """Which weights the run of a checkpoint stands on, by its notes, where it names the same init_from."""
    meta = _notes(newest_step(checkpoint))
    return meta.get("base") if meta.get("config", {}).get("init_from") == init_from else None


def with_base(config: RunConfig, checkpoint: str) -> tuple[RunConfig, Mapping[str, Any] | None]:
    """The config with the base of the run that resume_from names, if it names one, and what is noted of that base.

    Raises:
        UserError: neither that run nor one that it began is there to say.
    """
    if config.resume_from is None:
        return config, noted_base(checkpoint, config.init_from)
    trunk, own = run_and_step(config.resume_from)[0], _notes(newest_step(checkpoint))
    begun = (own.get("resumed_from") or {}).get("run") == trunk and own["config"].get("stage") == config.stage
    noted = own if begun else _notes(newest_step(trunk))
    if not noted:
        raise UserError(f"resume_from: {trunk} is not there to say which base it stands on: name that as init_from")
    based = config.model_copy(update={"init_from": noted["config"].get("init_from"), "resume_from": None})
    return based, noted.get("base")


def _notes(path: str) -> Mapping[str, Any]:
    """What a run noted at one of its steps; nothing at another place."""
    return arrays.read_item(path, "meta") if is_training_checkpoint(path) else {}


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from its file, from a checkpoint directory that holds one, or that of the run that a path belongs to.

    Raises:
        UserError: no tokenizer is there.
        ValueError: no such file, or one that is no tokenizer.
    """
    if is_remote(str(path)):
        return load_tokenizer(path)
    place = Path(path)
    is_file = not place.is_dir()
    if is_file or any(next(place.glob(pattern), None) for pattern in ("*.model*", "tokenizer.json")):
        return load_tokenizer(path)
    run = run_place(str(path))
    if run is None:
        raise UserError(f"{path} holds no tokenizer: name one with --tokenizer")
    return load_tokenizer(kept_tokenizer(run) or load_config(run / "config.yaml").config.data.tokenizer)


def with_tokenizer(config: RunConfig, checkpoint: str) -> RunConfig:
    """A configuration whose data.tokenizer is there: else it is the copy of the run that the checkpoint belongs to."""
    run = run_place(checkpoint)
    own = None if run is None or Path(config.data.tokenizer).exists() else kept_tokenizer(run)
    data = config.data.model_copy(update={"tokenizer": str(own)})
    return config if own is None else config.model_copy(update={"data": data})


def run_template(checkpoint: str) -> str | Mapping[str, Any] | None:
    """The chat format of the run that a checkpoint belongs to; None: there is none, or the run names none."""
    run, config = run_place(checkpoint), run_config(checkpoint)
    if run is None or config is None:
        return None
    return kept_template(run) or config.data.template


def run_config(checkpoint: str) -> RunConfig | None:
    """The configuration of the run that a checkpoint belongs to; None for a model directory.

    Raises:
        UserError: there is nothing.
    """
    place = run_place(checkpoint)
    return None if place is None else load_config(place / "config.yaml").config


def run_place(checkpoint: str) -> Path | None:
    """The directory of the run that a checkpoint belongs to, where it lies in that; else None.

    Raises:
        UserError: there is nothing.
    """
    path = Path(checkpoint).absolute()
    if not is_remote(checkpoint) and not path.exists():
        raise UserError(f"{checkpoint} does not exist: it should be a checkpoint, a run or a model directory")
    inside = (path / arrays.STATE).exists() or path.name == "checkpoints"  # a config.yaml above others is not ours
    for place in (path, *(path.parents[:2] if inside else ())):
        # a model directory may hold a config.yaml of others
        if (place / "config.yaml").is_file() and not (place / "config.json").exists():
            return place
    return None


def results_directory(checkpoint: str, path: str, out: str | None) -> Path | None:
    """`out`, or <run>/eval/<step> of the step at `path`, see newest_step; None: the checkpoint is of no run.

    It is made here, before there is anything to lose.

    Raises:
        UserError: it cannot be.
    """
    run = run_place(checkpoint)
    directory = Path(out) if out else run and run / "eval" / Path(path).name
    if directory is not None and jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be made ({error.strerror}): --out names where to write") from error
        if not os.access(directory, os.W_OK):
            raise UserError(f"{directory} may not be written into: --out names another place")
    return directory
