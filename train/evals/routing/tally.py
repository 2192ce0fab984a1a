"""Choices of experts into sums, by layer, that add up over domains, and the sums into the numbers of a domain."""

from typing import Any, NamedTuple, Self

import numpy as np
from scipy import stats

from mixtral_jax.train.evals.routing.observe import Observed, Tokens
from mixtral_jax.train.evals.routing.result import Changed, Domain

_CONFIDENCE = 0.95
_DENSE_SETS = 16  # experts, of which every set of choices is counted


def count(*columns: tuple[np.ndarray, int]) -> np.ndarray:
    """How often each combination of values occurs: columns of indices, and the size of each."""
    values, sizes = zip(*columns, strict=True)
    flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*values)), sizes).reshape(-1)
    return np.bincount(flat, minlength=np.prod(sizes, dtype=int)).reshape(sizes)


class Spread(NamedTuple):
    """Counts c of documents of sizes n: what a share sum c / sum n, and its spread between documents, are made of."""

    counts: np.ndarray  # sum c
    squares: np.ndarray  # sum c^2
    products: np.ndarray  # sum c n
    size: int  # sum n
    size_squares: int  # sum n^2
    documents: int

    @classmethod
    def of(cls, count_D: np.ndarray, size_D: np.ndarray) -> Self:
        """Of counts (D, ...) in documents of sizes (D,)."""
        size = size_D.reshape(-1, *(1,) * (count_D.ndim - 1))
        squares, products = (count_D**2).sum(0), (count_D * size).sum(0)
        return cls(count_D.sum(0), squares, products, int(size_D.sum()), int((size_D**2).sum()), len(size_D))

    def share(self) -> np.ndarray:
        """sum c / sum n."""
        return self.counts / max(self.size, 1)

    def band(self) -> np.ndarray:
        """Half of the 95 % interval of the share, of documents that were drawn at random; NaN for a single one.

        t(D - 1) sqrt(D / (D - 1) sum (c - share n)^2) / sum n, the ratio estimator's (Cochran, Sampling Techniques, 3rd
        edition, 6.4): tokens of one document are not taken to be independent.
        """
        share, free = self.share(), self.documents - 1
        if free < 1 or not self.size:
            return np.full(share.shape, np.nan)
        rest = np.maximum(self.squares - 2 * share * self.products + share**2 * self.size_squares, 0)
        return stats.t.ppf((1 + _CONFIDENCE) / 2, free) * np.sqrt(self.documents / free * rest) / self.size


class Tally(NamedTuple):
    """Sums over the tokens of a domain; of several domains where they are added."""

    choice: Spread  # (L, C + 1, E): tokens whose c-th choice is e; behind those, that chose e at all
    repeat: Spread  # (L, 2): neighbours with the same first choice, with an expert in common
    sets_LS: np.ndarray  # tokens by their set of choices as bits; S is 2^E, 0 with many experts
    gate_LC: np.ndarray
    entropy_L: np.ndarray
    gap_L: np.ndarray
    dropped_L: np.ndarray
    changed_3L: np.ndarray  # of what Changed has means of; nothing where nothing is compared


def tally(seen: Observed, tokens: Tokens, experts: int, before: Observed | None) -> Tally:
    """The sums of one domain; `before`: of the checkpoint that it is compared with."""
    documents, inside = tokens.document_N[-1] + 1, tokens.neighbours
    owner = tokens.document_N[:-1][inside]
    tokens_D, inside_D = (np.bincount(each, minlength=documents) for each in (tokens.document_N, owner))
    ranks, dense = np.arange(seen.expert_NLC.shape[2]), experts <= _DENSE_SETS
    choices, repeats, sets, changed = [], [], [], []
    for layer, expert_NC in enumerate(np.moveaxis(seen.expert_NLC, 1, 0)):
        choice = count((tokens.document_N[:, None], documents), (ranks, len(ranks)), (expert_NC, experts))
        choices.append(np.concatenate([choice, choice.sum(1, keepdims=True)], axis=1))
        same_NCC = expert_NC[1:][inside][:, :, None] == expert_NC[:-1][inside][:, None, :]
        same = same_NCC[:, 0, 0], same_NCC.any((1, 2))
        repeats.append(np.stack([np.bincount(owner[each], minlength=documents) for each in same], axis=1))
        if dense:
            sets.append(np.bincount((1 << expert_NC.astype(np.int64)).sum(1), minlength=1 << experts))
        if before is not None:
            changed.append(_changed(seen, before, layer, experts))
    shape = len(choices), len(sets) and 1 << experts
    return Tally(
        Spread.of(np.stack(choices, axis=1), tokens_D), Spread.of(np.stack(repeats, axis=1), inside_D),
        np.array(sets, int).reshape(shape),
        seen.gate_NLC.sum(0, np.float64), seen.entropy_L, seen.gap_L, seen.dropped_L,
        np.zeros((3, 0)) if before is None else np.array(changed).T,
    )  # fmt: skip


def add(a: Any, b: Any) -> Any:
    """Sums of two domains."""
    return type(a)(*(add(x, y) if isinstance(x, tuple) else x + y for x, y in zip(a, b, strict=True)))


def domain(name: str, sums: Tally) -> Domain:
    """The numbers of a domain."""
    tokens, top_k = sums.choice.size, sums.choice.counts.shape[1] - 1
    choice, band, repeat = sums.choice.share(), sums.choice.band(), sums.repeat.share().T
    repeat_band, load_LE = sums.repeat.band().T, choice[:, -1] / top_k
    changed = Changed(*sums.changed_3L / tokens) if sums.changed_3L.size else None
    return Domain(
        name, tokens, sums.choice.documents, sums.repeat.size,
        share_LCE=choice[:, :-1], share_band_LCE=band[:, :-1],
        either_LE=load_LE, either_band_LE=band[:, -1] / top_k,
        repeat_first_L=repeat[0], repeat_first_band_L=repeat_band[0],
        repeat_any_L=repeat[1], repeat_any_band_L=repeat_band[1],
        loads_first_L=(choice[:, 0] ** 2).sum(-1), loads_any_L=meeting(sums.sets_LS),
        gate_LC=sums.gate_LC / tokens, entropy_L=sums.entropy_L / tokens, gap_L=sums.gap_L / tokens,
        load_max_L=load_LE.max(-1) / load_LE.mean(-1), load_cv_L=load_LE.std(-1) / load_LE.mean(-1),
        dead_L=(load_LE == 0).sum(-1), dropped_L=sums.dropped_L / (tokens * top_k), changed=changed,
    )  # fmt: skip


def meeting(sets_LS: np.ndarray) -> np.ndarray:
    """P(two sets drawn at random have a member in common), by layer, of how often each set occurs; NaN of no sets.

    1 - sum_s P(s) P(a subset of the complement of s), the latter by sums over one bit after another.
    """
    layers, size = sets_LS.shape
    if not size:
        return np.full(layers, np.nan)
    share_LS = sets_LS / sets_LS.sum(-1, keepdims=True)
    within = share_LS.reshape(layers, *(2,) * (size.bit_length() - 1))
    for bit in range(1, within.ndim):
        within = within.cumsum(bit)
    return 1 - (share_LS * within.reshape(layers, size)[:, ::-1]).sum(-1)


def _changed(seen: Observed, before: Observed, layer: int, experts: int) -> tuple[float, ...]:
    (a, gate), (b, gate_before) = ((each.expert_NLC[:, layer], each.gate_NLC[:, layer]) for each in (seen, before))
    moved_NE = np.zeros((len(a), experts))
    np.put_along_axis(moved_NE, a.astype(int), gate, 1)
    moved_NE[np.arange(len(b))[:, None], b] -= gate_before
    other = (np.sort(a, axis=1) != np.sort(b, axis=1)).any(1)
    return (a[:, 0] != b[:, 0]).sum(), other.sum(), np.abs(moved_NE).sum() / 2
