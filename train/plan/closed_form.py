"""What a step must cost, by arithmetic alone: FLOPs, memory and traffic of one chip.

Everything is for one optimizer step and one chip. M is the tokens of one chip in the whole step, m those of one
micro-batch. The figures are held against compiled programs in tests and in docs/benchmarks.md.
"""

import math
from typing import Literal, NamedTuple

from mixtral_jax.config import MixtralConfig
from mixtral_jax.train.config.schema import DpoStageConfig, RunConfig
from mixtral_jax.train.plan.held import copied_by_device, held_by_device

BLOCK = 512  # queries and keys in a tile of the attention kernel: tiles on the diagonal are computed whole


class Flops(NamedTuple):
    """Of one chip and step. `useful` is forward + backward with causal attention; the rest is recomputed."""

    useful: float
    useful_full: float  # the same with attention counted over all pairs, the convention of published figures
    dots: float  # projections, router, head, with what is recomputed
    experts: float
    attention: float

    @property
    def total(self) -> float:
        """All that the step should compute, recomputation included."""
        return self.dots + self.experts + self.attention


class Shape(NamedTuple):
    """How a run lies on its mesh."""

    sizes: dict[str, int]
    tokens: int  # of one chip and micro-batch
    accumulation: int

    @property
    def chips(self) -> int:
        """Devices in all."""
        return math.prod(self.sizes.values())

    @property
    def parameter_shards(self) -> int:
        """Devices that share the parameters."""
        return self.sizes["fsdp"] * self.sizes["expert"] * self.sizes["tensor"]


def shape_of(config: RunConfig, devices: int) -> Shape:
    """How many tokens a chip has, and how often.

    Raises:
        ValueError: the mesh does not fit the devices.
    """
    sizes = config.mesh.sizes(devices)
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
    return Shape(sizes, config.rows_per_micro_batch * config.seq_len // shards, config.accumulation)


def flops(config: RunConfig, shape: Shape) -> Flops:
    """Forward 1, backward 2; `full` recomputes a layer's forward, `minimal` nothing that is a matrix product.

    Attention's backward kernels compute the scores and their gradients twice: 7 products where 4 are needed. Under
    LoRA the frozen matrices have no gradient, so their backward is 1; the adapters' is 2. A live reference of DPO is
    one more forward pass over everything, and useful; DPO computes the logits once more in its backward pass.
    """
    model, parts, again = config.model, parts_of(config), 2 if config.compute.remat == "full" else 0
    tokens = shape.tokens * shape.accumulation / shape.sizes["tensor"]
    layers, head = model.num_hidden_layers, model.vocab_size * model.hidden_size
    router = 0 if model.is_dense else model.hidden_size * model.num_local_experts * shape.sizes["tensor"]
    expert = 3 * model.hidden_size * model.intermediate_size * model.num_experts_per_tok
    ours = 6 if config.adapters is None else 4
    reference = 2 if parts.asked else 0
    dense = projection_params(model) + router
    adapters = layers * (parts.dense_adapters + model.num_experts_per_tok * parts.expert_adapters)
    pairs = attention_pairs(config.seq_len, model.sliding_window)
    product = 2 * layers * model.num_attention_heads * model.head_dim * pairs * tokens
    frozen = (ours - 6) * (layers * (dense + expert) + head)

    def useful(kind: Literal["causal", "full"]) -> float:
        whole = model.flops_per_token(config.seq_len, kind)
        return tokens * (whole * (1 + reference / 6) + frozen + 6 * adapters)

    return Flops(
        useful=useful("causal"),
        useful_full=useful("full"),
        dots=tokens
        * (
            layers * dense * (ours + again + reference)
            + layers * parts.dense_adapters * (6 + again)
            + head * (ours + reference + (2 if config.stage == "dpo" else 0))
        ),
        experts=tokens
        * layers
        * (expert * (ours + again + reference) + model.num_experts_per_tok * parts.expert_adapters * (6 + again)),
        attention=product * (2 + 7 + again + reference),
    )


class Parts(NamedTuple):
    """What adapters and a reference add to a run."""

    copied: bool  # a reference has a copy of the weights
    asked: bool  # a reference is asked for every batch
    dense_adapters: int  # of one layer's attention
    expert_adapters: int  # of one expert


def parts_of(config: RunConfig) -> Parts:
    """What adapters and the reference of DPO add."""
    model, lora = config.model, config.adapters
    kind = config.reference if isinstance(config, DpoStageConfig) else "none"
    asked = kind in ("frozen", "lora_base")
    if lora is None:
        return Parts(asked, asked, 0, 0)
    heads, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    width, ffn = model.hidden_size, model.intermediate_size
    sides = {
        "attention.query": width + heads, "attention.key": width + kv, "attention.value": width + kv,
        "attention.output": heads + width, "moe.w1": width + ffn, "moe.w3": width + ffn, "moe.w2": ffn + width,
    }  # fmt: skip
    dense, expert = (
        lora.rank * sum(size for name, size in sides.items() if name.startswith(room) and lora.adapts(name))
        for room in ("attention.", "moe.")
    )
    return Parts(asked and config.router_factor > 0, asked, dense, expert)


def attention_pairs(seq_len: int, window: int | None) -> float:
    """Keys per query that a tiled kernel computes: those of every tile that the mask does not empty."""
    block = min(BLOCK, seq_len)
    blocks = math.ceil(seq_len / block)
    reach = blocks if window is None else math.ceil((window - 1) / block) + 1
    return sum(min(i + 1, reach) for i in range(blocks)) * block / blocks


def projection_params(model: MixtralConfig) -> int:
    """Query, key, value and output matrices of one layer."""
    return 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)


def layer_params(model: MixtralConfig) -> tuple[int, int]:
    """(dense, expert) parameters of one layer."""
    router = 0 if model.is_dense else model.hidden_size * model.num_local_experts
    return (
        projection_params(model) + router,
        3 * model.hidden_size * model.intermediate_size * model.num_local_experts,
    )


def memory(config: RunConfig, shape: Shape) -> dict[str, float]:
    """Bytes of one chip: state exactly, the rest as the step at its fullest, in an expert's backward pass."""
    model, options = config.model, config.compute
    size = 4 if options.dtype == "float32" else 2
    own, frozen = held_by_device(config, shape.sizes)
    dense, experts = layer_params(model)
    tensor, expert_axis = shape.sizes["tensor"], shape.sizes["expert"]
    layer = (dense + experts / expert_axis) / tensor * size
    head = 2 * model.vocab_size * model.hidden_size / tensor
    width, tokens = model.hidden_size, shape.tokens
    rows = tokens * model.num_experts_per_tok
    if expert_axis > 1:
        chunk = config.compute.moe.chunk_tokens or tokens
        rows = min(chunk, tokens) * expert_axis * min(
            model.num_experts_per_tok, model.num_local_experts // expert_axis
        )  # fmt: skip
    ffn = model.intermediate_size / tensor
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim / tensor
    saved: float = width
    if options.remat != "full":
        saved += 2 * heads + width + rows / tokens * (2 * ffn + width)
    return {
        "parameters": 4 * own,
        "frozen": frozen,
        "reference": copied_by_device(config, shape.sizes) if parts_of(config).copied else 0,
        "optimizer": 8 * own,
        "gradients": 4 * own * (2 if shape.accumulation > 1 else 1),
        "saved": model.num_hidden_layers * tokens * saved * size,
        "layer": tokens * size * (4 * width + 3 * heads) + rows * size * (2 * width + 3.5 * ffn),
        "weights": layer + head * size,
    }


def traffic(config: RunConfig, shape: Shape) -> dict[str, float]:
    """Bytes that one chip sends in a step, by mesh axis."""
    model, sizes = config.model, shape.sizes
    size = 4 if config.compute.dtype == "float32" else 2
    dense, experts = layer_params(model)
    # gathered for the forward, again for the backward, the gradient's way back, and once for a reference
    passes = (3 if config.adapters is None else 2) + parts_of(config).asked
    out: dict[str, float] = {}
    stored = sizes["fsdp"] * sizes["expert"]
    whole = model.num_hidden_layers * dense / sizes["tensor"] + 2 * model.vocab_size * model.hidden_size
    parts = {"fsdp": (experts * model.num_hidden_layers / sizes["expert"] / sizes["tensor"], sizes["fsdp"])}
    for axis, (params, count) in parts.items():
        if count > 1:
            out[axis] = shape.accumulation * passes * size * params * (count - 1) / count
    if stored > 1:
        axes = "+".join(a for a in ("fsdp", "expert") if sizes[a] > 1)
        out[axes] = out.get(axes, 0.0) + shape.accumulation * passes * size * whole * (stored - 1) / stored
    if sizes["data"] > 1:
        out["data"] = shape.accumulation * 2 * size * held_by_device(config, sizes)[0]
    if sizes["expert"] > 1 and not model.is_dense:
        moved = shape.tokens * model.num_experts_per_tok * model.hidden_size * size * (sizes["expert"] - 1)
        trips = 6 if config.compute.remat == "full" else 4
        rows = trips * model.num_hidden_layers * moved / sizes["expert"] * shape.accumulation
        out["expert"] = out.get("expert", 0.0) + rows
    if sizes["tensor"] > 1:
        each = 2 * shape.tokens * model.hidden_size * size * (sizes["tensor"] - 1) / sizes["tensor"]
        out["tensor"] = 6 * model.num_hidden_layers * each * shape.accumulation
    if sizes["context"] > 1:
        kv = 2 * model.num_key_value_heads * model.head_dim / sizes["tensor"] * shape.tokens * (sizes["context"] - 1)
        out["context"] = 3 * model.num_hidden_layers * kv * size * shape.accumulation
    return out


def memory_traffic(config: RunConfig, shape: Shape) -> float:
    """Bytes that one chip's HBM moves in a step, at the least.

    The optimizer reads and writes parameters, gradients and moments once (32 bytes a parameter of its own); every
    gathered matrix is written and read, in forward, recomputation and twice in the backward pass; activations cross
    between the products of a layer.
    """
    model = config.model
    size = 4 if config.compute.dtype == "float32" else 2
    dense, experts = layer_params(model)
    layer = (dense + experts / shape.sizes["expert"]) / shape.sizes["tensor"] * size
    uses = 8 if config.compute.remat == "full" else 6
    rows = model.num_experts_per_tok
    each = model.hidden_size * (14 + 4 * rows) + rows * 6 * model.intermediate_size / shape.sizes["tensor"]
    lora, reference = config.adapters is not None, parts_of(config).asked
    uses += (2 if reference else 0) - (2 if lora else 0)  # written and read: no gradient of a frozen matrix
    passes = (4 if config.compute.remat == "full" else 3) + reference
    activations = passes * shape.tokens * each * size
    step = model.num_hidden_layers * (uses * layer + activations) * shape.accumulation
    return 32 * held_by_device(config, shape.sizes)[0] + step
