"""The shapes at which steps are measured: synthetic tokens, fp32, dropless, balance loss on."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """One training step: the model and its batch."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    seq_len: int
    batch: int
    vocab: int = 32000
    experts: int = 8
    top_k: int = 2

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.seq_len * self.batch


SHAPES = {
    "XS": Shape(64, 128, 2, 4, 2, 64, 4, vocab=512),  # to test the benchmark itself
    "S": Shape(256, 896, 8, 8, 2, 256, 8),
    "M": Shape(512, 1792, 8, 16, 4, 512, 4),
    "L": Shape(256, 896, 8, 8, 2, 2048, 1),
    "G": Shape(1024, 3584, 16, 8, 2, 4096, 4),  # 1.5 billion parameters, for one GPU
}
LEARNING_RATE, BALANCE_COEFFICIENT = 1e-3, 0.01


class Options(NamedTuple):
    """How a step is computed: `dtype=bfloat16 attention=dot_product`; each side has its own names of back-ends."""

    dtype: str = "float32"
    attention: str = "auto"
    experts: str = "auto"
    capacity: float | None = None
    autocast: bool = False  # torch's, to bf16
    packing: bool = False  # TRL's
    checkpointing: bool = True  # TRL's

    @classmethod
    def of(cls, words: list[str]) -> "Options":
        """Those that a command line names."""
        named = dict(word.split("=") for word in words)
        flags = dict.fromkeys(("autocast", "packing", "checkpointing"), lambda word: word == "true")
        kinds: dict[str, Callable[[str], Any]] = {"capacity": float, **flags}
        return cls(**{name: kinds.get(name, str)(word) for name, word in named.items()})


def parse(text: str) -> Shape:
    """A shape by name, with changes: `S`, `S:experts=16,batch=4`."""
    name, _, changes = text.partition(":")
    fields = dict(change.split("=") for change in changes.split(",") if change)
    return SHAPES[name]._replace(**{field: int(value) for field, value in fields.items()})
