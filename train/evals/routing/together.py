"""What is counted over all domains together: pairs of experts, paths between layers, tokens of each expert."""

from collections.abc import Callable

import numpy as np

from mixtral_jax.train.evals.routing.observe import Observed, Tokens
from mixtral_jax.train.evals.routing.result import Liking
from mixtral_jax.train.evals.routing.tally import count

_SMOOTHING = 10  # tokens that are taken to be routed as all are
_LEAST, _SHOWN = 5, 12  # of a token that an expert likes; likings of an expert


class Together:
    """Counts, to which one domain after another is added."""

    def __init__(self, layers: int, experts: int, vocabulary: int):
        self.pairs_LEE = np.zeros((layers, experts, experts), np.int64)
        self.paths_LEE = np.zeros((layers - 1, experts, experts), np.int64)
        self.token_LEV = np.zeros((layers, experts, vocabulary), np.int32)  # by first choice

    def add(self, seen: Observed, tokens: Tokens) -> None:
        """The tokens of a domain."""
        _, experts, vocabulary = self.token_LEV.shape
        layers = np.moveaxis(seen.expert_NLC, 1, 0)
        for layer, expert_NC in enumerate(layers):
            both = count((expert_NC[:, :, None], experts), (expert_NC[:, None, :], experts))
            self.pairs_LEE[layer] += both - np.diag(np.diag(both))
            self.token_LEV[layer] += count((expert_NC[:, 0], experts), (tokens.ids_N, vocabulary)).astype(np.int32)
        for layer in range(len(layers) - 1):
            self.paths_LEE[layer] += count((layers[layer][:, 0], experts), (layers[layer + 1][:, 0], experts))

    def likings(self, piece: Callable[[int], str]) -> tuple[tuple[tuple[Liking, ...], ...], ...]:
        """Of each layer and expert the tokens of the largest lift.

        lift = P(e | v) / P(e) with P(e | v) = (n_ev + a P(e)) / (n_v + a), a = 10: pointwise mutual information as a
        ratio, drawn towards 1 where a token is rare.
        """
        total_V = self.token_LEV[0].sum(0)
        found = []
        for token_EV in self.token_LEV:
            share_E1 = token_EV.sum(1, keepdims=True) / total_V.sum()
            lift_EV = (token_EV / np.maximum(share_E1, 1e-30) + _SMOOTHING) / (total_V + _SMOOTHING)
            lift_EV[token_EV < _LEAST] = 0
            best_EV = np.argsort(-lift_EV, axis=1, kind="stable")[:, :_SHOWN]
            found.append(tuple(
                tuple(
                    Liking(int(v), piece(int(v)), int(n_V[v]), int(total_V[v]), float(lift_V[v]))
                    for v in best if lift_V[v] > 1
                )
                for best, n_V, lift_V in zip(best_EV, token_EV, lift_EV, strict=True)
            ))  # fmt: skip
        return tuple(found)


def pairs_ratio(pairs_LEE: np.ndarray, passes: int = 500) -> np.ndarray:
    """Observed / expected pairs, NaN where nothing is expected.

    Expected is a_e a_f off the diagonal with the observed sum for every expert: what loads alone would give, for no
    token chooses an expert twice (quasi-independence, Goodman 1968; by iterative proportional fitting).
    """
    pairs = pairs_LEE.astype(np.float64)
    own = pairs.sum(-1)
    a = np.sqrt(own)
    for _ in range(passes):
        rest = a * (a.sum(-1, keepdims=True) - a)
        a = a * np.sqrt(own / np.where(rest > 0, rest, 1))
    expected = a[..., :, None] * a[..., None, :] * ~np.eye(pairs.shape[-1], dtype=bool)
    return _ratio(pairs, expected)


def paths_ratio(paths_LEE: np.ndarray) -> np.ndarray:
    """Observed / expected paths n_e n_f / N, NaN where nothing is expected."""
    paths = paths_LEE.astype(np.float64)
    whole = np.maximum(paths.sum((-2, -1), keepdims=True), 1)
    return _ratio(paths, paths.sum(-1, keepdims=True) * paths.sum(-2, keepdims=True) / whole)


def _ratio(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.divide(observed, expected, out=np.full(observed.shape, np.nan), where=expected > 0)
