"""Log-probabilities of continuations, against the whole forward pass of each request alone."""

import jax
import numpy as np
import pytest

from mixtral_jax.parallel import MeshConfig, make_mesh
from mixtral_jax.train.evals import Continuation, score, scoring
from tests.tiny import tiny_config, tiny_model

VOCAB, LONGEST = 97, 48
FEW_SHOT, OTHER = (np.random.default_rng(seed).integers(0, VOCAB, 40).tolist() for seed in (1, 2))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for all rows that share something and for the others."""
    monkeypatch.setattr(scoring, "SHORTEST", 36)
    monkeypatch.setattr(scoring, "NARROWEST", 64)
    monkeypatch.setattr(scoring, "_most_rows", lambda *_: 16)


def requests() -> list[Continuation]:
    """Answers of one token and of several behind one context, contexts that begin alike, some too long, and others."""
    rng = np.random.default_rng(0)

    def some(low: int, high: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(low, high)).tolist()

    found = []
    for head in (FEW_SHOT, OTHER, []):
        for _ in range(4):
            context = head + some(1, 20)
            found += [Continuation(context, some(1, 5)) for _ in range(2)]
            found += [Continuation(context, [token]) for token in (3, 4, 5)]
    lone = some(18, 20)
    found += [Continuation(lone, some(1, 30)) for _ in range(3)]
    return [*found, Continuation(lone[:9], lone[9:]), Continuation([1], some(40, 48)), Continuation(lone, lone[:3])]


@pytest.fixture(scope="module", params=[None, 11], ids=["whole", "window"])
def model(request: pytest.FixtureRequest):
    return tiny_model(tiny_config(vocab_size=VOCAB, sliding_window=request.param))


def alone(model, asked: list[Continuation]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each in a row of its own, all logits at once."""
    wholes = [[*each.context, *each.tokens][-LONGEST - 1 :] for each in asked]
    tokens_BT, real_BT = np.zeros((2, len(asked), LONGEST), np.int32)
    for b, whole in enumerate(wholes):
        tokens_BT[b, : len(whole) - 1], real_BT[b, : len(whole) - 1] = whole[:-1], 1
    logp_BTV = np.asarray(jax.nn.log_softmax(model(tokens_BT, None, real_BT)))
    found = []
    for b, (each, whole) in enumerate(zip(asked, wholes, strict=True)):
        logp_TV = logp_BTV[b, len(whole) - 1 - len(each.tokens) : len(whole) - 1]
        found.append((logp_TV[np.arange(len(each.tokens)), each.tokens], logp_TV.argmax(-1) == each.tokens))
    return found


def check(found, want) -> None:
    for mine, (logps_T, best_T) in zip(found, want, strict=True):
        np.testing.assert_allclose(mine.logps_T, logps_T, atol=2e-5)
        assert mine.best_T.tolist() == best_T.tolist()


def test_scores_are_those_of_each_request_alone(model) -> None:
    told: list[int] = []
    check(score(model, requests(), longest=LONGEST, advance=told.append), alone(model, requests()))
    assert sum(told) == sum(len(each.tokens) for each in requests())


def test_on_a_mesh_and_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(vocab_size=VOCAB, sliding_window=11))
    monkeypatch.setattr(scoring, "_most_rows", lambda *_: 4)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))):
        found = score(model, requests(), longest=LONGEST)
    check(found, alone(model, requests()))


def test_what_begins_alike_is_read_once() -> None:
    rows, _ = scoring._rows(requests(), 64, VOCAB)
    groups = scoring._groups(rows)
    assert sorted(group.shared for group in groups if group.shared >= 40) == [40, 40]
    read = sum(group.shared + sum(len(row.tokens) - group.shared for row in group.rows) for group in groups)
    assert read < 0.4 * sum(len(each.context) + len(each.tokens) - 1 for each in requests())


@pytest.mark.parametrize(
    ("context", "tokens", "message"),
    [
        ([], [1], "1 tokens behind 0"),
        ([1], [], "0 tokens behind 1"),
        ([1], [1] * 65, "65 tokens"),
        ([97], [1], "to 97"),
    ],
)
def test_what_cannot_be_asked_is_refused(context, tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        score(tiny_model(tiny_config(vocab_size=VOCAB)), [Continuation(context, tokens)])
