"""A checkpoint of any kind as a model, and a model as a Hugging Face directory."""

import os
from typing import Any

import numpy as np

from mixtral_jax.convert.hf import HfSource
from mixtral_jax.convert.table import leaves, nest


def load_params(path: str | os.PathLike[str], dtype: Any = None) -> dict[str, Any]:
    """The parameters of a Hugging Face directory as a nested dict of numpy arrays, the native tree.

    `dtype` (a numpy dtype) casts every leaf; None keeps the dtype on disk. Holds the whole model in memory.
    """
    source = HfSource(path)
    flat: dict[str, np.ndarray] = {}
    shapes = {leaf.path: leaf.shape for leaf in leaves(source.config)}
    for slot in source.slots:
        name = slot.leaf.path
        if name not in flat:
            flat[name] = np.empty(shapes[name], dtype or source.dtype(slot))
        flat[name][slot.box(0, slot.rows)] = slot.to_native(source.read(slot, 0, slot.rows))
    return nest(flat)
