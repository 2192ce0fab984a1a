"""A checkpoint with an adapter folded into its weights: W + s A B, streamed like every other conversion."""

import os

import numpy as np

from mixtral_jax.convert.adapter import ROUTER, NativeAdapter, check_same_model, target_of
from mixtral_jax.convert.atomic import check_destination
from mixtral_jax.convert.peft_read import PeftAdapter, is_peft
from mixtral_jax.convert.pipeline import AnySource, open_source, write_alike
from mixtral_jax.convert.stream import bands
from mixtral_jax.convert.table import Slot
from mixtral_jax.convert.wrapped import WrappedSource

Path_ = str | os.PathLike[str]


def merge_lora(src: Path_, dst: Path_, *, adapter: Path_, force: bool = False, progress: bool = True) -> None:
    """Write the checkpoint `src` with `adapter` folded in to `dst`, in the format and dtypes of `src`.

    Each product is made in fp32 and added in fp32; the sum is rounded once.

    Args:
        src: the base, a checkpoint of any kind.
        adapter: a directory of ours, a step of a LoRA run, or a PEFT directory.

    Raises:
        ValueError: one of the two is not whole, or the adapter belongs to another base.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force)
    check_destination(dst, adapter, force)
    inner = open_source(src)
    factors = PeftAdapter(adapter, inner.config) if is_peft(adapter) else NativeAdapter(adapter)
    check_same_model(inner.config, factors, os.fspath(src))
    write_alike(MergedSource(inner, factors), inner, dst, force=force, progress=progress)


class MergedSource(WrappedSource):
    """A source whose adapted hub matrices are W + s (A B)^T."""

    def __init__(self, inner: AnySource, adapter: NativeAdapter | PeftAdapter) -> None:
        super().__init__(inner, inner.config)
        self._adapter = adapter
        # A LoRA run may have trained the router itself; it is then taken whole.
        self._router = adapter if isinstance(adapter, NativeAdapter) and adapter.has_router else None

    def _adapted(self, slot: Slot) -> bool:
        target = target_of(slot)
        return target is not None and self._adapter.lora.adapts(target)

    def cost(self, slot: Slot) -> int:
        rows = bands(slot, self.dtype(slot).itemsize, self.band(slot))
        return super().cost(slot) + (12 * rows * slot.cols if self._adapted(slot) else 0)  # three of them in fp32

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        if slot.leaf.path == ROUTER and self._router is not None:
            return self._router.router(slot, start, stop).astype(self.dtype(slot))
        block = super().read(slot, start, stop)
        if not self._adapted(slot):
            return block
        a_Ir, b_rO = (m.astype(np.float32) for m in self._adapter.factors(slot))
        change = b_rO[:, start:stop].T @ a_Ir.T * np.float32(self._adapter.lora.scale)
        return (block.astype(np.float32) + change).astype(block.dtype)
