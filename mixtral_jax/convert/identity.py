"""Which weights are these? A digest of their values, the same in every format."""

import hashlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mixtral_jax.convert.stream import Source, bands
from mixtral_jax.convert.table import Slot

WHOLE = 1 << 29  # parameters up to which every value counts; training moves all of a larger model's matrices


def weights_identity(source: Source) -> str:
    """Of the values rounded to bfloat16, so that a copy of the same weights in another precision is the same."""
    leaves: dict[str, list[Slot]] = {}
    for slot in sorted(source.slots, key=lambda slot: slot.name):
        leaves.setdefault(slot.leaf.path, []).append(slot)
    digest = hashlib.blake2b(digest_size=12)
    for own in leaves.values():
        # of a large one the first, the middle and the last of all layers and experts
        some = {0, len(own) // 2, len(own) - 1} if source.config.num_params() > WHOLE else range(len(own))
        for slot in (own[i] for i in sorted(some)):
            digest.update(f"{slot.name} {slot.shape}".encode())
            step = bands(slot, source.dtype(slot).itemsize, source.band(slot))
            for start in range(0, slot.rows, step):
                block = source.read(slot, start, min(start + step, slot.rows))
                digest.update(np.ascontiguousarray(block, ml_dtypes.bfloat16).view(np.uint16).data)
    return digest.hexdigest()


def check_identity(noted: Mapping[str, Any] | None, source: Source, where: str) -> None:
    """Raises: ValueError where the weights at `where` are not those that a run noted as its base."""
    if noted and noted.get("digest") and noted["digest"] != (found := weights_identity(source)):
        step = "" if noted.get("step") is None else f" at step {noted['step']}"
        raise ValueError(
            f"{where} holds weights with digest {found}, but the run stands on those of {noted['path']}{step} with "
            f"digest {noted['digest']}: name a copy of these, or train anew under another run_name"
        )
