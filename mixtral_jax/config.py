"""What a Mixtral is: its shape, its released presets, its size and its cost.

Letters used everywhere in this package: B batch, T query positions, S key positions, D hidden size, N query heads,
K key/value heads, G = N / K, H head size, E experts, C chosen experts per token (top-k), M = B * T tokens,
R = M * C routed rows, F expert feed-forward size, V vocabulary, L layers.
"""

import math
import warnings
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Fields that may differ between two models that compute the same with the same weights.
_FREE = ("vocab_size", "max_position_embeddings", "router_aux_loss_coef", "initializer_range")


class FrozenConfig(BaseModel):
    """Base of every configuration class: immutable, hashable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class MatmulParams(NamedTuple):
    """Sizes of matrices: of one layer its attention, its router and one of its experts; of the model the head."""

    attention: int
    router: int
    expert: int
    head: int


class MixtralConfig(FrozenConfig):
    """The shape of a Mixtral; with one expert it is a dense Mistral. Field names are those of Hugging Face."""

    vocab_size: int = Field(gt=0, description="rows of embedding and head")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward size of one expert")
    num_hidden_layers: int = Field(gt=0, description="blocks of attention and experts")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_key_value_heads: int = Field(gt=0, description="key and value heads, each shared by a group of query heads")
    head_dim: int = Field(0, ge=0, description="0: hidden_size / num_attention_heads")
    num_local_experts: int = Field(8, gt=0, description="experts per layer; 1: a dense Mistral")
    num_experts_per_tok: int = Field(2, gt=0, description="experts that each token is sent to")
    max_position_embeddings: int = Field(32768, gt=0, description="longest sequence")
    rope_theta: float = Field(1e6, gt=0, description="base of the rotary frequencies")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square of a norm")
    sliding_window: int | None = Field(None, gt=0, description="a query at p sees keys p - w + 1 ... p")
    tie_word_embeddings: bool = Field(False, description="the head is the embedding")
    initializer_range: float = Field(0.02, ge=0, description="standard deviation of the initial matrices")
    router_aux_loss_coef: float = Field(0.02, ge=0, description="of the released checkpoint, for hf_pooled")

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, values: Any) -> Any:
        head = values.get("head_dim") if isinstance(values, dict) else None
        if isinstance(values, dict) and (head is None or (head == 0 and head is not False)):
            hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}): set head_dim"
                    )
                return {**values, "head_dim": hidden // heads}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is larger than "
                f"num_local_experts ({self.num_local_experts})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) is odd: rotary embedding rotates pairs")
        return self

    @property
    def is_dense(self) -> bool:
        """One expert: no router, no balance loss."""
        return self.num_local_experts == 1

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A released shape by name; `overrides` replace single fields.

        Raises:
            ValueError: unknown name (the known ones are listed) or inconsistent overrides.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}: known are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_hf(cls, config: dict[str, Any], architectures: tuple[str, ...] = ("mixtral", "mistral")) -> Self:
        """From the content of a Hugging Face config.json, as transformers 4 or 5 write it.

        Raises:
            ValueError: another architecture, or a variant that this package does not compute (named in the message).
        """
        _check_kinds(config)
        kind, rope = _architecture(config, architectures), _rope(config)
        _refuse_variants(config, rope)
        values: dict[str, Any] = {
            **_HF_DEFAULTS[kind],
            **{k: config[k] for k in cls.model_fields if k in config},
        }
        values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
        if kind == "mixtral" and "num_experts" in config:
            values["num_local_experts"] = config["num_experts"]
        if values.get("head_dim") is None:
            values["head_dim"] = 0
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values.get("num_attention_heads")
        if kind != "mixtral":
            values |= {"num_local_experts": 1, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0}
        if kind == "llama":
            values["sliding_window"] = None
        missing = [f for f in _HF_REQUIRED if values.get(f) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if kind == "mixtral" and values.get("sliding_window") is not None:
            warnings.warn(
                f"config.json sets sliding_window {values['sliding_window']} for a Mixtral; "
                "the released Mixtral models have none (null)",
                stacklevel=2,
            )
        return cls.model_validate(values, strict=True)

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The content of config.json, in words that transformers 4 and 5 both read."""
        kind = "mistral" if self.is_dense else "mixtral"
        values = self.model_dump()
        if self.is_dense:
            for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"):
                del values[key]
        else:
            values |= {"output_router_logits": False, "router_jitter_noise": 0.0}
        return {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            **values,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """Field -> (ours, theirs), of those that change what the same weights compute."""
        pairs = {key: (value, getattr(other, key)) for key, value in self if key not in _FREE}
        # 1e-6: one of two files may hold a number as fp32, as GGUF does
        return {
            key: (a, b)
            for key, (a, b) in pairs.items()
            if not (math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b)
        }

    def num_params(self) -> int:
        """Number of parameters in all."""
        return self._params(self.num_local_experts)

    def num_active_params(self) -> int:
        """Parameters that one token uses: all but the experts that were not chosen."""
        return self._params(self.num_experts_per_tok)

    def _params(self, experts: int) -> int:
        d, own = self.hidden_size, self.matmul_params
        layer = own.attention + own.router + experts * own.expert + 2 * d
        return self.num_hidden_layers * layer + own.head * (1 if self.tie_word_embeddings else 2) + d

    @property
    def matmul_params(self) -> MatmulParams:
        """Parameters that are multiplied with activations; norms and the look-up of the embedding are not."""
        d, heads = self.hidden_size, self.num_attention_heads + self.num_key_value_heads
        router = 0 if self.is_dense else d * self.num_local_experts
        return MatmulParams(2 * d * self.head_dim * heads, router, 3 * d * self.intermediate_size, self.vocab_size * d)

    @property
    def matmul_flops(self) -> int:
        """Forward FLOPs of one token: 2 for each matmul parameter that it uses."""
        own = self.matmul_params
        layer = own.attention + own.router + self.num_experts_per_tok * own.expert
        return 2 * (self.num_hidden_layers * layer + own.head)

    def attention_flops(self, keys: float) -> float:
        """Forward FLOPs of one token that attends to `keys` keys in all layers: scores and weighted sum, 2 each."""
        return 4 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * keys

    def flops_per_token(self, seq_len: int, attention: Literal["causal", "full"] = "causal") -> float:
        """Useful FLOPs of forward + backward, three times the forward, for one token.

        The input embedding is a look-up and counts 0. `full` counts every query-key pair (the convention of most
        published MFU figures), `causal` those that the mask lets through, the sliding window included.
        """
        window = min(self.sliding_window or seq_len, seq_len)
        keys = seq_len if attention == "full" else window - window * (window - 1) / (2 * seq_len)
        return 3 * (self.matmul_flops + self.attention_flops(keys))


class MoeConfig(FrozenConfig):
    """How the expert block is carried out. Only `capacity_factor` and its order change what is computed (they
    drop tokens), and `router_dtype`, a little.
    """

    matmul: Literal["auto", "megablox", "tokamax", "ragged_dot", "blocked", "dense"] = Field(
        "auto", description="grouped matmul back-end"
    )
    transport: Literal["auto", "ring", "alltoall"] = Field(
        "auto", description="how tokens reach experts on other devices of the expert axis"
    )
    buffer_factor: float | None = Field(
        None,
        gt=0,
        description="null: the experts' buffer of rows holds the worst case; else factor * tokens * k rows, factor "
        "times an even load, and what does not fit takes further rounds: nothing is dropped",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="null: dropless; else an expert takes at most ceil(factor * tokens * k / E) rows in training",
    )
    capacity_order: Literal["probability", "choice", "token"] = Field(
        "probability",
        description="which rows an expert takes first: those of the largest gates (as Megatron), all first choices "
        "(as GShard), or those of the first tokens",
    )
    router_dtype: Literal["float32", "compute"] = Field("float32", description="precision of the router logits")
    chunk_tokens: int | None = Field(
        None,
        gt=0,
        description="tokens per device that the block handles at a time; bounds the dropless buffer",
    )


class ComputeConfig(FrozenConfig):
    """How the maths is carried out: precision, kernels, what is recomputed in the backward pass."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute precision; auto: bfloat16 on accelerators, float32 on CPU"
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="where products are bfloat16: the dtype in which gradients are summed over devices; twice the "
        "traffic in float32",
    )
    remat: Literal["none", "minimal", "attention", "experts_input", "offload", "full"] = Field(
        "minimal",
        description="the backward pass finds saved, beside the routing: all (none), the outputs of matmuls (minimal), "
        "those of attention (attention), these in the host's memory (offload), the rows that reach the experts "
        "(experts_input), nothing (full)",
    )
    attention: Literal["auto", "reference", "chunked", "dot_product", "splash", "cudnn", "triton"] = Field(
        "auto", description="attention back-end"
    )
    xla_flags: Literal["auto"] | tuple[Annotated[str, Field(pattern=r"^--\w+(=\S*)?$")], ...] = Field(
        "auto",
        description="compiler flags: those that overlap communication with compute, by platform (auto), or a list as "
        "it is; [] sets none; the environment's own XLA_FLAGS and LIBTPU_INIT_ARGS stand",
    )
    loss_chunk: int = Field(0, ge=0, description="tokens per chunk of the cross-entropy; 0: chosen from the shape")
    moe: MoeConfig = MoeConfig()


def _architecture(config: dict[str, Any], known: tuple[str, ...]) -> str:
    kind = config.get("model_type") or ""
    named = ", ".join(map(str, config.get("architectures") or [])) or kind or "nothing"
    if kind not in known:
        raise ValueError(f"config.json names architecture {named}: supported are {', '.join(known)}")
    return kind


def _check_kinds(config: dict[str, Any]) -> None:
    """Of the keys that are no fields of ours; the fields are checked as such."""
    for key, (kind, name) in _HF_KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise ValueError(f"config.json says {key} is {config[key]!r}: {name} was expected")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings as transformers 5 reads them: rope_scaling, if it says anything, hides rope_parameters."""
    scaling, parameters = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    read = scaling or parameters
    if any(isinstance(value, dict) for value in read.values()):
        raise ValueError("config.json has rotary settings by the type of layer, which is not supported")
    hidden = [key for key in _ROPE_KEYS if scaling and key in parameters and parameters[key] != read.get(key)]
    if hidden:
        warnings.warn(
            f"config.json has both rope_scaling and rope_parameters: the first is taken, as in transformers, and "
            f"{', '.join(f'{key} {parameters[key]!r}' for key in hidden)} of the second is not",
            stacklevel=3,
        )
    return read


def _refuse_variants(config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Variants that would load and then compute something else are refused by name."""
    named = [rope[key] for key in ("rope_type", "type") if key in rope]
    for rope_type in named:
        if rope_type != "default":
            raise ValueError(f"rope type {rope_type!r} is not supported: only 'default' is")
    if unread := sorted(rope.keys() - _ROPE_KEYS):
        warnings.warn(f"rope type 'default' has no {', '.join(unread)}: ignored, as in transformers", stacklevel=3)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key} is not supported: Mixtral has no biases")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported: only 'silu' is")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"quantised weights ({method}) are not supported: convert the unquantised checkpoint")
    if config.get("router_jitter_noise"):
        warnings.warn(f"router_jitter_noise {config['router_jitter_noise']} is ignored", stacklevel=3)


_ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_HF_KINDS = {
    "model_type": (str, "text"), "architectures": (list, "a list"), "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"), "quantization_config": (dict, "an object"),
}  # fmt: skip
_HF_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What transformers assumes for a key that config.json leaves out.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": dict(
        num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=None, num_local_experts=8,
        num_experts_per_tok=2, router_aux_loss_coef=0.001, max_position_embeddings=131072,
    ),
    "mistral": dict(
        num_key_value_heads=8, rope_theta=1e4, rms_norm_eps=1e-6, sliding_window=4096, max_position_embeddings=131072
    ),
    "llama": dict(num_key_value_heads=None, rope_theta=1e4, rms_norm_eps=1e-6, max_position_embeddings=2048),
}  # fmt: skip

_8X7B: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
    rope_theta=1e6, router_aux_loss_coef=0.02,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=4096, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=4096,
        rope_theta=1e4, router_aux_loss_coef=0.02,
    ),
    "mistral-7b": {
        **_8X7B, "num_local_experts": 1, "num_experts_per_tok": 1, "rope_theta": 1e4, "sliding_window": 4096,
        "router_aux_loss_coef": 0.0,
    },
    "mixtral-8x7b": _8X7B,
    "mixtral-8x22b": {
        **_8X7B, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
        "max_position_embeddings": 65536, "router_aux_loss_coef": 0.001,
    },
}  # fmt: skip
