"""One table between the native parameter tree and the tensors on disk, read in both directions.

A native leaf stacks what Hugging Face keeps apart: all layers, all experts, and the two halves of the gated
feed-forward. A `Slot` is the part of a leaf that is one hub tensor; a hub matrix is (out, in), ours is (in, out).
A `Place` says where a file layout keeps that slot, so that other layouts than the hub's read through the same slots.
The matrices A and B of an adapter are leaves like others: their tensors are those of a PEFT directory.
"""

import math
from dataclasses import dataclass

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.lora import ROUTER as ROUTER_TARGET
from mixtral_jax.lora import TARGETS, LoraConfig

ROUTER = "layers.moe.router"
PEFT, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Leaf:
    """One native array: `names` are the hub tensors of its halves, `rows_axis` runs along the hub's rows."""

    path: str
    shape: tuple[int, ...]
    axes: str
    names: tuple[str, ...]
    rows_axis: int
    transposed: bool = True

    @property
    def stacked(self) -> int:
        """Leading axes that are addressed one index at a time: layer, then expert."""
        return len(self.axes) - len(self.axes.lstrip("LE"))

    @property
    def single(self) -> list[int]:
        """The axes along which it is a stack of hub tensors: layer, expert, half."""
        return [axis for axis, letter in enumerate(self.axes) if axis < self.stacked or letter == "2"]

    @property
    def row_step(self) -> int:
        """Hub rows per index of `rows_axis`: a head's rows belong together."""
        return self.shape[self.rows_axis + 1] if self.axes[self.rows_axis] in "NK" else 1

    @property
    def targets(self) -> tuple[str, ...]:
        """What lora.TARGETS calls its halves; empty where it takes no adapter."""
        name = self.path.removeprefix("layers.")
        return ("moe.w1", "moe.w3") if name == "moe.w13" else (name,) if name in (*TARGETS, ROUTER_TARGET) else ()


@dataclass(frozen=True)
class Slot:
    """The part of a leaf that is one hub tensor, of hub shape `shape`."""

    leaf: Leaf
    layer: int
    expert: int
    half: int
    name: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cols(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def meaning(self) -> tuple[str, int, int, int]:
        """What the same slots of models of different shape share."""
        return self.leaf.path, self.layer, self.expert, self.half

    def box(self, start: int, stop: int) -> tuple[int | slice, ...]:
        """Index into the leaf of hub rows start ... stop - 1; both are multiples of `leaf.row_step`."""
        leaf = self.leaf
        index: list[int | slice] = [slice(None)] * len(leaf.shape)
        index[leaf.rows_axis] = slice(start // leaf.row_step, stop // leaf.row_step)
        for axis, letter in enumerate(leaf.axes):
            if letter == "L":
                index[axis] = self.layer
            elif axis < leaf.stacked:
                index[axis] = self.expert
            elif letter == "2":
                index[axis] = self.half
        return tuple(index)

    def to_native(self, block: np.ndarray) -> np.ndarray:
        """Hub rows, (rows, cols) or (rows,), as the box that they fill (a view where numpy can)."""
        if not self.leaf.transposed:
            return block
        lengths = zip(self.box(0, block.shape[0]), self.leaf.shape, strict=True)
        return block.T.reshape([len(range(*i.indices(n))) for i, n in lengths if isinstance(i, slice)])

    def to_hub(self, box: np.ndarray) -> np.ndarray:
        """Inverse of `to_native`, contiguous."""
        return blocked_transpose(box.reshape(self.cols, -1)) if self.leaf.transposed else box


@dataclass(frozen=True)
class Place:
    """Where a file layout keeps a slot: rows `first_row` and on of the tensor `name`, seen as a matrix.

    `shape` is the tensor's shape on disk. `columns`: which of its columns, where others lie between.
    `interleaved_heads`: that many heads whose rotary pairs are adjacent. `flipped`: the region holds the transpose of
    the hub matrix.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int = 0
    columns: slice | None = None
    interleaved_heads: int = 0
    flipped: bool = False

    @property
    def plain(self) -> bool:
        """Whether the rows on disk are those of the hub, so that any of them can be read alone."""
        return not self.flipped and not self.interleaved_heads and self.columns is None


def leaves(config: MixtralConfig, lora: LoraConfig | None = None) -> list[Leaf]:
    """Every native leaf of a model of this shape; with `lora`, of its adapters alone."""
    c = config
    L, D, F, V, E = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size, c.num_local_experts
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layer = "model.layers.{layer}."
    moe = layer + ("mlp." if c.is_dense else "block_sparse_moe.experts.{expert}.")
    w1, w2, w3 = ("gate_proj", "down_proj", "up_proj") if c.is_dense else ("w1", "w2", "w3")
    rows = [
        Leaf("embed.weight", (V, D), "VD", ("model.embed_tokens.weight",), 0, transposed=False),
        Leaf("layers.attention_norm.scale", (L, D), "LD", (layer + "input_layernorm.weight",), 1, transposed=False),
        Leaf("layers.attention.query", (L, D, N, H), "LDNH", (layer + "self_attn.q_proj.weight",), 2),
        Leaf("layers.attention.key", (L, D, K, H), "LDKH", (layer + "self_attn.k_proj.weight",), 2),
        Leaf("layers.attention.value", (L, D, K, H), "LDKH", (layer + "self_attn.v_proj.weight",), 2),
        Leaf("layers.attention.output", (L, N, H, D), "LNHD", (layer + "self_attn.o_proj.weight",), 3),
        Leaf("layers.moe_norm.scale", (L, D), "LD", (layer + "post_attention_layernorm.weight",), 1, transposed=False),
        Leaf(ROUTER, (L, D, E), "LDE", (layer + "block_sparse_moe.gate.weight",), 2),
        Leaf("layers.moe.w13", (L, E, D, 2, F), "LED2F", (f"{moe}{w1}.weight", f"{moe}{w3}.weight"), 4),
        Leaf("layers.moe.w2", (L, E, F, D), "LEFD", (f"{moe}{w2}.weight",), 3),
        Leaf("norm.scale", (D,), "D", ("model.norm.weight",), 0, transposed=False),
        Leaf("head.weight", (D, V), "DV", ("lm_head.weight",), 1),
    ]
    absent = ({ROUTER} if c.is_dense else set()) | ({"head.weight"} if c.tie_word_embeddings else set())
    rows = [row for row in rows if row.path not in absent]
    if lora is None:
        return rows
    return [part for row in rows for half in range(len(row.targets)) for part in _adapter(row, half, lora)]


def _adapter(leaf: Leaf, half: int, lora: LoraConfig) -> list[Leaf]:
    """A and B of one half of a leaf, if it is adapted: PEFT's are (r, in) and (out, r), ours (in, r) and (r, out)."""
    if not lora.adapts(leaf.targets[half]):
        return []
    s, rows, last = leaf.stacked, leaf.rows_axis, leaf.rows_axis + (2 if leaf.axes[leaf.rows_axis] in "NK" else 1)
    inside = [i for i in range(s, len(leaf.axes)) if not rows <= i < last and leaf.axes[i] != "2"]
    stack, path = leaf.shape[:s], f"layers.{leaf.targets[half]}_lora"
    a_shape = (*stack, *(leaf.shape[i] for i in inside), lora.rank)
    a_axes = leaf.axes[:s] + "".join(leaf.axes[i] for i in inside) + "r"
    b_axes = f"{leaf.axes[:s]}r{leaf.axes[rows:last]}"
    module = PEFT + leaf.names[half].removesuffix(".weight")
    return [
        Leaf(f"{path}.a", a_shape, a_axes, (module + A,), len(a_shape) - 1),
        Leaf(f"{path}.b", (*stack, lora.rank, *leaf.shape[rows:last]), b_axes, (module + B,), s + 1),
    ]


def slots(config: MixtralConfig, lora: LoraConfig | None = None) -> list[Slot]:
    """Every hub tensor of `leaves`, in the order of the model: embedding, layer by layer, head."""
    out = []
    for leaf in leaves(config, lora):
        layers, experts = (*leaf.shape[: leaf.stacked], 1, 1)[:2]
        for layer in range(layers):
            for expert in range(experts):
                for half, name in enumerate(leaf.names):
                    hub = name.format(layer=layer, expert=expert)
                    out.append(Slot(leaf, layer, expert, half, hub, _hub_shape(leaf)))
    order = {"embed.weight": -1, "norm.scale": config.num_hidden_layers, "head.weight": config.num_hidden_layers}
    return sorted(out, key=lambda slot: order.get(slot.leaf.path, slot.layer))


def count_slots(config: MixtralConfig) -> int:
    """How many `slots` would be."""
    return sum(math.prod(leaf.shape[axis] for axis in leaf.single) for leaf in leaves(config))


def _hub_shape(leaf: Leaf) -> tuple[int, ...]:
    kept = [n for n, letter in zip(leaf.shape[leaf.stacked :], leaf.axes[leaf.stacked :], strict=True) if letter != "2"]
    if len(kept) == 1 or not leaf.transposed:
        return tuple(kept)
    rows = leaf.shape[leaf.rows_axis] * leaf.row_step
    return rows, int(np.prod(kept)) // rows


def check_arrays(
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[tuple[int, ...], str]],
    where: str,
    described: str,
    ask: str,
) -> None:
    """Every array that is expected is found (shape, place), in its shape, and no other.

    Raises:
        ValueError: `where` does not match what is `described`, with both lists; or a shape is not what that asks for.
    """
    missing, unexpected = [n for n in expected if n not in found], [n for n in found if n not in expected]
    if missing or unexpected or not expected:
        raise ValueError(
            f"{where} does not match {described}: missing tensors {_listed(missing)}; unexpected {_listed(unexpected)}"
        )
    for name, shape in expected.items():
        has, place = found[name]
        if has != shape:
            raise ValueError(f"{name} in {place} has shape {list(has)}, {ask.format(list(shape))}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (f", ... ({len(names) - 8} more)" if len(names) > 8 else "")
    return f"{len(names)}" + (f" ({shown})" if names else "")


def blocked_transpose(matrix: np.ndarray) -> np.ndarray:
    """matrix.T as a contiguous copy; several times faster than numpy's on matrices that exceed the cache."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for a in range(0, matrix.shape[0], 1024):
        for b in range(0, matrix.shape[1], 32):
            out[b : b + 32, a : a + 1024] = matrix[a : a + 1024, b : b + 32].T
    return out
