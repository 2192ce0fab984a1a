"""The run configuration: one typed tree per stage, checked across fields before any device is touched."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from data.config import DataConfig
from mixtral_jax.config import PRESETS, ComputeConfig, FrozenConfig, MixtralConfig
from mixtral_jax.sharding import MeshConfig
from train.checkpoint import CheckpointConfig
from train.errors import UserError
from train.hooks import EvalConfig, LogConfig, SampleConfig
from train.objectives import RouterConfig
from train.optimizer import OptimizerConfig
from train.parse import Tree, closest, read_tree, to_yaml
from train.validate import origins, validate


def _from_preset(value: Any) -> Any:
    """`{preset: name, ...}` -> every field of that preset, then the other keys."""
    if not isinstance(value, dict) or "preset" not in value:
        return value
    overrides = {key: item for key, item in value.items() if key != "preset"}
    if value["preset"] is None:
        return overrides
    if value["preset"] not in PRESETS:
        raise ValueError(f"preset {value['preset']!r} is unknown: known are {', '.join(PRESETS)}")
    return {**PRESETS[value["preset"]], **overrides}


class RunConfig(FrozenConfig):
    """What every stage has."""

    stage: str
    run_name: str = Field(pattern=r"^[\w.+=@-]+$", description="the run's directory below output_dir")
    output_dir: str = Field("runs", description="where run directories are made")
    seed: int = Field(0, ge=0, description="of the initial weights and of the order of the data")
    steps: int = Field(
        0, ge=0, description="optimizer steps of the whole run, those before a resume included; 0: by data.epochs"
    )
    seq_len: int = Field(gt=0, description="positions per row")
    global_batch_size: int = Field(gt=0, description="sequences per optimizer step, over the whole mesh")
    micro_batch_size: int | None = Field(
        None, gt=0, description="sequences per micro-batch over the whole mesh; null: global_batch_size"
    )
    resume: Literal["auto", "never", "must"] | int = Field(
        "auto", description="from the newest whole checkpoint if there is one, never, it must exist, or a step"
    )
    init_from: str | None = Field(
        None, description="an Orbax or Hugging Face directory whose weights, and nothing else, start the run"
    )
    model: Annotated[MixtralConfig, BeforeValidator(_from_preset)] = Field(
        description="a preset with changes, or every field"
    )
    data: DataConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    router: RouterConfig = RouterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

    @property
    def rows_per_micro_batch(self) -> int:
        """micro_batch_size, resolved."""
        return self.micro_batch_size or self.global_batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.global_batch_size // self.rows_per_micro_batch

    @property
    def tokens_per_step(self) -> int:
        """Positions per optimizer step, padding included."""
        return self.global_batch_size * self.seq_len

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.output_dir) / self.run_name

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = [*_batch_problems(self), *_schedule_problems(self), *_mesh_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class PretrainConfig(RunConfig):
    """Next-token prediction over documents."""

    stage: Literal["pretrain"]


# The stage that a file names -> its class. Also the order in which `--help` lists them.
STAGES: Mapping[str, type[RunConfig]] = {"pretrain": PretrainConfig}

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
    tree.values["model"] = _from_preset({**model, "preset": name})
    return problems


def _batch_problems(config: RunConfig) -> Iterator[str]:
    rows, micro = config.global_batch_size, config.rows_per_micro_batch
    if rows % micro:
        yield (
            f"global_batch_size ({rows}) is not a multiple of micro_batch_size ({micro}): "
            f"{micro * max(1, round(rows / micro))} would be"
        )
    mesh = config.mesh
    axes = (mesh.data, mesh.fsdp, mesh.expert, mesh.dcn_data, mesh.dcn_fsdp)
    product = math.prod(size for size in axes if size > 0)  # -1 is not known before the devices are
    if micro % product:
        yield (
            f"micro_batch_size ({micro}) is not a multiple of the {product} batch shards of "
            f"mesh.data x mesh.fsdp x mesh.expert: {product * max(1, round(micro / product))} would be"
        )
    if config.seq_len > config.model.max_position_embeddings:
        yield (
            f"seq_len ({config.seq_len}) is larger than model.max_position_embeddings "
            f"({config.model.max_position_embeddings})"
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    optimizer, epochs = config.optimizer, config.data.epochs
    if config.steps and epochs:
        yield f"steps ({config.steps}) and data.epochs ({epochs:g}) both say how long the run is: remove one"
    if not config.steps:
        if not epochs:
            yield "neither steps nor data.epochs says how long the run is: set one"
        return  # the rest is checked once the steps are known
    if optimizer.warmup_steps >= config.steps:
        yield f"optimizer.warmup_steps ({optimizer.warmup_steps}) is not smaller than steps ({config.steps})"
    elif optimizer.decay_steps and optimizer.warmup_steps + optimizer.decay_steps > config.steps:
        yield (
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) and optimizer.decay_steps ({optimizer.decay_steps}) "
            f"are together longer than steps ({config.steps})"
        )
    if isinstance(config.resume, int) and not 0 <= config.resume <= config.steps:
        yield f"resume ({config.resume}) is no step between 0 and steps ({config.steps})"


def _mesh_problems(config: RunConfig) -> Iterator[str]:
    """What each axis must divide; the sharding itself checks the rest, leaf by leaf."""
    model, mesh = config.model, config.mesh
    rules = [
        ("expert", mesh.expert, "model.num_local_experts", model.num_local_experts),
        ("tensor", mesh.tensor, "model.num_attention_heads", model.num_attention_heads),
        ("tensor", mesh.tensor, "model.num_key_value_heads", model.num_key_value_heads),
        ("tensor", mesh.tensor, "model.intermediate_size", model.intermediate_size),
        ("tensor", mesh.tensor, "model.vocab_size", model.vocab_size),
        ("context", mesh.context, "seq_len", config.seq_len),
    ]
    for axis, size, key, value in rules:
        if size > 1 and value % size:
            divisors = [str(d) for d in range(1, value + 1) if value % d == 0 and d <= 2 * size]
            yield f"mesh.{axis} ({size}) does not divide {key} ({value}): {', '.join(divisors)} would"
