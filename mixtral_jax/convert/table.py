"""One table between the native parameter tree and the tensors on disk, read in both directions.

A native leaf stacks what Hugging Face keeps apart: all layers, all experts, and the two halves of the gated
feed-forward. A `Slot` is the part of a leaf that is one hub tensor; a hub matrix is (out, in), ours is (in, out).
A `Place` says where a file layout keeps that slot, so that other layouts than the hub's read through the same slots.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixtral_jax.config import MixtralConfig

Layout = Literal["hub", "fused", "mistral", "mistral_merged"]


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
    def row_step(self) -> int:
        """Hub rows per index of `rows_axis`: a head's rows belong together."""
        return self.shape[self.rows_axis + 1] if self.axes[self.rows_axis] in "NK" else 1


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

    def box_shape(self, start: int, stop: int) -> tuple[int, ...]:
        """Shape of what `box` selects."""
        lengths = zip(self.box(start, stop), self.leaf.shape, strict=True)
        return tuple(len(range(*i.indices(n))) for i, n in lengths if isinstance(i, slice))

    def to_native(self, block: np.ndarray) -> np.ndarray:
        """Hub rows, (rows, cols) or (rows,), as the box that they fill (a view where numpy can)."""
        if not self.leaf.transposed:
            return block
        return block.T.reshape(self.box_shape(0, block.shape[0]))

    def to_hub(self, box: np.ndarray) -> np.ndarray:
        """Inverse of `to_native` (a view where numpy can)."""
        return box.reshape(self.cols, -1).T if self.leaf.transposed else box


@dataclass(frozen=True)
class Place:
    """Where a file layout keeps a slot: rows `first_row` and on of the tensor `name`, seen as a matrix.

    `shape` is the tensor's shape on disk. `interleaved_heads`: that many heads whose rotary pairs are adjacent.
    `flipped`: the region holds the transpose of the hub matrix.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int = 0
    interleaved_heads: int = 0
    flipped: bool = False


def leaves(config: MixtralConfig) -> list[Leaf]:
    """Every native leaf of a model of this shape."""
    c = config
    L, D, F, V, E = (
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        c.vocab_size,
        c.num_local_experts,
    )
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layer = "model.layers.{layer}."
    moe = layer + ("mlp." if c.is_dense else "block_sparse_moe.experts.{expert}.")
    w1, w2, w3 = ("gate_proj", "down_proj", "up_proj") if c.is_dense else ("w1", "w2", "w3")
    rows = [
        Leaf("embed.weight", (V, D), "VD", ("model.embed_tokens.weight",), 0, transposed=False),
        _norm("layers.attention_norm.scale", (L, D), layer + "input_layernorm.weight"),
        Leaf("layers.attention.query", (L, D, N, H), "LDNH", (layer + "self_attn.q_proj.weight",), 2),
        Leaf("layers.attention.key", (L, D, K, H), "LDKH", (layer + "self_attn.k_proj.weight",), 2),
        Leaf("layers.attention.value", (L, D, K, H), "LDKH", (layer + "self_attn.v_proj.weight",), 2),
        Leaf("layers.attention.output", (L, N, H, D), "LNHD", (layer + "self_attn.o_proj.weight",), 3),
        _norm("layers.moe_norm.scale", (L, D), layer + "post_attention_layernorm.weight"),
        Leaf("layers.moe.router", (L, D, E), "LDE", (layer + "block_sparse_moe.gate.weight",), 2),
        Leaf("layers.moe.w13", (L, E, D, 2, F), "LED2F", (f"{moe}{w1}.weight", f"{moe}{w3}.weight"), 4),
        Leaf("layers.moe.w2", (L, E, F, D), "LEFD", (f"{moe}{w2}.weight",), 3),
        _norm("norm.scale", (D,), "model.norm.weight"),
        Leaf("head.weight", (D, V), "DV", ("lm_head.weight",), 1),
    ]
    absent = ({"layers.moe.router"} if c.is_dense else set()) | ({"head.weight"} if c.tie_word_embeddings else set())
    return [row for row in rows if row.path not in absent]


def _norm(path: str, shape: tuple[int, ...], name: str) -> Leaf:
    return Leaf(path, shape, "LD" if len(shape) == 2 else "D", (name,), len(shape) - 1, transposed=False)


def slots(config: MixtralConfig) -> list[Slot]:
    """Every hub tensor of a model of this shape, in the order of the model: embedding, layer by layer, head."""
    out = []
    for leaf in leaves(config):
        layers, experts = (*leaf.shape[: leaf.stacked], 1, 1)[:2]
        for layer in range(layers):
            for expert in range(experts):
                for half, name in enumerate(leaf.names):
                    hub = name.format(layer=layer, expert=expert)
                    out.append(Slot(leaf, layer, expert, half, hub, _hub_shape(leaf)))
    order = {"embed.weight": -1, "norm.scale": config.num_hidden_layers, "head.weight": config.num_hidden_layers}
    return sorted(out, key=lambda slot: order.get(slot.leaf.path, slot.layer))


def _hub_shape(leaf: Leaf) -> tuple[int, ...]:
    kept = [n for n, letter in zip(leaf.shape[leaf.stacked :], leaf.axes[leaf.stacked :], strict=True) if letter != "2"]
    if len(kept) == 1 or not leaf.transposed:
        return tuple(kept)
    rows = leaf.shape[leaf.rows_axis] * leaf.row_step
    return rows, int(np.prod(kept)) // rows


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
