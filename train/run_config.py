"""What every stage's configuration has, checked across fields before any device is touched."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from data.config import DataConfig
from mixtral_jax.config import PRESETS, ComputeConfig, FrozenConfig, MixtralConfig
from mixtral_jax.lora import LoraConfig
from mixtral_jax.mesh import MeshConfig
from train.best import EarlyStoppingConfig, watching_problems
from train.checkpoint import CheckpointConfig
from train.evaluate import EvalConfig
from train.hooks import LogConfig, SampleConfig
from train.objectives import RouterConfig
from train.optimizer import OptimizerConfig


def from_preset(value: Any) -> Any:
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
    model: Annotated[MixtralConfig, BeforeValidator(from_preset)] = Field(
        description="a preset with changes, or every field"
    )
    data: DataConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    router: RouterConfig = RouterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="keep the best checkpoint, and end a run that no longer gets better; null: neither"
    )
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
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained in place of the weights, if any."""
        return None

    @property
    def router_factor(self) -> float:
        """On the learning rate of the router; 0: it stays as it is."""
        return 1.0

    @property
    def neftune(self) -> float:
        """Alpha of the noise on the embeddings."""
        return 0.0

    @property
    def noisy(self) -> bool:
        """Whether a training step draws random numbers."""
        return False

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.output_dir) / self.run_name

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = [
            *_batch_problems(self, training=False), *_schedule_problems(self), *_mesh_problems(self),
            *_watching_problems(self),
        ]  # fmt: skip
        if problems:
            raise ValueError("\n".join(problems))
        return self


def check_sizes(config: RunConfig, sizes: Mapping[str, int], *, training: bool = True) -> None:
    """The file's own checks of its mesh once more, now that the devices say how large an axis of -1 is.

    Args:
        sizes: of every axis, over fast and slow network together. training: false where rows are evaluated only.

    Raises:
        ValueError: an axis does not divide what it shares out.
    """
    mesh = config.mesh.model_copy(update={**sizes, "dcn_data": 1, "dcn_fsdp": 1})
    resolved = config.model_copy(update={"mesh": mesh})
    problems = [*_batch_problems(resolved, training=training), *_mesh_problems(resolved)]
    if problems:
        raise ValueError("\n".join(problems))


def _batch_problems(config: RunConfig, *, training: bool = True) -> Iterator[str]:
    rows, micro = config.global_batch_size, config.rows_per_micro_batch
    if rows % micro:
        yield (
            f"global_batch_size ({rows}) is not a multiple of micro_batch_size ({micro}): "
            f"{micro * max(1, round(rows / micro))} would be"
        )
    mesh = config.mesh
    shards = _known(mesh.data, mesh.fsdp, mesh.expert, mesh.dcn_data, mesh.dcn_fsdp)
    shared = {"eval.batch_size": config.eval.batch_size or shards}
    if training or config.eval.batch_size is None:
        shared["micro_batch_size"] = micro
    for key, size in shared.items():
        if size % shards:
            yield (
                f"{key} ({size}) is not a multiple of the {shards} batch shards of "
                f"mesh.data x mesh.fsdp x mesh.expert: {shards * max(1, round(size / shards))} would be"
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


def _watching_problems(config: RunConfig) -> Iterator[str]:
    if config.early_stopping is not None:
        sources = [source.name for source in config.data.validation]
        yield from watching_problems(config.early_stopping, config.data.examples, sources, config.eval.every)


def _mesh_problems(config: RunConfig) -> Iterator[str]:
    """What each axis must divide; the sharding itself checks the rest, leaf by leaf."""
    model, mesh = config.model, config.mesh
    rules = [
        ("mesh.expert", mesh.expert, "model.num_local_experts", model.num_local_experts),
        (
            "mesh.fsdp x mesh.expert",
            _known(mesh.fsdp, mesh.dcn_fsdp, mesh.expert),
            "model.hidden_size",
            model.hidden_size,
        ),
        ("mesh.tensor", mesh.tensor, "model.num_attention_heads", model.num_attention_heads),
        ("mesh.tensor", mesh.tensor, "model.num_key_value_heads", model.num_key_value_heads),
        ("mesh.tensor", mesh.tensor, "model.intermediate_size", model.intermediate_size),
    ]
    for axes, size, key, value in rules:
        if size > 1 and value % size:
            divisors = [str(d) for d in range(1, value + 1) if value % d == 0 and d <= 2 * size]
            yield f"{axes} ({size}) does not divide {key} ({value}): {', '.join(divisors)} would"
    pieces, length = 2 * mesh.context, config.seq_len
    if mesh.context > 1 and length % pieces:
        fitting = [str(n) for n in (length // pieces * pieces, -(-length // pieces) * pieces) if n]
        yield (
            f"mesh.context ({mesh.context}) cuts each row in {pieces} pieces, but seq_len ({length}) is not a multiple "
            f"of {pieces}: {' or '.join(fitting)} would be"
        )


def _known(*sizes: int) -> int:
    """Product of the sizes of mesh axes; -1 is not known before the devices are."""
    return math.prod(size for size in sizes if size > 0)
