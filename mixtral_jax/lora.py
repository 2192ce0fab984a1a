"""Low-rank adapters: y = x W + s (x A) B, for projections and for stacked experts. The full s A B is never formed.

LoRA 2106.09685, section 4.1: s = alpha / rank; rsLoRA 2312.03732: s = alpha / sqrt(rank). A starts uniform as in PEFT,
B at 0, so that an adapted model begins as its base. Each of w1, w3 and w2 of an expert has its own A and B.
"""

import fnmatch
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, field_validator, model_validator

from mixtral_jax.config import FrozenConfig
from mixtral_jax.kernels import grouped_matmul
from mixtral_jax.parallel import TOKEN_AXES, gather, shard_key
from mixtral_jax.quantize import QuantizedWeight

TARGETS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "moe.w1",
    "moe.w3",
    "moe.w2",
)
ROUTER, GATE = "moe.router", "gate"  # `targets` name the router as PEFT does: patterns mean attention and experts
PEFT_NAMES = {
    "q_proj": ("attention.query",), "k_proj": ("attention.key",), "v_proj": ("attention.value",),
    "o_proj": ("attention.output",), "w1": ("moe.w1",), "w2": ("moe.w2",), "w3": ("moe.w3",), "gate": (GATE,),
    "gate_proj": ("moe.w1",), "up_proj": ("moe.w3",), "down_proj": ("moe.w2",), "gate_up_proj": ("moe.w1", "moe.w3"),
    "all-linear": (*TARGETS, GATE),
}  # fmt: skip


class LoraConfig(FrozenConfig):
    """Which matrices get an adapter, and of what size."""

    rank: int = Field(16, gt=0, description="size between A and B")
    alpha: float = Field(32.0, gt=0, description="the adapter counts alpha / rank, or alpha / sqrt(rank) with rslora")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), which keeps high ranks stable")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that training drops")
    targets: tuple[str, ...] = Field(
        ("attention.*", "moe.w*"),
        description=f"patterns over {', '.join(TARGETS)}; gate, the router; or PEFT's names of these, which become "
        "ours: q_proj, k_proj, v_proj, o_proj, w1, w2, w3, all-linear",
    )
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = Field(
        (), description="matrices that are trained whole and saved beside the adapters, by PEFT's names"
    )
    init_from: str | None = Field(
        None,
        description="an adapter to begin with: a LoRA run, an adapter of ours or PEFT's; rank, alpha, rslora and "
        "targets that are not set are its own",
    )

    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = Field(
        "float32",
        description="how the frozen matrices are held; int8 and nf4 in blocks, embedding and head in bfloat16",
    )
    base_block: int = Field(64, gt=0, description="weights of an int8 or nf4 matrix that share a scale, at most")

    @field_validator("targets", mode="before")
    @classmethod
    def _by_our_names(cls, targets: Any) -> Any:
        named = [targets] if isinstance(targets, str) else targets
        if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
            return targets
        return tuple(dict.fromkeys(ours for name in named for ours in PEFT_NAMES.get(name, (name,))))

    @model_validator(mode="after")
    def _targets_exist(self) -> Self:
        for pattern in self.targets:
            if not any(_matches(target, pattern) for target in (*TARGETS, ROUTER)):
                raise ValueError(f"targets: {pattern!r} matches none of {', '.join([*TARGETS, *PEFT_NAMES])}")
        return self

    @property
    def whole(self) -> tuple[str, ...]:
        """The leaves of modules_to_save."""
        return tuple({"embed_tokens": "embed.weight", "lm_head": "head.weight"}[name] for name in self.modules_to_save)

    @property
    def quantizes(self) -> bool:
        """Whether the base is held in blocks."""
        return self.base_dtype in ("int8", "nf4")

    @property
    def base_only(self) -> Self:
        """The same base without any adapter."""
        return self.model_copy(update={"targets": ()})

    @property
    def scale(self) -> float:
        """What (x A) B is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, target: str) -> bool:
        """Whether one of TARGETS gets an adapter."""
        return any(_matches(target, pattern) for pattern in self.targets)


def _matches(target: str, pattern: str) -> bool:
    return pattern == GATE if target == ROUTER else fnmatch.fnmatchcase(target, pattern)


def base_weight(
    value: Float[Array, "..."], shape: dict[str, int], contracted: str, lora: LoraConfig | None
) -> nnx.Param | QuantizedWeight:
    """A matrix of the base with the logical axes `shape`, as `lora` wants it held; without lora as it is."""
    if lora is not None and (lora.base_dtype == "int8" or lora.base_dtype == "nf4"):
        return QuantizedWeight(value, shape, contracted, lora.base_dtype, lora.base_block)
    return nnx.Param(value.astype(base_dtype(lora, value.dtype)), axes=tuple(shape))


def base_dtype(lora: LoraConfig | None, dtype: jnp.dtype) -> jnp.dtype:
    """Of what of the base is not quantised: the embedding, the head."""
    return dtype if lora is None or lora.base_dtype == "float32" else jnp.dtype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """An adapter ready for use: gathered, in the compute dtype."""

    a: Float[Array, "*E I r"]
    b: Float[Array, "*E r O"]
    scale: float = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})
    rng: jax.Array | None  # of the dropout; None: nothing is dropped

    @property
    def drops(self) -> bool:
        """Whether some of its inputs are dropped."""
        return self.rng is not None and self.dropout > 0

    def part(self, index: jax.Array) -> Self:
        """The same for some of the rows, which drop otherwise than the others."""
        return self if self.rng is None else replace(self, rng=jax.random.fold_in(self.rng, index))


class Adapter(nnx.Module):
    """A and B of one matrix, or of one matrix of each expert. Input and output may have several dimensions.

    `metadata` is that of both parameters, beside their axes.
    """

    def __init__(
        self,
        lora: LoraConfig,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        key: jax.Array,
        stack: dict[str, int],
        dtype: jnp.dtype,
        **metadata: Any,
    ):
        self.scale, self.dropout = lora.scale, lora.dropout
        self.groups = sum(name == "experts" for name in stack)
        bound = 1 / math.sqrt(math.prod(inputs.values()))
        a_shape = (*stack.values(), *inputs.values(), lora.rank)
        b_shape = (*stack.values(), lora.rank, *outputs.values())
        a = jax.random.uniform(key, a_shape, dtype, -bound, bound)
        self.a = nnx.Param(a, axes=(*stack, *inputs, "lora_rank"), **metadata)
        self.b = nnx.Param(jnp.zeros(b_shape, dtype), axes=(*stack, "lora_rank", *outputs), **metadata)

    def ready(self, dtype: jnp.dtype, rng: jax.Array | None) -> LowRank:
        """Both matrices gathered and flat: (..., I, r) and (..., r, O)."""
        a, b = gather(self.a, dtype), gather(self.b, dtype)
        a, b = a.reshape(*a.shape[: self.groups], -1, a.shape[-1]), b.reshape(*b.shape[: self.groups + 1], -1)
        return LowRank(a, b, self.scale, self.dropout, rng)


def low_rank(x: Float[Array, "M I"], adapter: LowRank) -> Float[Array, "M O"]:
    """s (x A) B."""
    return jnp.dot(jnp.dot(_dropped(x, adapter), adapter.a) * adapter.scale, adapter.b).astype(x.dtype)


def grouped_low_rank(
    x_RI: Float[Array, "R I"], adapter: LowRank, group_sizes_E: Int[Array, " E"], backend: str
) -> Float[Array, "R O"]:
    """s (x A_e) B_e for rows sorted by expert; rows behind the last group are undefined."""
    inside_R1 = (jnp.arange(x_RI.shape[0]) < jnp.sum(group_sizes_E))[:, None]
    h_Rr = grouped_matmul(_dropped(x_RI, adapter), adapter.a, group_sizes_E, backend=backend)
    return grouped_matmul(jnp.where(inside_R1, h_Rr * adapter.scale, 0), adapter.b, group_sizes_E, backend=backend)


def _dropped(x: jax.Array, adapter: LowRank) -> jax.Array:
    if adapter.rng is None or not adapter.drops:
        return x
    keep = jax.random.bernoulli(shard_key(adapter.rng, TOKEN_AXES), 1 - adapter.dropout, x.shape)
    return jnp.where(keep, x / (1 - adapter.dropout), 0)


def is_adapter(path: str) -> bool:
    """Whether a dotted parameter path, such as layers.moe.w1_lora.a, belongs to an adapter."""
    return any(part.endswith("_lora") for part in path.split("."))
