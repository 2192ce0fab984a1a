"""adapter_config.json: what PEFT says an adapter is, and which of its variants are ours."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from mixtral_jax.convert.files import Directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Each changes what is computed, or what is stored, when it is set.
_REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
)  # fmt: skip
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """The part of adapter_config.json that fixes the numbers."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    base: str | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of a module; a pattern matches the end of its name, as in PEFT."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What (x A) B of a module is multiplied with."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_settings(directory: Directory) -> Settings:
    """The settings of a PEFT directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: no LoRA, a variant of it that is not supported, or values that make no sense.
    """
    names = directory.names()
    if not names and not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist")
    for name in (CONFIG, WEIGHTS):
        if name not in names:
            raise ValueError(f"{directory} has no {name}: it is no PEFT adapter in safetensors")
    where = f"{directory}/{CONFIG}"
    try:
        config: dict[str, Any] = dict(json.loads(directory.read_bytes(CONFIG)))
    except (ValueError, TypeError):
        raise ValueError(f"{where} is no JSON object") from None
    _refuse(config, where)
    try:
        settings = Settings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            base=config.get("base_model_name_or_path"),
            rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )
    except KeyError as error:
        raise ValueError(f"{where} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: r, lora_alpha or their patterns are no numbers ({error})") from None
    if settings.rank < 1 or settings.alpha <= 0 or not 0 <= settings.dropout < 1:
        raise ValueError(
            f"{where}: r {settings.rank}, lora_alpha {settings.alpha:g} and lora_dropout {settings.dropout:g} "
            "must be positive, positive, and in 0 ... 1"
        )
    return settings


def _refuse(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}, only LORA is converted")
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(f"{where}: {key} is {config[key]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}: the model has no biases, only 'none' is converted")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_ALTERS_BASE):
        raise ValueError(f"{where}: init_lora_weights {start!r} changes the base too: convert it to plain LoRA in PEFT")


def _matching(patterns: dict[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
