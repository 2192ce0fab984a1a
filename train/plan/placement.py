"""Where a run's memory lies: what a device holds, matrix by matrix, what a step adds to it, and sentences of both."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from mixtral_jax.config import MixtralConfig
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import abstract_model
from mixtral_jax.moe import Buffer, buffer_of
from mixtral_jax.parallel import MESH_AXES, param_shardings
from mixtral_jax.train.config import DpoStageConfig, RunConfig
from mixtral_jax.train.moments import BLOCK, SMALLEST_BLOCK, StateDtype, moment_bytes
from mixtral_jax.train.weights import is_trained, leaves

# What each axis of the mesh shares out.
SHARES = {
    "data": "rows of the batch; parameters are whole on each of its devices",
    "fsdp": "rows of the batch, and all matrices with their gradients and moments",
    "expert": "rows of the batch, the experts, and all other matrices together with fsdp",
    "tensor": "heads, ffn and vocabulary",
    "context": "the tokens of each row",
}
LARGE_BYTES, LARGE_SHARE = 64 * 2**20, 0.01


class Memory(NamedTuple):
    """Bytes on one device; `peak` is of the step at its fullest."""

    parameters: float  # that are trained
    optimizer: float
    frozen: float  # the base under adapters
    reference: float  # a live reference's own copy of the weights
    code: float
    peak: float
    limit: float

    @property
    def temporaries(self) -> float:
        """Activations, gathered weights, gradients, at their highest."""
        return self.peak - self.parameters - self.optimizer - self.frozen - self.reference

    @property
    def too_much(self) -> float:
        """What does not fit."""
        return max(0.0, self.peak + self.code - self.limit)


def asks_reference(config: RunConfig) -> bool:
    """Whether a live reference is asked for every batch: one more forward pass."""
    return isinstance(config, DpoStageConfig) and config.reference in ("frozen", "lora_base")


def copies_reference(config: RunConfig) -> bool:
    """Whether that reference needs weights of its own: not where all of the base is frozen."""
    return asks_reference(config) and (config.adapters is None or config.trains_of_base)


def local_tokens(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Tokens of one device and micro-batch."""
    shards = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert", "context"))
    return config.rows_per_micro_batch * config.seq_len // shards


def resident(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes that one device of a mesh holds from step to step, as fields of Memory.

    Raises:
        ValueError: an axis does not divide a parameter; named with a remedy.
    """
    held, trains = _held(config.model, config.adapters, tuple(sizes.items())), is_trained(config)
    trained = sum(size for path, size in held.items() if trains(path))
    base = sum(size for path, size in held.items() if not is_adapter(path))
    moments = _moments(config.model, config.adapters, config.optimizer.state_dtype)
    return {
        "parameters": trained,  # fp32
        "optimizer": round(sum(moments[path] * size / 4 for path, size in held.items() if trains(path))),
        "frozen": sum(held.values()) - trained,
        "reference": base if copies_reference(config) else 0,
    }


def adapter_params(config: RunConfig) -> tuple[int, int]:
    """(attention, experts): trained parameters of the adapters of all layers, but the router's (see thawed_params)."""
    held = _held(config.model, config.adapters, tuple((axis, 1) for axis in MESH_AXES))
    rooms = ("layers.attention.", "layers.moe.w")
    attention, experts = (sum(n for p, n in held.items() if p.startswith(r) and is_adapter(p)) // 4 for r in rooms)
    return attention, experts


def thawed_params(config: RunConfig) -> tuple[int, int]:
    """(router, head): parameters of the base whose products have gradients under adapters.

    The router's where it is trained or has an adapter, for that is added to it before it is multiplied.
    """
    lora, own = config.adapters, config.model.matmul_params
    if lora is None:
        return 0, 0
    head = "embed.weight" if config.model.tie_word_embeddings else "head.weight"
    router = config.router_factor > 0 or lora.adapts("moe.router")
    return config.model.num_hidden_layers * own.router * router, own.head * (head in lora.whole)


@functools.cache
def _held(model: MixtralConfig, lora: LoraConfig | None, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Path of each parameter -> bytes of one device's shard."""
    abstract = abstract_model(model, lora=lora)
    mesh: Any = AbstractMesh(tuple(size for _, size in sizes), tuple(axis for axis, _ in sizes))  # no device is there
    shardings = dict(leaves(param_shardings(abstract, mesh) or {}))
    return {
        path: math.prod(shardings[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in leaves(nnx.to_pure_dict(nnx.state(abstract)))
    }


@functools.cache
def _moments(model: MixtralConfig, lora: LoraConfig | None, dtype: StateDtype) -> dict[str, float]:
    """Path of each parameter -> bytes of both moments of one number."""
    shapes = leaves(nnx.to_pure_dict(nnx.state(abstract_model(model, lora=lora))))
    return {path: 2 * moment_bytes(path.split("."), leaf.shape, dtype) for path, leaf in shapes}


def as_run_on(config: RunConfig, where: str) -> RunConfig:
    """The config with the dtype that `auto` stands for on a platform: this process's own must not decide it."""
    if config.compute.dtype != "auto":
        return config
    dtype = "float32" if where == "cpu" else "bfloat16"
    return config.model_copy(update={"compute": config.compute.model_copy(update={"dtype": dtype})})


def layer_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """The matrices of one layer as products use them: gathered, in the compute dtype."""
    own = config.model.matmul_params
    experts = own.expert * config.model.num_local_experts / sizes["expert"]
    return (own.attention + own.router + experts) / sizes["tensor"] * compute_bytes(config)


def compute_bytes(config: RunConfig) -> int:
    """Of a number in the compute dtype; auto stands for an accelerator's."""
    return 4 if config.compute.dtype == "float32" else 2


def memory(config: RunConfig, sizes: Mapping[str, int], where: str = "tpu") -> dict[str, float]:
    """Bytes of one chip by closed form: state exactly, the rest as the step at its fullest, in an expert's backward.

    On GPUs the experts' matrices are transposed between gather and kernel, and the next are gathered meanwhile; of the
    hidden rows h, its gradient and the activation are held at once. Held against compiled programs in tests and in
    docs/benchmarks.md.
    """
    model, itemsize, tokens = config.model, compute_bytes(config), local_tokens(config, sizes)
    state = resident(config, sizes)
    tensor, expert_axis = sizes["tensor"], sizes["expert"]
    width, ffn = model.hidden_size, model.intermediate_size / tensor
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim / tensor
    rows = tokens * model.num_experts_per_tok
    saved = saved_bytes(config, sizes)[config.compute.remat]
    chunk = min(config.compute.moe.chunk_tokens or tokens, tokens)
    buffer = received(config, sizes, chunk)
    gpu = where == "gpu"
    # layers whose matrices are gathered
    held: float = model.num_hidden_layers if config.compute.remat == "none" else 1 + gpu
    width_of_row = (4 * width + 5 * ffn) if gpu else (2 * width + 3.5 * ffn)
    if gpu and adapter_params(config)[1]:  # sums with the adapters' parts and their gradients; one program was seen
        width_of_row += 9 * ffn
    if config.adapters is None:  # the sums over chunks and over rounds, in fp32
        held += ((chunk < tokens) + (buffer.rows < buffer.worst)) * 4 / itemsize
    sent = 0.0 if buffer.rows == buffer.worst else 3 * width * rows  # over all rounds: rows, both their gradients
    if expert_axis > 1 or buffer.rows < buffer.worst:
        rows = buffer.rows
    return {
        **state,
        "gradients": gradient_bytes(config, state),
        "saved": model.num_hidden_layers * tokens * saved,
        "layer": tokens * itemsize * (4 * width + 3 * heads) + itemsize * (rows * width_of_row + sent),
        "weights": held * layer_bytes(config, sizes) + 2 * model.matmul_params.head / tensor * itemsize,
    }


def gradient_bytes(config: RunConfig, state: Mapping[str, float]) -> float:
    """Of what `resident` says is trained: those of a micro-batch, and with several of them their sum."""
    return state["parameters"] * (2 if config.accumulation > 1 else 1)


def saved_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """ComputeConfig.remat -> bytes that one token leaves on the device in each layer for the backward pass.

    In all of them a layer's input. `none` keeps the steps of norms, rotation and activation too, about as often as
    counted here, and beside what tokens leave the gathered matrices.
    """
    model, itemsize, tensor = config.model, compute_bytes(config), sizes["tensor"]
    width, ffn = model.hidden_size, model.intermediate_size / tensor
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim / tensor
    chunk = config.compute.moe.chunk_tokens
    chunked = chunk is not None and chunk < local_tokens(config, sizes)
    rows: float = 0 if chunked and not model.is_dense else model.num_experts_per_tok
    if rows:
        tokens = local_tokens(config, sizes)
        rows = received(config, sizes, tokens).rows / tokens
    attention = heads + width
    numbers = {
        "none": 6 * width + 3 * heads + rows * (2 * width + 5 * ffn),
        "minimal": width + attention + rows * 2 * ffn,
        "attention": width + attention,
        "experts_input": width + rows * width * (not model.is_dense),
        "offload": width,
        "full": width,
    }
    return {remat: itemsize * count for remat, count in numbers.items()}


def received(config: RunConfig, sizes: Mapping[str, int], tokens: int) -> Buffer:
    """The experts' buffer of rows for `tokens` tokens of a device at a time."""
    model, factor = config.model, config.compute.moe.buffer_factor
    return buffer_of(tokens, model.num_experts_per_tok, model.num_local_experts, sizes["expert"], factor=factor)


def axis_lines(sizes: Mapping[str, int]) -> list[str]:
    """What each axis of more than one device shards."""
    return [f"{axis} {size}: {SHARES[axis]}" for axis, size in sizes.items() if size > 1]


def memory_line(config: RunConfig, sizes: Mapping[str, int]) -> str:
    """Bytes per device of what lives through the step; activations come on top."""
    held = resident(config, sizes)
    dtype = config.optimizer.state_dtype
    optimizer = "optimizer" if dtype == "float32" else f"optimizer ({dtype})"
    each = {"parameters": held["parameters"], optimizer: held["optimizer"], "gradients": gradient_bytes(config, held)}
    if config.adapters is not None:
        each = {f"frozen base ({config.adapters.base_dtype})": held["frozen"]} | each
    if copies_reference(config):
        each["reference"] = held["reference"]
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in each.items())
    shards = sizes["fsdp"] * sizes["expert"] * sizes["tensor"]
    return f"{human_bytes(sum(each.values()))} a device before activations: {parts} ({shards} parameter shards)"


def passing_line(config: RunConfig, sizes: Mapping[str, int], where: str) -> str:
    """What comes and goes in a step on one device of a platform, by the closed form of `plan`, which knows no
    compiler's tricks.
    """
    parts = memory(as_run_on(config, where), sizes, where)
    return (
        f"about {human_bytes(parts['saved'] + parts['layer'])} of activations a device "
        f"({human_bytes(parts['saved'])} saved for the backward pass) and {human_bytes(parts['weights'])} of gathered "
        "weights"
    )


def replicated(leaves: Iterable[tuple[str, Any]]) -> list[tuple[str, int]]:
    """(path, bytes) of the large leaves that every device of the mesh holds whole, the largest first.

    Large is above 64 MiB or a hundredth of all; `leaves` have shape, dtype and sharding.
    """
    found = [(path, leaf.size * leaf.dtype.itemsize, leaf.sharding) for path, leaf in leaves]
    large = min(LARGE_BYTES, LARGE_SHARE * sum(size for _, size, _ in found))
    whole = [
        (path, size)
        for path, size, sharding in found
        if len(sharding.device_set) > 1 and sharding.is_fully_replicated and size > large
    ]
    return sorted(whole, key=lambda pair: -pair[1])


def placement_warnings(
    config: RunConfig, mesh: jax.sharding.Mesh | None, leaves: Iterable[tuple[str, Any]]
) -> list[str]:
    """What a person may not have meant: leaves whole everywhere, a padded vocabulary, adapters on a random base."""
    warnings = []
    sizes = {"tensor": 1} if mesh is None else mesh.shape
    large = replicated(leaves)
    if large:
        named = ", ".join(f"{path} ({human_bytes(size)})" for path, size in large[:3])
        more = f" and {len(large) - 3} more" if len(large) > 3 else ""
        total = human_bytes(sum(size for _, size in large))
        warnings.append(
            f"each of the {math.prod(sizes.values())} devices holds all of {named}{more}: {total} of parameters, and "
            "their gradients and moments beside them; mesh.fsdp would share them"
        )
    tensor, vocabulary = sizes["tensor"], config.model.vocab_size
    if vocabulary % tensor:
        warnings.append(
            f"mesh.tensor ({tensor}) does not divide model.vocab_size ({vocabulary}): embedding and head are stored "
            f"whole along tensor, and padded to {-(-vocabulary // tensor) * tensor} rows where they are used"
        )
    held = resident(config, dict.fromkeys(MESH_AXES, 1))
    if config.optimizer.state_dtype == "int8" and held["optimizer"] == 2 * held["parameters"]:
        warnings.append(
            "optimizer.state_dtype is int8, but no trained matrix has a dimension for blocks of "
            f"{SMALLEST_BLOCK} to {BLOCK}: all moments stay float32"
        )
    if config.adapters is not None and config.init_from is None:
        warnings.append(
            "lora trains adapters on a base of random numbers, for init_from names no weights: "
            "set init_from to a checkpoint"
        )
    return warnings


def human_bytes(size: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
