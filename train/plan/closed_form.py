"""What a step must cost, by arithmetic alone: FLOPs and traffic of one chip, and the time that they take at the least.

The figures are held against compiled programs in tests and in docs/benchmarks.md. Of what is multiplied,
MixtralConfig keeps the count.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, NamedTuple

from mixtral_jax.kernels import Choice, choose_kernels
from mixtral_jax.moe import resolve_transport
from mixtral_jax.parallel import NEAREST_FIRST, Machine
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.plan import placement
from mixtral_jax.train.plan.chips import NODE_GPUS, Topology
from mixtral_jax.train.plan.placement import asks_reference, local_tokens

TPU = Machine("tpu")


class Flops(NamedTuple):
    """What one chip computes in a step, recomputation included."""

    dots: float  # projections, router, head
    experts: float
    attention: float

    @property
    def total(self) -> float:
        """All three."""
        return self.dots + self.experts + self.attention


class Roofline(NamedTuple):
    """Seconds of one step if each resource were all that counts, and the best that they allow together."""

    compute: float
    memory: float
    network: float
    bound: str
    mfu: float  # as perf/mfu counts, when everything overlaps with the slowest
    mfu_full: float  # the same, counting all pairs of attention
    mfu_serial: float  # as perf/mfu counts, when the network hides behind nothing

    @property
    def seconds(self) -> float:
        """The slowest of the three."""
        return max(self.compute, self.memory, self.network)

    @property
    def likely(self) -> float:
        """Seconds with half of the traffic hidden: between the two bounds."""
        return (self.seconds + max(self.compute, self.memory) + self.network) / 2


def useful_per_token(config: RunConfig, attention: Literal["causal", "full"] = "causal") -> float:
    """FLOPs of one token: MixtralConfig.flops_per_token as the stage has it.

    Under LoRA the frozen matrices have no gradient, which is a third of their work, and adapters, perhaps head and
    router too, are trained beside them; a live reference of DPO is one more forward pass over everything.
    """
    model = config.model
    whole = model.flops_per_token(config.seq_len, attention) * (1 + asks_reference(config) / 3)
    if config.adapters is None:
        return whole
    dense, experts = placement.adapter_params(config)
    used = dense + experts * model.num_experts_per_tok / model.num_local_experts
    return whole - model.matmul_flops + 6 * used + 2 * sum(placement.thawed_params(config))


def useful_flops(config: RunConfig, attention: Literal["causal", "full"] = "causal") -> float:
    """FLOPs of one step of the whole machine: the one figure behind perf/mfu, perf/tflops_per_device and the plan.

    Every position of every row counts, padding and tokens without a weight too, for they are computed; what is computed
    again for the backward pass, or to unpack a quantised base, does not. Attention counts the pairs that the causal
    mask lets through, or with `full` all, as most published figures do. A row of pairs holds both answers.
    """
    return config.tokens_per_step * useful_per_token(config, attention)


def useful(config: RunConfig, sizes: Mapping[str, int]) -> tuple[float, float]:
    """The same of one chip, (causal, full)."""
    chips = math.prod(sizes.values())
    return useful_flops(config) / chips, useful_flops(config, "full") / chips


def flops(config: RunConfig, sizes: Mapping[str, int], machine: Machine = TPU) -> Flops:
    """Of matrices forward 1 and backward 2; what is computed again for the backward pass is as `recomputes` says.

    Of the experts that is the product with w1 and w3 alone: with the gate before w2 nothing needs w2's. LoRA and
    a reference count as in useful_per_token; DPO computes the logits once more in its backward pass.
    """
    model, own, layers = config.model, config.model.matmul_params, config.model.num_hidden_layers
    tokens = _tokens(config, sizes)
    again, reference = recomputes(config, sizes), asks_reference(config)
    once = (3 if config.adapters is None else 2) + reference
    dense_adapters, expert_adapters = placement.adapter_params(config)
    dense = layers * (own.attention + own.router * sizes["tensor"])
    dots = dense * (once + again.dense) + dense_adapters * (3 + again.dense)
    router, head = placement.thawed_params(config)
    dots += own.head * (once + (config.stage == "dpo")) + head + router * sizes["tensor"]
    up = 2 / 3 * again.experts
    experts = layers * model.num_local_experts * own.expert * (once + up) + expert_adapters * (3 + up)
    kernel = attention_kernel(config, sizes, machine)
    pairs = attention_pairs(config.seq_len, model.sliding_window, kernel.tile)
    passes = 1 + again.dense + reference + kernel.backward / 2
    return Flops(
        dots=2 * tokens * dots,
        experts=2 * tokens * experts * model.num_experts_per_tok / model.num_local_experts,
        attention=tokens * model.attention_flops(pairs) * passes,
    )


class AttentionKernel(NamedTuple):
    """What a kernel computes."""

    tile: int  # queries and keys: those on the diagonal are computed whole
    backward: int  # products backward; forward has 2


# cuDNN's backward pass has the 5 products that are needed; the others' two kernels each compute the scores and their
# gradient once more. Smaller tiles than these change little: half a tile of a row.
ATTENTION = {"splash": AttentionKernel(512, 7), "triton": AttentionKernel(128, 7), "cudnn": AttentionKernel(128, 5)}


def attention_kernel(config: RunConfig, sizes: Mapping[str, int], machine: Machine) -> AttentionKernel:
    """That of the machine; what is no kernel counts as splash."""
    return ATTENTION.get(kernels(config, sizes, machine)["attention"].kernel, ATTENTION["splash"])


def kernels(
    config: RunConfig, sizes: Mapping[str, int], machine: Machine, tokamax: bool | None = True
) -> dict[str, Choice]:
    """What `attention` and `experts` run on there, where the extra `cuda` is installed unless `tokamax` says else.

    Raises:
        ValueError: a back-end that cannot run there is asked for.
    """
    dtype = "float32" if config.compute.dtype == "float32" else "bfloat16"
    context = sizes["context"]
    return choose_kernels(
        config.model, config.compute, machine, seq_len=config.seq_len, dtype=dtype, context=context, tokamax=tokamax
    )


class Recomputes(NamedTuple):
    """Which parts of a layer's forward pass its backward pass computes again (ComputeConfig.remat)."""

    dense: bool  # attention, its projections, the router
    experts: bool  # the product with w1 and w3
    rows: bool  # the way of the rows to the experts


def recomputes(config: RunConfig, sizes: Mapping[str, int]) -> Recomputes:
    """As config.compute.remat says; of chunks of tokens only the inputs are kept, whatever it says."""
    remat, chunk = config.compute.remat, config.compute.moe.chunk_tokens
    chunked = chunk is not None and chunk < local_tokens(config, sizes) and not config.model.is_dense
    return Recomputes(
        dense=remat in ("full", "experts_input"),
        experts=chunked or remat not in ("none", "minimal"),
        rows=chunked or remat not in ("none", "experts_input"),
    )


def _tokens(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Of one chip and step; those that chips along `tensor` have in common are shared out."""
    return local_tokens(config, sizes) * config.accumulation / sizes["tensor"]


def attention_pairs(seq_len: int, window: int | None, tile: int = 512) -> float:
    """Keys per query that a tiled kernel computes: those of every tile that the mask does not empty."""
    block = min(tile, seq_len)
    blocks = math.ceil(seq_len / block)
    reach = blocks if window is None else math.ceil((window - 1) / block) + 1
    return sum(min(i + 1, reach) for i in range(blocks)) * block / blocks


def traffic(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one chip sends in a step, by mesh axis."""
    model, own, layers = config.model, config.model.matmul_params, config.model.num_hidden_layers
    tensor, tokens = sizes["tensor"], local_tokens(config, sizes)
    experts = layers * own.expert * model.num_local_experts / sizes["expert"] / tensor
    dense = layers * (own.attention + own.router) / tensor + 2 * own.head
    compute_bytes = placement.compute_bytes(config)
    reduce_bytes = max(compute_bytes, 4 if config.compute.reduce_dtype == "float32" else 2)
    # gathered for the forward, again for the backward, once for a reference, and the gradient's way back
    back, lora = reduce_bytes / compute_bytes, config.adapters
    passes = 2 + asks_reference(config) + back * (lora is None)
    whole = 0.0 if lora is None else own.head * len(lora.whole) + layers * own.router * (config.router_factor > 0)
    trips = 4 + recomputes(config, sizes).rows  # there and back, forward and backward
    shards = "+".join(axis for axis in ("fsdp", "expert") if sizes[axis] > 1)
    sent = defaultdict[str, float](float)

    def send(axes: str, numbers: float) -> None:
        """Of what the devices along `axes` hold or receive together, all but a device's own share."""
        count = math.prod(sizes[axis] for axis in axes.split("+") if axis)
        if count > 1:
            sent[axes] += config.accumulation * compute_bytes * numbers * (count - 1) / count

    send("fsdp", passes * experts)
    send(shards, passes * dense + back * whole)
    if sizes["data"] > 1:  # once, behind all micro-batches
        sent["data"] = reduce_bytes * 2 * placement.resident(config, sizes)["parameters"] / 4
    if not model.is_dense:  # all tokens of the axis, or of each its choices
        ring = resolve_transport(config.compute.moe.transport, sizes["expert"]) == "ring"
        copies = sizes["expert"] if ring else model.num_experts_per_tok
        send("expert", trips * layers * tokens * copies * model.hidden_size)
    send("tensor", 12 * layers * tokens * model.hidden_size)
    send("context", 6 * layers * model.num_key_value_heads * model.head_dim / tensor * tokens * sizes["context"])
    return dict(sent)


def memory_traffic(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Bytes that one chip's HBM moves in a step, at the least.

    The optimizer reads and writes parameters, gradients and moments once; every
    gathered matrix is written and read, in forward, recomputation and twice in the backward pass; activations cross
    between the products of a layer.
    """
    model, rows = config.model, config.model.num_experts_per_tok
    again, reference = recomputes(config, sizes).dense, asks_reference(config)
    # written and read: no gradient of a frozen matrix
    uses = 2 * (3 + again + reference - (config.adapters is not None))
    each = model.hidden_size * (14 + 4 * rows) + rows * 6 * model.intermediate_size / sizes["tensor"]
    activations = (3 + again + reference) * local_tokens(config, sizes) * each * placement.compute_bytes(config)
    layer = uses * placement.layer_bytes(config, sizes) + activations
    held = placement.resident(config, sizes)
    optimizer = 4 * held["parameters"] + 2 * held["optimizer"]
    return optimizer + model.num_hidden_layers * layer * config.accumulation


def roofline(
    config: RunConfig, topology: Topology, *, flops: float, sent: Mapping[tuple[str, str], float]
) -> Roofline | None:
    """`flops` are all that a chip computes, `sent` is its traffic by kind and mesh axes; None for an unknown chip."""
    chip, sizes = topology.chip, config.mesh.sizes(topology.chips)
    if not chip.flops:
        return None
    seconds = {
        "compute": flops / chip.flops,
        "memory": memory_traffic(config, sizes) / chip.memory_bandwidth,
        "network": sum(
            amount / bandwidth(topology, axes, sizes, config.mesh.slow, kind) for (kind, axes), amount in sent.items()
        ),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    causal, full = (amount / chip.flops for amount in useful(config, sizes))
    serial = max(seconds["compute"], seconds["memory"]) + seconds["network"]
    longest = seconds[bound]
    return Roofline(**seconds, bound=bound, mfu=causal / longest, mfu_full=full / longest, mfu_serial=causal / serial)


def bandwidth(
    topology: Topology, axes: str, sizes: Mapping[str, int], slow: Mapping[str, int] | None = None, kind: str = ""
) -> float:
    """Bytes a second out of one chip along mesh axes such as `fsdp+expert`, for a `kind` of collective.

    On a torus over those links that they use; of GPUs what the slower of NVLink and network allows.
    `slow`: the part of each axis that is laid across slices or nodes.
    """
    chip = topology.chip
    used = [a for a in axes.split("+") if sizes.get(a, 1) > 1]
    if topology.is_gpu:
        across = share_across(topology, axes, sizes, slow, kind)
        return 1 / max((1 - across) / chip.network, across / chip.slow_network)
    if topology.slices > 1 and axes == "data":
        return chip.slow_network
    count = math.prod(sizes[a] for a in used)
    dims = math.ceil(chip.torus * math.log(max(count, 2)) / math.log(max(topology.chips_per_slice, 2)) - 1e-9)
    return chip.network * min(dims, chip.torus) / chip.torus


def share_across(
    topology: Topology, axes: str, sizes: Mapping[str, int], slow: Mapping[str, int] | None = None, kind: str = ""
) -> float:
    """Of what GPUs send along mesh axes the share that leaves the node.

    A gather, scatter or reduction runs in rings (NCCL's), as many as GPUs of the group share a node: of each ring one
    link in so many leaves it. An all-to-all sends to every other device alike.
    """
    slow = slow or {}
    stride, together, count = 1, 1, 1  # neighbours in the node so far; of the group: in a node, in all
    for axis in NEAREST_FIRST:
        size = sizes.get(axis, 1)
        fast = size // slow.get(axis, 1)
        inside = math.gcd(fast, max(1, NODE_GPUS // stride))
        stride *= fast
        if axis in axes.split("+"):
            together, count = together * inside, count * size
    if count == together or topology.chips <= NODE_GPUS:
        return 0.0
    return (count - together) / (count - 1) if "all-to-all" in kind else 1 / together
