"""Which kernel computes what on which machine, and why: asked by the model, the first screen, `doctor` and `plan`."""

import importlib.util
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.parallel import Machine

Backend = Literal["auto", "reference", "chunked", "dot_product", "splash", "cudnn", "triton"]
HALF = ("bfloat16", "float16")


class AttentionShape(NamedTuple):
    """What the choice of a back-end depends on: T queries that are neighbours, S keys, head size H."""

    T: int
    S: int
    H: int
    dtype: str = "float32"
    ordered: bool = True  # queries and keys are tokens of one row in order
    part: bool = False  # the queries are a zig-zag part of that row
    elements: int = 0  # of the queries


class Choice(NamedTuple):
    """A kernel, and why it is that one."""

    kernel: str
    why: str
    fallback: bool = False  # there are faster ones, which something named in `why` keeps from running


def choose_kernels(
    model: MixtralConfig,
    compute: ComputeConfig,
    machine: Machine,
    *,
    seq_len: int,
    dtype: str,
    context: int = 1,
    tokamax: bool | None = None,
) -> dict[str, Choice]:
    """The kernels of a training step by what they compute: `attention` and `experts`.

    Args:
        machine: for which is asked; need not be this one.
        dtype: in which is computed.
        context: devices along the axis of that name.
        tokamax: whether it is installed there; None: as it is here.

    Raises:
        ValueError: a back-end is asked for that cannot run there, or `auto` has none that is worth running.
    """
    neighbours = seq_len if context == 1 else seq_len // (2 * context)
    shape = AttentionShape(neighbours, seq_len, model.head_dim, dtype, part=context > 1)
    dense = Choice("dense", "a dense model has one expert, and no groups")
    return {
        "attention": choose_attention(compute.attention, machine, shape),
        "experts": dense if model.is_dense else choose_matmul(compute.moe.matmul, machine, tokamax),
    }


def choose_attention(asked: str, machine: Machine, shape: AttentionShape) -> Choice:
    """What is asked for, or the fastest that takes the shape there.

    Raises:
        ValueError: what is asked for cannot run there.
    """
    if asked != "auto":
        obstacle = _OBSTACLES[asked](machine, shape) if asked in _OBSTACLES else None
        if obstacle:
            raise ValueError(f"compute.attention is {asked}, which needs {obstacle}: use auto or chunked")
        return Choice(asked, "named by compute.attention")
    # decoding and short rows fit in cache whole: nothing to gain by tiles (measured: equal at 64, 3x slower at 256)
    if shape.T == 1 or shape.T * shape.S <= 64**2:
        return Choice("reference", "few enough scores to be held whole")
    obstacles = {name: _OBSTACLES[name](machine, shape) for name in _FASTEST_FIRST.get(machine.platform, ())}
    missed = "; ".join(f"{name} needs {obstacle}" for name, obstacle in obstacles.items() if obstacle)
    for name, obstacle in obstacles.items():
        if obstacle is None:
            return Choice(name, missed or f"the fastest on {machine.kind or machine.platform}")
    return Choice("chunked", missed or "tiles that stay in cache", fallback=bool(missed))


def choose_matmul(asked: str, machine: Machine, tokamax: bool | None = None) -> Choice:
    """What is asked for, or the grouped product that does no more than the useful work there.

    `ragged_dot` is never chosen: on GPU it is a dense fallback, on TPU its weight gradient costs E times the useful
    work. Nor is `blocked` on a GPU: one expert after another, block by block, on a machine that is wide.

    Raises:
        ValueError: what is asked for cannot run there, or a GPU has no grouped product.
    """
    platform, tokamax = machine.platform, has_tokamax() if tokamax is None else tokamax
    if asked == "auto":
        if platform == "gpu" and not tokamax:
            raise ValueError(
                "compute.moe.matmul is auto, and tokamax, which computes the experts on a GPU, is not installed: "
                "pip install 'mixtral-jax[cuda]', or name one of the slow back-ends (ragged_dot, blocked)"
            )
        kernel = {"tpu": "megablox", "gpu": "tokamax"}.get(platform, "blocked")
        return Choice(kernel, f"the fastest on {machine.kind or platform}")
    if asked == "tokamax" and not (platform == "gpu" and tokamax):
        need = f"a GPU (this is {platform})" if platform != "gpu" else "pip install 'mixtral-jax[cuda]'"
        raise ValueError(f"compute.moe.matmul is tokamax, which needs {need}")
    if asked == "megablox" and platform != "tpu":
        raise ValueError(f"compute.moe.matmul is megablox, which needs a TPU (this is {platform}): use auto")
    return Choice(asked, "named by compute.moe.matmul", fallback=platform != "cpu" and asked not in _GROUPED_KERNELS)


def has_tokamax() -> bool:
    """Whether tokamax (the extra `cuda`) is installed."""
    return importlib.util.find_spec("tokamax") is not None


_GROUPED_KERNELS = ("megablox", "tokamax")
_FASTEST_FIRST = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}
# by the names that jax gives devices; cuDNN's ragged layout is for the data centre's Hopper and Blackwell
_HOPPER_OR_NEWER = re.compile(r"NVIDIA G?([HB][1-9]\d\d|H20)\b")
_BEFORE_AMPERE = re.compile(r"\b([KMPV]\d+|T4|RTX 20\d\d|GTX|TITAN)\b")


def _splash_obstacle(machine: Machine, shape: AttentionShape) -> str | None:
    """What the TPU kernel would need that is not there."""
    if not shape.ordered:
        return "queries and keys that are tokens of one row in order (no cache)"
    if shape.T % 128 or shape.H % 64:
        return f"a row length in multiples of 128 and a head_dim in multiples of 64 (they are {shape.T} and {shape.H})"
    return None if machine.platform == "tpu" else f"a TPU (this is {machine.platform})"


def _cudnn_obstacle(machine: Machine, shape: AttentionShape) -> str | None:
    if not _HOPPER_OR_NEWER.search(machine.kind):
        return f"an NVIDIA GPU of the Hopper generation or newer (this is {machine.kind or machine.platform})"
    if jax.__version_info__ < (0, 12):
        return f"jax 0.12 or newer (this is {jax.__version__})"
    if not shape.ordered or shape.part:
        return "whole rows in order (no cache, mesh.context 1)"
    if shape.H % 8 or shape.H > 128:
        return f"a head_dim in multiples of 8 up to 128 (it is {shape.H})"
    if shape.elements >= 2**31:
        return "queries of fewer than 2**31 numbers on a device: a smaller micro_batch_size"
    return None if shape.dtype in HALF else f"bfloat16 (compute.dtype is {shape.dtype})"


def _triton_obstacle(machine: Machine, shape: AttentionShape) -> str | None:
    if not machine.kind.startswith("NVIDIA") or _BEFORE_AMPERE.search(machine.kind):
        return f"an NVIDIA GPU of the Ampere generation or newer (this is {machine.kind or machine.platform})"
    if not shape.ordered:
        return "queries and keys that are tokens of one row in order (no cache)"
    if shape.T % 128 or shape.S % 128:
        return f"a row length in multiples of 128, and on each device of mesh.context too (it is {shape.T})"
    if shape.H not in (16, 32, 64, 128):
        return f"a head_dim of 16, 32, 64 or 128 (it is {shape.H})"
    return None if shape.dtype in HALF else f"bfloat16 (compute.dtype is {shape.dtype})"


_OBSTACLES: dict[str, Callable[[Machine, AttentionShape], str | None]] = {
    "splash": _splash_obstacle,
    "cudnn": _cudnn_obstacle,
    "triton": _triton_obstacle,
}
