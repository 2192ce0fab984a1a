"""AdamW (1711.05101, algorithm 2) in numpy float64, one leaf and one update at a time."""

import numpy as np


def adamw(p, m, v, g, t, *, lr, b1, b2, eps, decay):
    """Parameter and moments after update number t = 1, 2, ...; `decay` is decoupled."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p - lr * (direction + decay * p), m, v
