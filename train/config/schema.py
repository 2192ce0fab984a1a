"""What a run file may say, stage by stage, checked across fields before any device is touched."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mixtral_jax.config import ComputeConfig, FrozenConfig, MixtralConfig
from mixtral_jax.data.config import DataConfig, check_place_name
from mixtral_jax.data.records import is_remote
from mixtral_jax.lora import ROUTER, LoraConfig
from mixtral_jax.parallel import MeshConfig
from mixtral_jax.train.checkpoints import CheckpointConfig, EarlyStoppingConfig, watching_problems
from mixtral_jax.train.hooks import EvalConfig, LogConfig, SampleConfig
from mixtral_jax.train.objective import RouterConfig
from mixtral_jax.train.optimizer import OptimizerConfig
from mixtral_jax.train.preference import DpoConfig, Reference


class RunConfig(FrozenConfig):
    """What every stage has."""

    stage: str
    run_name: str = Field(pattern=r"^[\w.+=@-]+$", description="the run's directory below output_dir")
    output_dir: str = Field("runs", description="where run directories are made")
    seed: int = Field(0, description="any integer: of the initial weights and of the order of the data")
    steps: int = Field(
        0, ge=0, description="optimizer steps of the whole run, those before a resume included; 0, null: by data.epochs"
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
    resume_from: str | None = Field(
        None, description="RUN or RUN@STEP: another run whose whole state and place in the data begin this one"
    )
    on_nonfinite: Literal["stop", "rollback"] = Field(
        "stop",
        description="at a loss or gradient that is not finite: end with exit 3, or go back to the last whole "
        "checkpoint and past the rows since",
    )
    max_rollbacks: int = Field(3, gt=0, description="how often in a run on_nonfinite: rollback may go back")
    stop_after_minutes: float | None = Field(
        None, gt=0, description="save and exit 75 before a start has lasted so long, as ahead of the end of a SLURM job"
    )
    model: MixtralConfig = Field(description="a preset with changes, or every field; null: that of init_from")
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
    def goes_on(self) -> bool:
        """Whether the same command goes on from where a run was stopped."""
        return self.resume in ("auto", "must")

    @property
    def trains_of_base(self) -> bool:
        """Whether under adapters some of the base is trained whole, so that it is no reference."""
        return self.adapters is not None and (self.router_factor > 0 or bool(self.adapters.whole))

    @property
    def neftune(self) -> float:
        """Alpha of the noise on the embeddings."""
        return 0.0

    @property
    def noisy(self) -> bool:
        """Whether a training step draws random numbers."""
        return self.neftune > 0 or (self.adapters is not None and self.adapters.dropout > 0)

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.output_dir) / self.run_name

    @field_validator("run_name")
    @classmethod
    def _names_a_directory(cls, name: str) -> str:
        if len(name) > 100:
            raise ValueError(f"is longer than 100 characters ({len(name)})")
        if len(name.encode()) > 200:  # file systems take 255, and names are made of it
            raise ValueError(f"is longer than 200 bytes ({len(name.encode())})")
        if name.startswith("."):
            raise ValueError("must not start with a dot")
        return name

    @field_validator("output_dir")
    @classmethod
    def _is_of_a_file_system(cls, place: str) -> str:
        if is_remote(place):
            raise ValueError(
                "must be a directory of a file system: logs stay local (checkpoint.directory may be a bucket)"
            )
        return check_place_name(place)

    @field_validator("steps", mode="before", json_schema_input_type=Annotated[int, Field(ge=0)] | None)
    @classmethod
    def _null_is_zero(cls, steps: Any) -> Any:
        return 0 if steps is None else steps

    @classmethod
    def settle(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a file with what depends on others filled in: the kind of examples, the router's part."""
        return dict(values)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = [*_batch_problems(self, training=False), *_schedule_problems(self), *_mesh_problems(self)]
        if self.init_from is not None and self.resume_from is not None:
            problems.append(
                f"init_from ({self.init_from}) and resume_from ({self.resume_from}) both say what the run begins with: "
                "remove init_from, as the whole state of a run brings the base that it stands on"
            )
        if self.early_stopping is not None:
            sources = [source.name for source in self.data.validation]
            problems += watching_problems(self.early_stopping, self.data.examples, sources, self.eval.every)
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
    if config.log.profile is not None and config.log.profile.start > config.steps:
        yield (
            f"log.profile.start ({config.log.profile.start}) is past the last step ({config.steps}): no step would be "
            "traced"
        )
    if optimizer.warmup_steps >= config.steps:
        yield f"optimizer.warmup_steps ({optimizer.warmup_steps}) is not smaller than steps ({config.steps})"
    elif optimizer.decay_steps and optimizer.warmup_steps + optimizer.decay_steps > config.steps:
        yield (
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) and optimizer.decay_steps ({optimizer.decay_steps}) "
            f"are together longer than steps ({config.steps})"
        )
    yield from config.data.phases_in(config.steps, optimizer.warmup_steps, optimizer.decay_steps)
    if isinstance(config.resume, int) and not 0 <= config.resume <= config.steps:
        yield f"resume ({config.resume}) is no step between 0 and steps ({config.steps})"


def _mesh_problems(config: RunConfig) -> Iterator[str]:
    """What each axis must divide; the sharding itself checks the rest, leaf by leaf."""
    model, mesh = config.model, config.mesh
    rules = [
        ("mesh.expert", mesh.expert, "num_local_experts"),
        ("mesh.fsdp x mesh.expert", _known(mesh.fsdp, mesh.dcn_fsdp, mesh.expert), "hidden_size"),
        ("mesh.tensor", mesh.tensor, "num_attention_heads"),
        ("mesh.tensor", mesh.tensor, "num_key_value_heads"),
        ("mesh.tensor", mesh.tensor, "intermediate_size"),
    ]
    for axes, size, key in rules:
        value = getattr(model, key)
        if size > 1 and value % size:
            divisors = [str(d) for d in range(1, min(value, 2 * size) + 1) if value % d == 0]
            yield f"{axes} ({size}) does not divide model.{key} ({value}): {', '.join(divisors)} would"
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


class PretrainConfig(RunConfig):
    """Next-token prediction over documents."""

    stage: Literal["pretrain"]

    @model_validator(mode="after")
    def _reads_documents(self) -> Self:
        if self.data.examples == "preference":
            raise ValueError("data.examples is preference: that is for stage dpo")
        return self


class TunedRouterConfig(RouterConfig):
    """The router of a model that is already trained."""

    balance_loss: Literal["per_layer", "hf_pooled"] = Field(
        "hf_pooled", description="the released checkpoints' own definition, or per_layer, that of pretraining here"
    )
    router_aux_loss_coef: float = Field(
        0.02,
        ge=0,
        description="not set: model.router_aux_loss_coef, the checkpoint's own, or 0 with a frozen router "
        "without an adapter",
    )
    router_z_loss_coef: float = Field(0.0, ge=0, description="coefficient of the router z-loss")
    update: Literal["train", "frozen"] | float = Field(
        "train",
        description="train, frozen (not set: so under lora), or a factor on the router's learning rate; its "
        "adapter, where lora.targets name gate, learns as the others do",
    )

    @model_validator(mode="after")
    def _factor_is_positive(self) -> Self:
        if isinstance(self.update, float | int) and self.update <= 0:
            raise ValueError(f"update is {self.update}: a factor must be above 0; to keep the router, say frozen")
        return self

    @property
    def factor(self) -> float:
        """On the learning rate of the router; 0: it stays as it is."""
        return {"train": 1.0, "frozen": 0.0}[self.update] if isinstance(self.update, str) else float(self.update)


class TuningConfig(RunConfig):
    """What SFT and DPO share: a model that is already trained goes on learning, whole or through adapters."""

    EXAMPLES: ClassVar[str]  # the kind that the stage reads

    router: TunedRouterConfig = TunedRouterConfig()
    lora: LoraConfig | None = Field(None, description="train adapters of this size only; null: train all weights")
    neftune_noise_alpha: float = Field(0.0, ge=0, description="NEFTune's noise on the embeddings; 0: none")
    allow_any_mask: bool = Field(False, description="train although every token of a source is learned")

    @classmethod
    def settle(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        data, router, model = values.get("data"), values.get("router", {}), values.get("model")
        settled = dict(values)
        if isinstance(data, Mapping):
            settled["data"] = {"examples": cls.EXAMPLES, **data}
        if isinstance(router, Mapping):
            router = {key: value for key, value in router.items() if value is not None}
            router.setdefault("update", "train" if values.get("lora") is None else "frozen")
            own = MixtralConfig.model_fields["router_aux_loss_coef"].default
            if isinstance(model, Mapping):
                own = model.get("router_aux_loss_coef", own)
            still = router["update"] == "frozen" and not _adapts_router(values.get("lora"))
            router.setdefault("router_aux_loss_coef", 0.0 if still else own)
            settled["router"] = router
        return settled

    @model_validator(mode="after")
    def _fits_the_stage(self) -> Self:
        if self.data.examples != self.EXAMPLES:
            raise ValueError(f"data.examples is {self.data.examples}: stage {self.stage} reads {self.EXAMPLES}")
        if self.lora is not None and "lm_head" in self.lora.modules_to_save and self.model.tie_word_embeddings:
            raise ValueError("lora.modules_to_save names lm_head, but model.tie_word_embeddings: name embed_tokens")
        if self.lora is not None and self.lora.quantizes and self.compute.remat == "none":
            raise ValueError(
                f"lora.base_dtype is {self.lora.base_dtype}, but compute.remat is none, which would keep every layer "
                "dequantised for the backward pass: set compute.remat to minimal or full"
            )
        return self

    @property
    def router_factor(self) -> float:
        return self.router.factor

    @property
    def adapters(self) -> LoraConfig | None:
        return self.lora

    @property
    def neftune(self) -> float:
        return self.neftune_noise_alpha


def _adapts_router(lora: Any) -> bool:
    try:
        return LoraConfig(targets=lora["targets"]).adapts(ROUTER)
    except (TypeError, KeyError, ValueError):  # none, those of default, or what is said where all is checked
        return False


class SftConfig(TuningConfig):
    """Supervised fine-tuning on chats or prompt-completion pairs."""

    EXAMPLES = "chat"

    stage: Literal["sft"]


class DpoStageConfig(TuningConfig):
    """Direct preference optimisation and its relatives, on pairs of answers."""

    EXAMPLES = "preference"

    stage: Literal["dpo"]
    dpo: DpoConfig = DpoConfig()

    @model_validator(mode="after")
    def _fits_the_reference(self) -> Self:
        if self.reference == "lora_base" and self.router_factor:
            raise ValueError(
                "dpo.reference is lora_base, but router.update trains the router of that base: "
                "set router.update: frozen, or reference: frozen"
            )
        if self.reference == "lora_base" and self.trains_of_base:
            raise ValueError("dpo.reference is lora_base, but lora.modules_to_save trains of it: set reference: frozen")
        self.dpo.check_accumulation(self.accumulation)
        return self

    @property
    def reference(self) -> Reference:
        """The kind of reference, resolved."""
        kind = self.dpo.resolve_reference(lora=self.lora is not None)
        return "frozen" if kind == "lora_base" and self.dpo.reference == "auto" and self.trains_of_base else kind
