"""Bookkeeping of expert dispatch in numpy, one choice at a time."""

import numpy as np


def sorted_rows(expert_MC, experts):
    """(choices in the order of their experts, rows of each expert); choices of no expert are left out."""
    order = [
        m * expert_MC.shape[1] + c
        for e in range(experts)
        for m in range(len(expert_MC))
        for c in range(expert_MC.shape[1])
        if expert_MC[m, c] == e
    ]
    return order, [int((expert_MC == e).sum()) for e in range(experts)]


def limit(expert_MC, gate_MC, experts, capacity, order):
    """Each expert takes `capacity` choices in the order of their standing; the others become `experts`."""
    standing = {
        "probability": lambda m, c: (-gate_MC[m, c], m, c),  # the largest gates
        "choice": lambda m, c: (c, m),  # first choices of all tokens, then second ones
        "token": lambda m, c: (m, c),
    }[order]
    out, taken = np.array(expert_MC), [0] * experts
    for m, c in sorted(np.ndindex(*expert_MC.shape), key=lambda place: standing(*place)):
        e = expert_MC[m, c]
        if e < experts:
            out[m, c] = e if taken[e] < capacity else experts
            taken[e] += 1
    return out


def grouped_matmul(x_RD, w_EDF, sizes_E, g_RF):
    """y, dx and dw of sum(y * g), row by row in float64; rows behind the last group give and get nothing."""
    x, w, g = (np.asarray(a, np.float64) for a in (x_RD, w_EDF, g_RF))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    row = 0
    for e, size in enumerate(sizes_E):
        for _ in range(size):
            y[row], dx[row] = x[row] @ w[e], w[e] @ g[row]
            dw[e] += np.outer(x[row], g[row])
            row += 1
    return y, dx, dw


def rounds(expert_GSR, experts, factor):
    """Rounds of buffers of factor * R rows, for the R choices of each device S of groups G: as many for all."""
    _, devices, choices = expert_GSR.shape
    needed = 1
    for group in expert_GSR:
        for device in range(devices):
            rows = sum(e < experts and e * devices // experts == device for e in group.reshape(-1).tolist())
            needed = max(needed, -(-rows // int(np.ceil(factor * choices))))
    return needed
