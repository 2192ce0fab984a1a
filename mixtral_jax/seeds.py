"""Any integer is a seed, and all of its bits count."""

import hashlib

import jax
import numpy as np


def random_key(seed: int) -> jax.Array:
    """The random key of a seed: jax's own below 2^32, which is all that jax looks at; of others by their hash."""
    if 0 <= seed < 1 << 32:
        return jax.random.key(np.uint32(seed))
    high, low = divmod(hashed(seed), 1 << 32)
    return jax.random.fold_in(jax.random.key(np.uint32(low)), np.uint32(high))


def hashed(seed: int) -> int:
    """64 bits of all bits and the sign of an integer."""
    return int.from_bytes(hashlib.sha256(hex(seed).encode()).digest()[:8], "little")
