"""Attention one query at a time, in float64 numpy, with its gradients written out: slow and obvious."""

import numpy as np


def mask_matrix(q_positions, kv_positions, q_segments, kv_segments, window):
    """(T, S) of 0 and 1 for one row of a batch, entry by entry from the definition."""
    mask = np.zeros((len(q_positions), len(kv_positions)), int)
    for t in range(len(q_positions)):
        for s in range(len(kv_positions)):
            same = q_segments[t] == kv_segments[s] and q_segments[t] != 0
            distance = int(q_positions[t]) - int(kv_positions[s])
            mask[t, s] = same and distance >= 0 and (window is None or distance < window)
    return mask


def attention(q, k, v, mask, g):
    """Output and gradients (dq, dk, dv) of sum(output * g); q, g (B, T, N, H), k, v (B, S, K, H), mask (B, T, S)."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    (B, T, N, H), group = q.shape, q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        if len(seen) == 0:
            continue
        keys, values = k[b, seen, n // group], v[b, seen, n // group]
        scores = keys @ q[b, t, n] / np.sqrt(H)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        out[b, t, n] = p @ values
        dp = values @ g[b, t, n]
        ds = p * (dp - p @ dp) / np.sqrt(H)
        dq[b, t, n] = ds @ keys
        dk[b, seen, n // group] += np.outer(ds, q[b, t, n])
        dv[b, seen, n // group] += np.outer(p, g[b, t, n])
    return out, dq, dk, dv
