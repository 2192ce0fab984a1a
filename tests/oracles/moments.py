"""Moments in 8 bits and in bf16, in numpy: a table of levels, and one number after the other rounded to one of two."""

import numpy as np


def levels(count: int) -> np.ndarray:
    """The `count` largest numbers up to 1 of the form (8 + f) / 8 * 2^e, f = 0 ... 7, ascending."""
    every = {(8 + f) / 8 * 2.0**e for f in range(8) for e in range(-40, 1)}
    return np.array(sorted(x for x in every if x <= 1)[-count:])


M_LEVELS = np.concatenate([[0.0], levels(127)])  # and a sign
V_LEVELS = levels(256)


def round_to(x: float, table: np.ndarray, u: float) -> int:
    """The index of the level below x, or of the one above where u >= 1 - p; p is how far x is on the way to it."""
    x = min(max(x, table[0]), table[-1])
    below = int(np.searchsorted(table, x, side="right")) - 1
    if table[below] == x:
        return below
    p = (x - table[below]) / (table[below + 1] - table[below])
    return below + (u >= 1 - p)


def block_write(block: np.ndarray, random: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """(codes, scale) of fp32 numbers; `random` are integers below 2^16."""
    scale = np.float32(max(abs(block)))
    if scale == 0:
        return np.zeros(len(block), int), scale
    codes = [
        int(np.copysign(round_to(float(np.float32(abs(x)) / scale), table, (16 * int(r) + 8) / 2**20), x))
        for x, r in zip(block, random, strict=True)
    ]
    return np.array(codes), scale


def block_read(codes: np.ndarray, scale: np.float32, table: np.ndarray) -> np.ndarray:
    """What codes stand for."""
    return np.sign(np.where(table[0] > 0, 1, codes)) * table[np.abs(codes)] * scale


def bfloat16(x: np.float32, random: int) -> np.float32:
    """The bf16 below |x| or the one above, with x's sign: 16 random bits are added behind those that it keeps."""
    bits = int(np.float32(x).view(np.uint32)) + random
    return np.uint32(bits >> 16 << 16).view(np.float32)
