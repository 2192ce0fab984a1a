"""AdamW: schedules, decay mask, clipping."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mixtral_jax.config import FrozenConfig


class OptimizerConfig(FrozenConfig):
    """How parameters move. Weight decay is decoupled: scaled by the learning rate, never part of the gradient."""

    name: Literal["adamw"] = Field("adamw", description="the optimizer")
    learning_rate: float = Field(3e-4, gt=0, description="the highest learning rate, reached after warm-up")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="after warm-up: cosine or linear decay, warmup-stable-decay, or constant"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise from 0")
    decay_steps: int | None = Field(
        None, gt=0, description="wsd: length of the final decay; null: a tenth of all steps"
    )
    final_learning_rate_fraction: float = Field(
        0.1, ge=0, le=1, description="learning rate at the last step, as a fraction of learning_rate"
    )
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the square root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of all matrices; norms have none")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the global norm; null: never")
    skip_spikes: float | None = Field(
        None, gt=1, description="skip an update whose gradient norm is above this many times its running mean"
    )

    @model_validator(mode="after")
    def _decay_steps_belongs_to_wsd(self) -> Self:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps ({self.decay_steps}) belongs to schedule wsd, not to {self.schedule}")
        return self
