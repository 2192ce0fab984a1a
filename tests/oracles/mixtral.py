"""The model once more, in float64 torch, one token and one expert at a time: slow and obvious.

Written from the papers' formulas, not from the code under test; torch's autograd gives the gradients. Weights come as
the native parameter tree.
"""

import numpy as np

from tests.optional import torch
from tests.oracles.moe import limit


def tensors(tree, grad=True):
    """A tree of arrays as float64 tensors that collect gradients."""
    if isinstance(tree, dict):
        return {k: tensors(v, grad) for k, v in tree.items()}
    return torch.tensor(tree, dtype=torch.float64).requires_grad_(grad)


def grads(tree):
    """The gradients of such a tree, as numpy; zeros where nothing flowed."""
    if isinstance(tree, dict):
        return {k: grads(v) for k, v in tree.items()}
    return (torch.zeros_like(tree) if tree.grad is None else tree.grad).numpy()


def rms_norm(x, scale, eps):
    return scale * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x_H, position, theta):
    """Dimensions i and i + H/2 turned by position * theta^(-2i/H), pair by pair."""
    H = len(x_H)
    out = [None] * H
    for i in range(H // 2):
        angle = torch.tensor(position * theta ** (-2 * i / H), dtype=torch.float64)
        a, b = x_H[i], x_H[i + H // 2]
        out[i] = a * torch.cos(angle) - b * torch.sin(angle)
        out[i + H // 2] = b * torch.cos(angle) + a * torch.sin(angle)
    return torch.stack(out)


def attention(x_TD, weights, positions, segments, theta, window):
    """One row. Query t sees the keys of its own document at positions p - window + 1 ... p."""
    q, k, v = (torch.einsum("td,dnh->tnh", x_TD, weights[name]) for name in ("query", "key", "value"))
    T, N, H = q.shape
    group = N // k.shape[1]
    q = torch.stack([torch.stack([rotate(q[t, n], positions[t], theta) for n in range(N)]) for t in range(T)])
    k = torch.stack([torch.stack([rotate(h, positions[t], theta) for h in k[t]]) for t in range(T)])
    rows = []
    for t in range(T):
        seen = [
            s for s in range(T)
            if segments[s] == segments[t] != 0 and 0 <= positions[t] - positions[s] < (window or 10**9)
        ]  # fmt: skip
        heads = []
        for n in range(N):
            if not seen:
                heads.append(torch.zeros(H, dtype=torch.float64))
                continue
            scores = torch.stack([q[t, n] @ k[s, n // group] / H**0.5 for s in seen])
            p = torch.softmax(scores, 0)
            heads.append(sum(p[i] * v[s, n // group] for i, s in enumerate(seen)))
        rows.append(torch.einsum("nh,nhd->d", torch.stack(heads), weights["output"]))
    return torch.stack(rows)


def expert(x_D, w13_D2F, w2_FD):
    """w2( silu(w1 x) * w3 x )."""
    gate, up = x_D @ w13_D2F[:, 0], x_D @ w13_D2F[:, 1]
    return (gate * torch.sigmoid(gate) * up) @ w2_FD


def choose(probs_E, k):
    """The k most likely experts, best first, the lowest index first among equals."""
    return sorted(range(len(probs_E)), key=lambda e: (-float(probs_E[e].detach()), e))[:k]


def moe(x_MD, weights, k, valid, capacity=None, order="probability"):
    """(output, statistics of the layer); an expert takes at most `capacity` choices, in `order`."""
    E = weights["router"].shape[1]
    counts = torch.zeros(E, dtype=torch.float64)
    probs_sum, z, entropy, dropped = torch.zeros(E, dtype=torch.float64), 0.0, 0.0, [0] * k
    rows, kept = [], _kept(x_MD, weights, k, valid, capacity, order)
    for m, (x_D, is_token) in enumerate(zip(x_MD, valid, strict=True)):
        row = torch.zeros_like(x_D)
        if is_token:
            logits = x_D @ weights["router"]
            probs = torch.softmax(logits, 0)
            chosen = choose(probs, k)
            total = sum(probs[e] for e in chosen)
            for c, e in enumerate(chosen):
                counts[e] += 1
                if kept is not None and kept[m, c] != e:
                    dropped[c] += 1
                    continue
                row = row + probs[e] / total * expert(x_D, weights["w13"][e], weights["w2"][e])
            probs_sum = probs_sum + probs
            z = z + torch.logsumexp(logits, 0) ** 2
            entropy = entropy - (probs * torch.log(probs)).sum()
        rows.append(row)
    drops = dict(dropped=sum(dropped), dropped_first=dropped[0])
    return torch.stack(rows), dict(counts=counts, probs=probs_sum, z=z, entropy=entropy, **drops)


def _kept(x_MD, weights, k, valid, capacity, order):
    """Experts (M, k), or their number where the choice is dropped or the token is padding."""
    if capacity is None:
        return None
    E = weights["router"].shape[1]
    expert, gate = np.full((len(x_MD), k), E), np.zeros((len(x_MD), k))
    for m in np.flatnonzero(valid):
        probs = torch.softmax(x_MD[m] @ weights["router"], 0).detach()
        expert[m] = choose(probs, k)
        total = sum(probs[i] for i in expert[m]) if k > 1 else 1  # the only gate would be 1, whatever the token
        gate[m] = [float(probs[e] / total) for e in expert[m]]
    return limit(expert, gate, E, capacity, order)


def switch_balance(counts_E, probs_E, tokens, k):
    """Switch 2101.03961 eq. 4 for top-k, of one layer: E/k * sum over experts of f P; 1 when balanced."""
    return len(counts_E) / k * sum(c / tokens * (p / tokens) for c, p in zip(counts_E, probs_E, strict=True))


def pooled_balance(counts_LE, probs_LE, tokens, k):
    """As transformers: E * sum of f P over the tokens of all layers together; k when balanced."""
    L, E = len(counts_LE), len(counts_LE[0])
    total = 0.0
    for e in range(E):
        f = sum(counts_LE[i][e] for i in range(L)) / (L * tokens)
        p = sum(probs_LE[i][e] for i in range(L)) / (L * tokens)
        total = total + E * f * p
    return total


def hidden(params, config, tokens, positions, segments):
    """Last hidden states of one batch (B, T, D), and each layer's router statistics summed over the batch."""
    x = params["embed"]["weight"][torch.tensor(tokens, dtype=torch.long)]
    B, T, D = x.shape
    layers, every = params["layers"], []
    for i in range(config.num_hidden_layers):
        at = lambda tree: {k: v[i] for k, v in tree.items()}  # noqa: B023, E731 - used within this turn only
        normed = rms_norm(x, layers["attention_norm"]["scale"][i], config.rms_norm_eps)
        x = x + torch.stack([
            attention(normed[b], at(layers["attention"]), positions[b], segments[b], config.rope_theta,
                      config.sliding_window)
            for b in range(B)
        ])  # fmt: skip
        normed = rms_norm(x, layers["moe_norm"]["scale"][i], config.rms_norm_eps).reshape(-1, D)
        weights = at(layers["moe"])
        if config.num_local_experts == 1:
            y = torch.stack([expert(row, weights["w13"][0], weights["w2"][0]) for row in normed])
        else:
            valid = [s > 0 for row in segments for s in row]
            y, stats = moe(normed, weights, config.num_experts_per_tok, valid)
            every.append(stats)
        x = x + y.reshape(B, T, D)
    return rms_norm(x, params["norm"]["scale"], config.rms_norm_eps), every


def head(params):
    """The output matrix (D, V)."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"].T


def cross_entropy(x_MD, w_DV, targets, weights):
    """(sum of w * nll, log-probabilities of the targets), token by token."""
    logps = torch.stack([torch.log_softmax(x @ w_DV, 0)[t] for x, t in zip(x_MD, targets, strict=True)])
    return -sum(w * lp for w, lp in zip(weights, logps, strict=True)), logps
