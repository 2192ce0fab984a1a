"""What a user says of preference learning, checked across fields before any device is touched."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from mixtral_jax.config import FrozenConfig
from mixtral_jax.train.errors import did_you_mean

LossType = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo",
]  # fmt: skip
FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha", "js_divergence", "alpha_divergence"]
Reference = Literal["frozen", "lora_base", "precomputed", "none"]
ALPHA_IS_ONE = 1e-6  # nearer to 1 than this, the alpha divergence is reverse KL

_F_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo")
_WITHOUT_REFERENCE = ("simpo", "orpo", "sft")


class DpoConfig(FrozenConfig):
    """The preference loss and its reference. Names and defaults are TRL's, as far as it has them."""

    loss_type: tuple[LossType, ...] = Field(("sigmoid",), min_length=1, description="one type, or a list of them")
    loss_weights: tuple[float, ...] | None = Field(None, description="one for each loss type; null: 1 for each")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference; orpo: weight of its odds ratio")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="probability ε of a flipped label; read by sigmoid, robust, exo_pair, aot, simpo"
    )
    f_divergence: FDivergence = Field("reverse_kl", description="distance to the reference; TRL's longer names too")
    f_alpha: float = Field(0.5, description="α of the alpha divergence")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of the tokens beyond the length that both answers share; null: 1"
    )
    gamma: float = Field(0.5, description="target margin of simpo")
    discopop_tau: float = Field(0.05, gt=0, description="temperature of discopop")
    reference: Literal["auto", Reference] = Field(
        "auto", description="auto: none where no loss reads it, else lora_base under LoRA, else frozen"
    )
    aot_per_micro_batch: bool = Field(False, description="let aot sort each micro-batch by itself")

    @field_validator("loss_type", mode="before", json_schema_input_type=LossType | tuple[LossType, ...])
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_options(self)
        self._refuse_what_nothing_reads()
        needs_none = set(self.loss_type) <= set(_WITHOUT_REFERENCE)
        if needs_none and self.reference not in ("auto", "none"):
            raise ValueError(
                f"reference is {self.reference}, but loss_type {_names(self.loss_type)} reads none: set reference: none"
            )
        if self.reference == "none" and self.f_divergence != "reverse_kl":
            raise ValueError(f"f_divergence {self.f_divergence} measures the distance to a reference, which is none")
        return self

    def _refuse_what_nothing_reads(self) -> None:
        readers = {
            "label_smoothing": bool(set(self.loss_type) & set(_SMOOTHED)),
            "gamma": "simpo" in self.loss_type,
            "discopop_tau": "discopop" in self.loss_type,
            "f_alpha": self.f_divergence.startswith("alpha"),
            "aot_per_micro_batch": any(kind.startswith("aot") for kind in self.loss_type),
        }
        for name, is_read in readers.items():
            value = getattr(self, name)
            if not is_read and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value}, but nothing reads it with loss_type {_names(self.loss_type)} "
                    f"and f_divergence {self.f_divergence}"
                )

    @property
    def averaged(self) -> bool:
        """Every pair loss is of log-probabilities per token, without a reference."""
        kinds = set(self.loss_type) - {"sft"}
        return bool(kinds) and kinds <= {"simpo", "orpo"}

    def resolve_reference(self, *, lora: bool) -> Reference:
        """The kind of reference of a run with or without adapters.

        Raises:
            ValueError: `lora_base` without LoRA.
        """
        if self.reference == "lora_base" and not lora:
            raise ValueError("dpo.reference is lora_base, but the run has no LoRA: use frozen or precomputed")
        if self.reference != "auto":
            return self.reference
        if set(self.loss_type) <= set(_WITHOUT_REFERENCE):
            return "none"
        return "lora_base" if lora else "frozen"

    def check_accumulation(self, micro_batches: int) -> None:
        """aot compares sorted batches, so a step in parts is another loss.

        Raises:
            ValueError: aot or aot_unpaired with more than one micro-batch, unless asked for.
        """
        kinds = [kind for kind in self.loss_type if kind.startswith("aot")]
        if kinds and micro_batches > 1 and not self.aot_per_micro_batch:
            raise ValueError(
                f"loss_type {kinds[0]} sorts the whole batch, but a step has {micro_batches} micro-batches: "
                "raise micro_batch_size, or set aot_per_micro_batch: true to sort each by itself"
            )


def check_options(config: DpoConfig) -> None:
    """The rules of the losses themselves, for configurations and for direct calls alike.

    Raises:
        ValueError: one sentence.
    """
    known = get_args(LossType)
    for kind in config.loss_type:
        if kind not in known:
            hint = did_you_mean(kind, known).removeprefix("; ") or f"known are {_names(known)}"
            raise ValueError(f"loss_type {kind!r} is unknown: {hint}")
    if config.loss_weights is not None and len(config.loss_weights) != len(config.loss_type):
        raise ValueError(
            f"loss_weights has {len(config.loss_weights)} numbers for {len(config.loss_type)} loss types: "
            "give one for each"
        )
    if config.beta <= 0:
        raise ValueError(f"beta must be above 0, got {config.beta}")
    epsilon = config.label_smoothing
    if "exo_pair" in config.loss_type and not 0 < epsilon < 1:
        raise ValueError(f"loss_type exo_pair needs label_smoothing above 0 (its paper takes 1e-3), got {epsilon}")
    if "robust" in config.loss_type and not 0 <= epsilon < 0.5:
        raise ValueError(f"loss_type robust needs label_smoothing from 0 to below 0.5, got {epsilon}")
    if config.f_divergence not in get_args(FDivergence):
        raise ValueError(f"f_divergence {config.f_divergence!r} is unknown: known are {_names(get_args(FDivergence))}")
    other = [kind for kind in config.loss_type if kind not in _F_DIVERGENCE]
    if config.f_divergence != "reverse_kl" and other:
        raise ValueError(
            f"f_divergence {config.f_divergence} is defined for {_names(_F_DIVERGENCE)} only, not for {other[0]}"
        )


def _names(kinds: tuple[str, ...]) -> str:
    return ", ".join(kinds)
