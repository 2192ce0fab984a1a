"""More tokens in the vocabulary: new rows of embedding and head are the mean of the old ones."""

import os
import threading
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.atomic import check_destination
from mixtral_jax.convert.pipeline import open_source, write_alike
from mixtral_jax.convert.table import Slot
from mixtral_jax.convert.wrapped import WrappedSource

_VOCABULARY = ("embed.weight", "head.weight")
_ROWS = 1024


def resize_vocab(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    vocab_size: int,
    force: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint `src` with `vocab_size` tokens to `dst`, in the format of `src`.

    The mean of the old rows is a new token's best guess: its logit is the mean of the others'. Nothing is padded on
    disk, whatever the mesh.

    Raises:
        ValueError: fewer tokens than there are, or the source is not whole.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force)
    inner = open_source(src)
    old = inner.config.vocab_size
    if vocab_size < old:
        raise ValueError(f"vocab_size {vocab_size} is smaller than the {old} of {src}: rows are added, never removed")
    write_alike(ResizedSource(inner, vocab_size), inner, dst, force=force, progress=progress)


class ResizedSource(WrappedSource):
    """A source with more rows in embedding and head."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        super().__init__(inner, MixtralConfig(**inner.config.model_dump() | {"vocab_size": vocab_size}))
        self._means: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        if slot.leaf.path not in _VOCABULARY:
            return super().read(slot, start, stop)
        old = self.origin(slot).rows
        parts = []
        if start < old:
            parts.append(super().read(slot, start, min(stop, old)))
        if stop > old:
            parts.append(np.tile(self._mean(slot), (stop - max(start, old), 1)))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _mean(self, slot: Slot) -> np.ndarray:
        """Mean of the old rows, summed in fp64, in the dtype on disk."""
        with self._lock:
            if slot.name not in self._means:
                origin = self.origin(slot)
                step = self.inner.band(origin) or _ROWS
                total = np.zeros(origin.cols)
                for start in range(0, origin.rows, step):
                    block = self.inner.read(origin, start, min(start + step, origin.rows))
                    total += block.sum(axis=0, dtype=np.float64)
                self._means[slot.name] = (total / origin.rows).astype(self.dtype(slot))
            return self._means[slot.name]
