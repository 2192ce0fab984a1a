"""Log-probabilities of continuations, against the whole forward pass of each request alone."""

import jax
import numpy as np
import pytest

from mixtral_jax.parallel import MeshConfig, make_mesh
from mixtral_jax.train.evals import Continuation, score, scoring
from tests.tiny import tiny_config, tiny_model

VOCAB = 97
FEW_SHOT, OTHER = ([int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, 40)] for seed in (1, 2))


def requests() -> list[Continuation]:
    """Answers of several tokens behind one context, of one token; contexts that begin alike, and none of all that."""
    rng = np.random.default_rng(0)

    def some(low: int, high: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(low, high)).tolist()

    found = []
    for head in (FEW_SHOT, OTHER, []):
        for _ in range(6):
            context = head + some(1, 20)
            found += [Continuation(context, some(1, 5)) for _ in range(3)]
            found += [Continuation(context, [token]) for token in (3, 4, 5)]
    lone = some(18, 20)
    found += [Continuation(lone, some(1, 30)) for _ in range(3)]
    found += [Continuation(lone[:9], lone[9:]), Continuation([1], some(50, 60)), Continuation(lone, lone[:3])]
    return found


@pytest.fixture(scope="module", params=[None, 11], ids=["whole", "window"])
def model(request):
    return tiny_model(tiny_config(vocab_size=VOCAB, sliding_window=request.param))


def slow(model, each: Continuation, longest: int) -> tuple[np.ndarray, np.ndarray]:
    whole = [*each.context, *each.tokens][-longest - 1 :]
    padded = np.zeros((1, longest), np.int32)
    padded[0, : len(whole) - 1] = whole[:-1]
    logp_TV = np.asarray(jax.nn.log_softmax(model(padded, None, (np.arange(longest) < len(whole) - 1)[None].astype(int))))[0]
    rows_TV = logp_TV[len(whole) - 1 - len(each.tokens) : len(whole) - 1]
    return rows_TV[np.arange(len(each.tokens)), each.tokens], rows_TV.argmax(-1) == each.tokens


def check(model, asked: list[Continuation], longest: int = 64) -> None:
    for each, found in zip(asked, score(model, asked, longest=longest), strict=True):
        logps_T, best_T = slow(model, each, longest)
        np.testing.assert_allclose(found.logps_T, logps_T, atol=2e-5)
        assert found.best_T.tolist() == best_T.tolist()


def test_scores_are_those_of_each_request_alone(model) -> None:
    check(model, requests())


def test_nothing_depends_on_how_many_go_at_once(model, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "_most_rows", lambda *_: 2)
    check(model, requests())


def test_of_a_long_request_the_beginning_is_dropped(model) -> None:
    check(model, requests(), longest=30)


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}], ids=str)
def test_on_a_mesh(model, mesh) -> None:
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **mesh}))):
        found = score(model, requests())
    for mine, theirs in zip(found, score(model, requests()), strict=True):
        np.testing.assert_allclose(mine.logps_T, theirs.logps_T, atol=2e-5)
