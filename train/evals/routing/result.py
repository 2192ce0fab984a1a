"""What a router does with text, as numbers: the result of `routing`, and its JSON. docs/routing.md has the formulas."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Changed:
    """By layer, between two checkpoints on the same tokens."""

    first_L: np.ndarray  # share of tokens whose first choice is another
    any_L: np.ndarray  # share of tokens whose set of choices is another
    gate_L: np.ndarray  # mean over tokens of sum_e |gate - gate before| / 2, from 0 to 1


@dataclass(frozen=True)
class Domain:
    """One domain's numbers. A band is half a 95 % confidence interval; NaN where the domain is a single document."""

    name: str
    tokens: int
    documents: int
    neighbours: int  # pairs of neighbouring tokens in one document and row
    share_LCE: np.ndarray  # of the tokens: whose c-th choice is expert e; sum over e is 1
    share_band_LCE: np.ndarray
    either_LE: np.ndarray  # of the choices: that are expert e; sum over e is 1
    either_band_LE: np.ndarray
    repeat_first_L: np.ndarray  # share of neighbours with the same first choice
    repeat_first_band_L: np.ndarray
    repeat_any_L: np.ndarray  # share of neighbours with an expert in common
    repeat_any_band_L: np.ndarray
    loads_first_L: np.ndarray  # repeat_first of two tokens drawn at random from this domain
    loads_any_L: np.ndarray  # repeat_any of such; NaN with more than 16 experts
    gate_LC: np.ndarray  # mean gate of the c-th choice
    entropy_L: np.ndarray  # mean entropy of the router's probabilities, nats; at most ln E
    gap_L: np.ndarray  # mean of the largest logit minus the second largest
    load_max_L: np.ndarray  # either, largest / mean
    load_cv_L: np.ndarray  # either, standard deviation / mean
    dead_L: np.ndarray  # experts that no token chose
    dropped_L: np.ndarray  # share of the choices that the capacity would drop
    changed: Changed | None


@dataclass(frozen=True)
class Liking:
    """A token that goes to an expert more often than others do."""

    id: int
    piece: str
    count: int  # how often it goes there first
    total: int  # how often it is there
    lift: float  # smoothed P(expert | token) / P(expert)


@dataclass(frozen=True)
class Coloured:
    """The beginning of a document, token by token. Pieces but those of control tokens join to the text."""

    domain: str
    pieces: tuple[str, ...]  # (n,): "" where a character goes on in the next token
    control: tuple[int, ...]  # places of control tokens, whose pieces are their names
    expert_LNC: np.ndarray  # best first
    gate_LNC: np.ndarray


@dataclass(frozen=True)
class Result:
    """Everything that the page shows. Axis L counts `layers`."""

    checkpoint: str
    against: str | None
    experts: int
    top_k: int
    model_layers: int
    layers: tuple[int, ...]  # which layers of the model, from 0
    seq_len: int
    tokens_asked: int  # of each domain
    capacity_factor: float
    capacity_is_own: bool  # the run's; else what would be dropped
    capacity_tokens: int  # tokens of a batch, of which capacity_factor counts
    chance_first: float  # of repeat_first with uniform choices: 1 / E
    chance_any: float  # of repeat_any: 1 - C(E - k, k) / C(E, k)
    notes: tuple[str, ...]  # sentences for the top of the page
    domains: tuple[Domain, ...]
    all: Domain  # the tokens of all domains together
    likings: tuple[tuple[tuple[Liking, ...], ...], ...]  # by layer and expert, the strongest first
    together_LEE: np.ndarray  # tokens that chose both experts; 0 on the diagonal
    together_ratio_LEE: np.ndarray  # observed / expected of the loads alone; NaN where nothing is expected
    paths_LEE: np.ndarray  # (L - 1, E, E): tokens with first choice e in a layer and f in the next of `layers`
    paths_ratio_LEE: np.ndarray  # observed / expected of independent layers; NaN where nothing is expected
    texts: tuple[Coloured, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it: keys are the names above without the shapes, NaN is null."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.rstrip("LNCE").rstrip("_"): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
