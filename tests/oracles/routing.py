"""What routers do with text, counted one token at a time."""

import math
from collections import Counter
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from scipy import stats

from tests.oracles.moe import limit


class Piece(NamedTuple):
    """The part of a document that lies in one row, with what the routers say of each of its tokens."""

    document: int
    ids: list
    expert_TLC: np.ndarray
    gate_TLC: np.ndarray
    probs_TLE: np.ndarray
    logits_TLE: np.ndarray


def pieces(documents, seq_len, model):
    """Each piece goes through the model alone, in a row of its own."""
    at, cut = 0, []
    for number, document in enumerate(documents):
        cut.append((number, []))
        for token in document:
            if at % seq_len == 0 and cut[-1][1]:
                cut.append((number, []))
            cut[-1][1].append(int(token))
            at += 1
    found = []
    for number, ids in cut:
        row = [ids + [0] * (seq_len - len(ids))]
        routing = model.routing(row, segment_ids=[[1] * len(ids) + [0] * (seq_len - len(ids))])
        found.append(Piece(number, ids, *(np.asarray(x)[0, : len(ids)] for x in routing)))
    return found


def band(count_D, size_D):
    """Half of the 95 % interval of the ratio of two sums over documents."""
    documents, total = len(size_D), sum(size_D)
    if documents < 2:
        return math.nan
    share = sum(count_D) / total
    rest = sum((c - share * n) ** 2 for c, n in zip(count_D, size_D, strict=True))
    return stats.t.ppf(0.975, documents - 1) * math.sqrt(documents / (documents - 1) * rest) / total


def domain(pieces, layer, experts):
    """The numbers of one layer of a domain, by their names in JSON."""
    tokens = [(p, t) for p in pieces for t in range(len(p.ids))]
    n, top_k, documents = len(tokens), pieces[0].expert_TLC.shape[2], pieces[-1].document + 1
    sizes = [sum(p.document == d for p, _ in tokens) for d in range(documents)]
    chosen = [(p.document, tuple(int(e) for e in p.expert_TLC[t, layer])) for p, t in tokens]
    out = {"share": [], "share_band": []}
    for c in range(top_k):
        by = [[sum(d == own and es[c] == e for own, es in chosen) for d in range(documents)] for e in range(experts)]
        out["share"].append([sum(counts) / n for counts in by])
        out["share_band"].append([band(counts, sizes) for counts in by])
    by = [[sum(d == own and e in es for own, es in chosen) for d in range(documents)] for e in range(experts)]
    out["either"] = [sum(counts) / n / top_k for counts in by]
    out["either_band"] = [band(counts, sizes) / top_k for counts in by]
    near = [(p.document, p.expert_TLC[t, layer], p.expert_TLC[t + 1, layer]) for p, t in tokens if t + 1 < len(p.ids)]
    near_sizes = [sum(own == d for own, *_ in near) for d in range(documents)]
    for name, same in (("first", lambda a, b: a[0] == b[0]), ("any", lambda a, b: bool({*a} & {*b}))):
        counts = [sum(same(a, b) for own, a, b in near if own == d) for d in range(documents)]
        out[f"repeat_{name}"], out[f"repeat_{name}_band"] = sum(counts) / len(near), band(counts, near_sizes)
        out[f"loads_{name}"] = sum(same(a, b) for _, a in chosen for _, b in chosen) / n**2
    out["gate"] = [np.mean([p.gate_TLC[t, layer, c] for p, t in tokens]) for c in range(top_k)]
    out["entropy"] = np.mean([-sum(x * math.log(x) for x in p.probs_TLE[t, layer]) for p, t in tokens])
    out["gap"] = np.mean([np.subtract(*sorted(p.logits_TLE[t, layer])[:-3:-1]) for p, t in tokens])
    out["load_max"] = max(out["either"]) * experts
    out["load_cv"] = math.sqrt(sum((x * experts - 1) ** 2 for x in out["either"]) / experts)
    out["dead"] = sum(x == 0 for x in out["either"])
    return out


def dropped(pieces, layer, experts, factor, batch_tokens, order):
    """Share of the choices that are dropped, batch by batch."""
    tokens = [(p, t) for p in pieces for t in range(len(p.ids))]
    lost = 0
    for start in range(0, len(tokens), batch_tokens):
        batch = tokens[start : start + batch_tokens]
        expert, gate, probs = (
            np.array([x[t, layer] for x, t in ((getattr(p, name), t) for p, t in batch)])
            for name in ("expert_TLC", "gate_TLC", "probs_TLE")
        )
        standing = gate if gate.shape[1] > 1 else probs.max(1, keepdims=True)
        capacity = math.ceil(np.float32(factor) * expert.size / experts)
        lost += (limit(expert, standing, experts, capacity, order) == experts).sum()
    return lost / len(tokens) / pieces[0].expert_TLC.shape[2]


def changed(now, before, layer, experts):
    """Of the same pieces of two models."""
    first = other = moved = n = 0
    for a, b in zip(now, before, strict=True):
        for t in range(len(a.ids)):
            ours, theirs = (dict(zip(x.expert_TLC[t, layer], x.gate_TLC[t, layer], strict=True)) for x in (a, b))
            n += 1
            first += next(iter(ours)) != next(iter(theirs))
            other += {*ours} != {*theirs}
            moved += sum(abs(ours.get(e, 0) - theirs.get(e, 0)) for e in range(experts)) / 2
    return {"first": first / n, "any": other / n, "gate": moved / n}


def pairs_and_paths(pieces, layers, experts):
    """Tokens that chose both of two experts, by layer, and those that went from one to another in the next layer."""
    together, paths = np.zeros((layers, experts, experts), int), np.zeros((layers - 1, experts, experts), int)
    for p in pieces:
        for chosen_LC in p.expert_TLC:
            for layer, chosen in enumerate(chosen_LC):
                for pair in permutations(chosen, 2):
                    together[layer][pair] += 1
            for layer in range(layers - 1):
                paths[layer, chosen_LC[layer, 0], chosen_LC[layer + 1, 0]] += 1
    return together, paths


def likings(pieces, layer, experts, smoothing=10, least=5):
    """(expert, token) -> (count, total, lift) of those that are more often there than by chance."""
    tokens = [(p.ids[t], int(p.expert_TLC[t, layer, 0])) for p in pieces for t in range(len(p.ids))]
    there, all_, both = Counter(e for _, e in tokens), Counter(v for v, _ in tokens), Counter(tokens)
    found = {}
    for (v, e), count in both.items():
        share = there[e] / len(tokens)
        lift = (count + smoothing * share) / (all_[v] + smoothing) / share
        if count >= least and lift > 1:
            found[e, v] = count, all_[v], lift
    return found


def meets(experts, top_k):
    """Share of all pairs of sets of experts that have a member in common: chance of uniform choices."""
    every = [{*s} for s in combinations(range(experts), top_k)]
    return sum(bool(a & b) for a in every for b in every) / len(every) ** 2
