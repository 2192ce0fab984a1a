"""A source that changes another one on the way; see upcycle.py and resize.py."""

from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
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
