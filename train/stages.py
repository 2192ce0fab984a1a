"""The stages: what each adds to RunConfig, and what it takes where the file says nothing."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mixtral_jax.config import MixtralConfig
from mixtral_jax.lora import LoraConfig
from train.objectives import RouterConfig
from train.preference_config import DpoConfig, Reference
from train.run_config import RunConfig


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
        0.02, ge=0, description="not set: model.router_aux_loss_coef, the checkpoint's own, or 0 with a frozen router"
    )
    router_z_loss_coef: float = Field(0.0, ge=0, description="coefficient of the router z-loss")
    update: Literal["train", "frozen"] | float = Field(
        "train", description="train, frozen (not set: so under lora), or a factor on the router's learning rate"
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

    router: TunedRouterConfig = TunedRouterConfig()
    lora: LoraConfig | None = Field(None, description="train adapters of this size only; null: train all weights")
    neftune_noise_alpha: float = Field(0.0, ge=0, description="NEFTune's noise on the embeddings; 0: none")
    allow_any_mask: bool = Field(False, description="train although every token of a source is learned")

    @model_validator(mode="after")
    def _base_stays_small(self) -> Self:
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

    @property
    def noisy(self) -> bool:
        return self.neftune_noise_alpha > 0 or (self.lora is not None and self.lora.dropout > 0)


def settle(values: Any, examples: str) -> Any:
    """Fill in what depends on other fields: the kind of examples, and the router's part in training."""
    if not isinstance(values, Mapping):
        return values
    values = dict(values)
    data, router, model = values.get("data"), values.get("router", {}), values.get("model")
    if isinstance(data, Mapping):
        values["data"] = {"examples": examples, **data}
    if isinstance(router, Mapping):
        router = {key: value for key, value in router.items() if value is not None}
        router.setdefault("update", "frozen" if values.get("lora") else "train")
        own = MixtralConfig.model_fields["router_aux_loss_coef"].default
        if isinstance(model, Mapping):
            own = model.get("router_aux_loss_coef", own)
        router.setdefault("router_aux_loss_coef", 0.0 if router["update"] == "frozen" else own)
        values["router"] = router
    return values


class SftConfig(TuningConfig):
    """Supervised fine-tuning on chats or prompt-completion pairs."""

    stage: Literal["sft"]

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        return settle(values, "chat")

    @model_validator(mode="after")
    def _reads_chats(self) -> Self:
        if self.data.examples != "chat":
            raise ValueError(f"data.examples is {self.data.examples}: stage sft reads chat")
        return self


class DpoStageConfig(TuningConfig):
    """Direct preference optimisation and its relatives, on pairs of answers."""

    stage: Literal["dpo"]
    dpo: DpoConfig = DpoConfig()

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        return settle(values, "preference")

    @model_validator(mode="after")
    def _pairs_and_reference(self) -> Self:
        if self.data.examples != "preference":
            raise ValueError(f"data.examples is {self.data.examples}: stage dpo reads preference")
        if self.reference == "lora_base" and self.router_factor:
            raise ValueError(
                "dpo.reference is lora_base, but router.update trains the router of that base: "
                "set router.update: frozen, or reference: frozen"
            )
        self.dpo.check_accumulation(self.accumulation)
        return self

    @property
    def reference(self) -> Reference:
        """The kind of reference, resolved."""
        kind = self.dpo.resolve_reference(lora=self.lora is not None)
        return "frozen" if kind == "lora_base" and self.dpo.reference == "auto" and self.router_factor else kind
