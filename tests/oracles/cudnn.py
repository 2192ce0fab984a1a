"""What cuDNN is asked for, in numpy: one sequence after another by its offset and length in flat memory.

What belongs to no sequence is NaN, as memory that nobody wrote may be.
"""

import numpy as np

from tests.oracles.attention import attention


def _spans(x, offsets, lengths):
    """(first, stop) of each sequence in tokens of x (B, T, N, H), from offsets in elements of it."""
    stride = x.shape[2] * x.shape[3]
    offsets = np.asarray(offsets, np.int64).reshape(-1)
    assert not (offsets % stride).any() and (offsets >= 0).all() and (offsets <= x.size).all()
    return [(o // stride, o // stride + n) for o, n in zip(offsets, np.asarray(lengths).reshape(-1), strict=False)]


def _masks(n, window):
    distance = np.arange(n)[:, None] - np.arange(n)[None]
    return ((distance >= 0) & (distance < (window or n)))[None].astype(int)


def ragged_attention(q, k, v, sequences, window, g=None):
    """Output and statistics (B * M, N, T), or with g the gradients of q, k and v."""
    lengths, q_offsets, kv_offsets = sequences
    B, T, N, _ = q.shape
    assert lengths.shape[0] == B and q_offsets.shape == kv_offsets.shape == (B, lengths.shape[1] + 1)
    flat = [np.asarray(x, np.float64).reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
    g = np.zeros(q.shape) if g is None else np.asarray(g, np.float64)
    results = [np.full(x.shape, np.nan) for x in (flat[0], *flat)]
    statistics = np.full((lengths.size, N, T), np.nan)
    spans = zip(_spans(q, q_offsets, lengths), _spans(k, kv_offsets, lengths), strict=True)
    for number, ((first, stop), (k_first, k_stop)) in enumerate(spans):
        at, k_at = slice(first, stop), slice(k_first, k_stop)
        mask = _masks(stop - first, window)
        parts = flat[0][:, at], flat[1][:, k_at], flat[2][:, k_at], mask, g.reshape(flat[0].shape)[:, at]
        for result, part, where in zip(results, attention(*parts), (at, at, k_at, k_at), strict=True):
            result[:, where] = part
        keys = np.repeat(parts[1][0], N // k.shape[2], axis=1)
        scores = np.einsum("tnh,snh->nts", parts[0][0], keys) / np.sqrt(q.shape[3])
        scores = np.where(mask, scores, -np.inf)
        if stop > first:
            statistics[number, :, : stop - first] = np.log(np.exp(scores).sum(-1))
    out, *gradients = (r.reshape(x.shape).astype(np.float32) for r, x in zip(results, (q, q, k, v), strict=True))
    return out, statistics.astype(np.float32), tuple(gradients)
