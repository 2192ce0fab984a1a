"""Checkpoints changed on the way: an adapter merged, a vocabulary resized, a dense model upcycled."""

import functools
import os
import threading
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.adapter import AdapterSource, check_same_model
from mixtral_jax.convert.atomic import check_destination
from mixtral_jax.convert.files import PathLike
from mixtral_jax.convert.identity import check_identity
from mixtral_jax.convert.peft import open_adapter
from mixtral_jax.convert.pipeline import open_base, open_hf, open_source, write_like, write_orbax
from mixtral_jax.convert.stream import ChangedSource, Source, bands
from mixtral_jax.convert.table import PEFT, ROUTER, A, B, Slot, slots
from mixtral_jax.seeds import hashed


def merge_lora(src: PathLike, dst: PathLike, *, adapter: PathLike, force: bool = False, progress: bool = True) -> None:
    """Write the checkpoint `src` with `adapter` folded in to `dst`, in the format and dtypes of `src`.

    Each product is made in fp32 and added in fp32; the sum is rounded once.

    Args:
        src: the base, a checkpoint of any kind.
        adapter: a directory of ours, a step of a LoRA run, or a PEFT directory.

    Raises:
        ValueError: one of the two is not whole, or the adapter belongs to another base.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, adapter, force=force)
    model = open_source(src)
    change = open_adapter(adapter, model.config)
    model = open_base(src, change.base_noted)
    check_same_model(model.config, change, os.fspath(src))
    check_identity(change.base_noted, model, os.fspath(src))
    write_like(model, MergedSource(model, change), dst, force=force, progress=progress)


class MergedSource(ChangedSource):
    """A model whose adapted hub matrices are W + s (A B)^T; what the adapter holds whole takes the place of W."""

    def __init__(self, model: Source, adapter: AdapterSource) -> None:
        rows = (adapter if adapter.longer else model).config.vocab_size
        config = model.config.model_copy(update={"vocab_size": rows})
        super().__init__(model, config, slots(config))
        self._adapter, self._parts = adapter, {slot.name: slot for slot in adapter.slots}
        self._factor = functools.lru_cache(maxsize=32)(self._read_factor)

    def template(self) -> Any:
        return self._adapter.template() or super().template()

    def _module(self, slot: Slot) -> str | None:
        """What PEFT calls an adapted matrix."""
        module = PEFT + slot.name.removesuffix(".weight")
        return module if module + A in self._parts else None

    def _read_factor(self, name: str) -> np.ndarray:
        slot = self._parts[name]
        return self._adapter.read(slot, 0, slot.rows).astype(np.float32)

    def cost(self, slot: Slot) -> int:
        rows = bands(slot, self.dtype(slot).itemsize, self.band(slot))
        return super().cost(slot) + (12 * rows * slot.cols if self._module(slot) else 0)  # three of them in fp32

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        if slot.name in self._parts:
            return self._adapter.read(self._parts[slot.name], start, stop).astype(self.dtype(slot))
        block, module = super().read(slot, start, stop), self._module(slot)
        if module is None:
            return block
        a_rI, b_Or = self._factor(module + A), self._factor(module + B)
        change = b_Or[start:stop] @ a_rI * np.float32(self._adapter.lora.scale)
        return (block.astype(np.float32) + change).astype(block.dtype)


_VOCABULARY = ("embed.weight", "head.weight")
_ROWS = 1024


def resize_vocab(src: PathLike, dst: PathLike, *, vocab_size: int, force: bool = False, progress: bool = True) -> None:
    """Write the checkpoint `src` with `vocab_size` tokens to `dst`, in the format of `src`.

    The mean of the old rows is a new token's best guess: its logit is the mean of the others'. Nothing is padded on
    disk, whatever the mesh.

    Raises:
        ValueError: fewer tokens than there are, or the source is not whole.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force=force)
    model = open_source(src)
    old = model.config.vocab_size
    if vocab_size < old:
        raise ValueError(f"vocab_size {vocab_size} is smaller than the {old} of {src}: rows are added, never removed")
    write_like(model, ResizedSource(model, vocab_size), dst, force=force, progress=progress)


class ResizedSource(ChangedSource):
    """A model with more rows in embedding and head."""

    def __init__(self, model: Source, vocab_size: int) -> None:
        config = model.config.model_copy(update={"vocab_size": vocab_size})
        super().__init__(model, config, slots(config))
        self._means: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        old = self.origin(slot).rows
        if stop <= old or slot.leaf.path not in _VOCABULARY:
            return super().read(slot, start, stop)
        added = np.tile(self._mean(slot), (stop - max(start, old), 1))
        return added if start >= old else np.concatenate([super().read(slot, start, old), added])

    def _mean(self, slot: Slot) -> np.ndarray:
        """Mean of the old rows, summed in fp64, in the dtype on disk."""
        with self._lock:
            if slot.name not in self._means:
                origin = self.origin(slot)
                step = self.band(slot) or _ROWS
                total = np.zeros(origin.cols)
                for start in range(0, origin.rows, step):
                    block = super().read(slot, start, min(start + step, origin.rows))
                    total += block.sum(axis=0, dtype=np.float64)
                self._means[slot.name] = (total / origin.rows).astype(self.dtype(slot))
            return self._means[slot.name]


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_EXPERTS = ("layers.moe.w13", "layers.moe.w2")


def upcycle(
    src: PathLike,
    dst: PathLike,
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
    check_destination(dst, src, force=force, local=True)
    dense = open_hf(src, ("mistral", "llama"))
    if not dense.config.is_dense:
        raise ValueError(f"{src} is a mixture of experts already")
    write_orbax(UpcycledSource(dense, experts, top_k, noise, seed), dst, force=force, progress=progress)


class UpcycledSource(ChangedSource):
    """The dense model as a mixture of experts."""

    def __init__(self, dense: Source, experts: int, top_k: int, noise: float, seed: int) -> None:
        changed: dict[str, Any] = {
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "router_aux_loss_coef": MixtralConfig.model_fields["router_aux_loss_coef"].default,
        }
        config = dense.config.model_copy(update=changed)
        super().__init__(dense, config, slots(config))
        self.hf_config = {k: dense.hf_config[k] for k in _TOKEN_IDS if k in dense.hf_config}
        self._noise, self._seed = noise, seed if seed >= 0 else hashed(seed)

    def origin(self, slot: Slot) -> Slot:
        if slot.leaf.path == ROUTER:  # of the experts' dtype
            return self.there["layers.moe.w2", slot.layer, 0, 0]
        return self.there[slot.leaf.path, slot.layer, 0, slot.half]

    def band(self, slot: Slot) -> int | None:
        return slot.rows if slot.leaf.path == ROUTER else super().band(slot)

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        if slot.leaf.path == ROUTER:
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
