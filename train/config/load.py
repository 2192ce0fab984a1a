"""The run configuration from a file: one typed tree per stage, checked as a whole."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.config import PRESETS, FrozenConfig
from mixtral_jax.train.config.schema import DpoStageConfig, PretrainConfig, RunConfig, SftConfig, from_preset
from mixtral_jax.train.config.tree import Tree, closest, read_tree, to_yaml
from mixtral_jax.train.config.validate import origins, validate
from mixtral_jax.train.errors import UserError

# The stage that a file names -> its class. Also the order in which `--help` lists them.
STAGES: Mapping[str, type[RunConfig]] = {"pretrain": PretrainConfig, "sft": SftConfig, "dpo": DpoStageConfig}

# Words of other libraries -> ours; only used to make an error more helpful.
SYNONYMS = {
    "lr": "optimizer.learning_rate",
    "peak_lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "grad_clip": "optimizer.max_grad_norm",
    "max_steps": "steps",
    "train_steps": "steps",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size, which counts sequences over the whole mesh",
    "gradient_accumulation_steps": "global_batch_size divided by micro_batch_size",
    "gradient_checkpointing": "compute.remat",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "eval.every",
    "logging_steps": "log.every",
    "bf16": "compute.dtype: bfloat16",
}


@dataclass(frozen=True)
class Provenance:
    """Where a configuration came from: the file as it was written, the overrides, and the origin of each leaf."""

    file: str
    text: str
    overrides: tuple[str, ...]
    origins: Mapping[str, str]


class Loaded(NamedTuple):
    """A checked configuration and where it came from."""

    config: RunConfig
    provenance: Provenance


def load_config(path: str | Path, overrides: Sequence[str] = (), *, command: str | None = None) -> Loaded:
    """Read, override, validate. `command` is the stage that the user asked for; None takes the file's own.

    Raises:
        FileNotFoundError: no such file.
        UserError: one line for each problem; the wrong command for the file is one.
    """
    tree = read_tree(path, overrides)
    config_class = _class_of(tree, str(path), command)
    problems = _expand_preset(tree)
    config = validate(config_class, tree, problems=problems, synonyms=SYNONYMS, also_known=("model.preset",))
    text = Path(path).read_text(encoding="utf-8")
    return Loaded(config, Provenance(str(path), text, tuple(overrides), origins(config, tree)))


def resolved_yaml(config: FrozenConfig, provenance: Provenance | None = None) -> str:
    """The complete YAML of a config; with a provenance each value says where it came from."""
    return to_yaml(config.model_dump(mode="json"), provenance.origins if provenance else None)


def json_schema(stage: str) -> dict[str, Any]:
    """JSON Schema of a stage's file, for editors.

    Raises:
        UserError: unknown stage.
    """
    schema = _stage_class(stage, f"config schema {stage}").model_json_schema()
    preset = {
        "type": "object",
        "properties": {"preset": {"enum": list(PRESETS), "type": "string"}},
        "required": ["preset"],
    }
    schema["properties"]["model"] = {"anyOf": [preset, schema["properties"]["model"]]}
    return schema


def check_vocabulary(config: RunConfig, tokenizer_size: int) -> None:
    """Once the tokenizer is open: every id that it makes needs a row of the embedding.

    Raises:
        UserError: the tokenizer has more pieces than model.vocab_size.
    """
    if tokenizer_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer_size} pieces and model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size to at least {tokenizer_size}, or use another tokenizer"
        )


def _class_of(tree: Tree, path: str, command: str | None) -> type[RunConfig]:
    stage = tree.values.get("stage")
    if stage is None:
        raise UserError(f"{path} names no stage: write `stage: {command or 'pretrain'}`")
    config_class = _stage_class(stage, path)
    if command is not None and stage != command:
        raise UserError(f"{path} is a {stage} file: run `{stage} {path}`, not `{command}`")
    return config_class


def _stage_class(stage: Any, where: str) -> type[RunConfig]:
    if stage in STAGES:
        return STAGES[stage]
    near = difflib.get_close_matches(str(stage), STAGES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{where}: stage {stage!r} is unknown: known are {', '.join(STAGES)}{hint}")


def _expand_preset(tree: Tree) -> dict[str, str]:
    """Put the preset's fields into the tree, so that their origin can be shown. Returns problems by path."""
    model = tree.values.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return {}
    name, origin, problems = model["preset"], tree.origin("model.preset"), {}
    if name not in PRESETS:
        near = closest(str(name), list(PRESETS), cutoff=0.4)
        hint = f"; the nearest is {near}" if near else ""
        problems["model.preset"] = f"{name!r} ({origin}): unknown preset: known are {', '.join(PRESETS)}{hint}"
        name = "tiny"  # stands in, so that the other problems of the file can be found too
    for key in PRESETS[name]:
        if key not in model:
            tree.origins[f"model.{key}"] = f"preset {name}"
    tree.values["model"] = from_preset({**model, "preset": name})
    return problems
