"""Checkpoints changed on the way: an adapter merged, a vocabulary resized, a dense model upcycled."""

import os
import threading
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.adapter import ROUTER, NativeAdapter, check_same_model, target_of
from mixtral_jax.convert.atomic import check_destination
from mixtral_jax.convert.peft import PeftAdapter, is_peft
from mixtral_jax.convert.pipeline import (
    AnySource,
    check_orbax_destination,
    open_hf,
    open_source,
    write_alike,
    write_orbax,
)
from mixtral_jax.convert.stream import bands
from mixtral_jax.convert.table import Slot, slots


class WrappedSource:
    """`inner` seen as a model of shape `config`; unchanged slots are read from the inner slot of the same place."""

    def __init__(self, inner: Any, config: MixtralConfig) -> None:
        self.inner, self.config = inner, config
        self.directory = inner.directory
        self.hf_config: dict[str, Any] = inner.hf_config
        self.training = getattr(inner, "training", False)
        self.slots = slots(config)
        self._inner_slots = {(s.leaf.path, s.layer, s.expert, s.half): s for s in inner.slots}

    def origin(self, slot: Slot) -> Slot:
        """The inner slot that a slot is read from."""
        return self._inner_slots[slot.leaf.path, slot.layer, slot.expert, slot.half]

    def dtype(self, slot: Slot) -> np.dtype:
        return self.inner.dtype(self.origin(slot))

    def band(self, slot: Slot) -> int | None:
        return self.inner.band(self.origin(slot))

    def cost(self, slot: Slot) -> int:
        return self.inner.cost(self.origin(slot))

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        return self.inner.read(self.origin(slot), start, stop)


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


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROUTER, _EXPERTS = "layers.moe.router", ("layers.moe.w13", "layers.moe.w2")


def upcycle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    experts: int,
    top_k: int,
    noise: float = 0.0,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> None:
    """Every expert starts as the dense feed-forward, the router as normal(initializer_range).

    The gates of the chosen experts sum to 1, so that without noise the outputs at step 0 are those of the dense model.

    Args:
        src: a Hugging Face directory of a Mistral or Llama.
        dst: the new Orbax model directory.
        noise: standard deviation of what is added to each expert, relative to the root mean square of each row.
        seed: of router and noise.

    Raises:
        ValueError: the source is no dense model or not whole, fewer than two experts, or top_k outside 1 ... experts.
        FileExistsError: `dst` exists.
    """
    if experts < 2 or not 1 <= top_k <= experts:
        raise ValueError(f"upcycling needs at least 2 experts and 1 <= top_k <= experts, not {experts} and {top_k}")
    if noise < 0:
        raise ValueError(f"noise ({noise}) must not be negative")
    check_orbax_destination(dst)
    check_destination(dst, src, force)
    dense = open_hf(src, ("mistral", "llama"))
    if not dense.config.is_dense:
        raise ValueError(f"{src} is a mixture of experts already")
    write_orbax(UpcycledSource(dense, experts, top_k, noise, seed), dst, dtype=None, force=force, progress=progress)


class UpcycledSource(WrappedSource):
    """The dense source as a mixture of experts."""

    def __init__(self, dense: Any, experts: int, top_k: int, noise: float, seed: int) -> None:
        fields = dense.config.model_dump() | {
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "router_aux_loss_coef": MixtralConfig.model_fields["router_aux_loss_coef"].default,
        }
        super().__init__(dense, MixtralConfig(**fields))
        self.hf_config = {k: dense.hf_config[k] for k in _TOKEN_IDS if k in dense.hf_config}
        self._noise, self._seed = noise, seed

    def origin(self, slot: Slot) -> Slot:
        path = _EXPERTS[1] if slot.leaf.path == _ROUTER else slot.leaf.path  # the router takes the experts' dtype
        half = 0 if slot.leaf.path == _ROUTER else slot.half
        return self._inner_slots[path, slot.layer, 0, half]

    def band(self, slot: Slot) -> int | None:
        return slot.rows if slot.leaf.path == _ROUTER else super().band(slot)

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        if slot.leaf.path == _ROUTER:
            rng = np.random.default_rng([self._seed, slot.layer])
            values = rng.normal(0.0, self.config.initializer_range, slot.shape)[start:stop]
            return values.astype(self.dtype(slot))
        block = super().read(slot, start, stop)
        if slot.leaf.path not in _EXPERTS or self._noise == 0:
            return block
        rows = block.astype(np.float32)
        scale = self._noise * np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
        # A generator for each row: the noise does not depend on how many rows are read at once.
        keys = (
            [self._seed, slot.layer, slot.expert, 1 + len(slot.leaf.names) + slot.half, r] for r in range(start, stop)
        )
        normal = np.stack([np.random.default_rng(key).standard_normal(slot.cols, np.float32) for key in keys])
        return (rows + scale * normal).astype(block.dtype)
