"""What is minimised: an objective is two functions, weight(batch) and loss(model, frozen, batch, divisor)."""

from typing import Literal

from pydantic import Field

from mixtral_jax.config import FrozenConfig


class RouterConfig(FrozenConfig):
    """The router's own losses; a coefficient of 0 switches one off."""

    balance_loss: Literal["per_layer", "hf_pooled"] = Field(
        "per_layer",
        description="per_layer: Switch's definition summed over layers; hf_pooled: that of transformers",
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="coefficient of the balance loss")
    router_z_loss_coef: float = Field(0.001, ge=0, description="coefficient of the router z-loss")
