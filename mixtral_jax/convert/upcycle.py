"""A dense Mistral or Llama becomes a Mixtral (Sparse Upcycling, arXiv 2212.05055, section 3)."""

import os
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.atomic import check_destination
from mixtral_jax.convert.pipeline import check_orbax_destination, open_hf, write_orbax
from mixtral_jax.convert.table import Slot
from mixtral_jax.convert.wrapped import WrappedSource

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
