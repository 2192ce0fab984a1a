"""Cached decoding against the full forward pass, token by token."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import ComputeConfig, MoeConfig
from mixtral_jax.generation import engine
from mixtral_jax.generation.cache import cache_slots, decode, prefill
from mixtral_jax.generation.engine import generate, stream
from mixtral_jax.generation.few_rows import few_rows_apart, few_rows_swiglu
from mixtral_jax.model import Mixtral
from mixtral_jax.moe import block
from mixtral_jax.moe.experts import ExpertWeights, grouped_swiglu
from mixtral_jax.moe.transport import exchange_experts
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.parallel.sharding import param_shardings
from tests.tiny import tiny_config, tiny_model

PROMPTS = [[1, 5, 9], [1, *range(20, 31)], [3]]
NEW = 9
full_forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))


def shapes() -> dict:
    return {
        "plain": tiny_config(vocab_size=97),
        "window": tiny_config(vocab_size=97, sliding_window=5),
        "dense": tiny_config(vocab_size=97, num_local_experts=1, num_experts_per_tok=1),
        "tied": tiny_config(vocab_size=97, tie_word_embeddings=True, num_key_value_heads=1),
    }


def full_logits(model: Mixtral, ids: list[int]) -> np.ndarray:
    """Logits after the last of `ids`; padding behind it changes nothing before it."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(full_forward(model, padded)[0, len(ids) - 1])


def greedy_twin(model: Mixtral, prompt: list[int], count: int) -> list[int]:
    """The whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(full_logits(model, ids).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", shapes())
def test_greedy_equals_the_full_forward_pass(name: str) -> None:
    model = tiny_model(shapes()[name])
    assert generate(model, PROMPTS, max_new_tokens=NEW) == [greedy_twin(model, p, NEW) for p in PROMPTS]


@pytest.mark.parametrize("name", shapes())
def test_logits_equal_those_of_the_full_forward_pass(name: str) -> None:
    model = tiny_model(shapes()[name])
    width = 16
    tokens_BT, pad_B = np.zeros((3, width), np.int32), np.array([width - len(p) for p in PROMPTS], np.int32)
    for b, prompt in enumerate(PROMPTS):
        tokens_BT[b, pad_B[b] :] = prompt
    slots = cache_slots(model.config.sliding_window, width + NEW)
    logits_BV, cache = jax.jit(prefill, static_argnums=3)(model, tokens_BT, pad_B, slots)
    assert cache.k_LBKSH.shape[3] == (model.config.sliding_window or width + NEW)
    rows, step = [list(p) for p in PROMPTS], jax.jit(decode)
    following = np.random.default_rng(0).integers(0, 97, (NEW, 3)).astype(np.int32)
    for t in range(NEW):
        want_BV = np.stack([full_logits(model, row) for row in rows])
        np.testing.assert_allclose(logits_BV, want_BV, atol=1e-5)
        logits_BV, cache = step(model, cache, following[t], jnp.int32(width + t), pad_B, np.ones(3, bool))
        for row, token in zip(rows, following[t], strict=True):
            row.append(int(token))


def test_many_rows_take_the_grouped_path() -> None:
    model = tiny_model(tiny_config(vocab_size=97))
    prompts = [[1, 2 + i % 90] for i in range(130)]
    got = generate(model, prompts, max_new_tokens=3)
    assert got[:2] + got[-2:] == [greedy_twin(model, p, 3) for p in prompts[:2] + prompts[-2:]]


@pytest.mark.parametrize("chunk", [7, 40, 1000])  # the last chunk of 48 tokens is filled up, and there is one only
def test_prompts_keep_to_chunks_of_tokens(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, handled = tiny_config(vocab_size=97), []
    compute = ComputeConfig(moe=MoeConfig(chunk_tokens=chunk))
    exchange = block.exchange_experts

    def record(weights: ExpertWeights, x_MD: jax.Array, *args: Any, **options: Any) -> Any:
        handled.append(x_MD.shape[0])
        return exchange(weights, x_MD, *args, **options)

    monkeypatch.setattr(block, "exchange_experts", record)
    chunked = Mixtral(config, compute, key=jax.random.key(0))
    assert generate(chunked, PROMPTS, max_new_tokens=4) == generate(tiny_model(config), PROMPTS, max_new_tokens=4)
    assert handled[0] == min(chunk, 48)  # of the model with chunks; the other comes behind
    assert set(handled[1:]) <= {handled[0], 48}


def test_no_token_is_dropped() -> None:
    config = tiny_config(vocab_size=97)
    compute = ComputeConfig(moe=MoeConfig(capacity_factor=0.1, chunk_tokens=7))
    tight = Mixtral(config, compute, key=jax.random.key(0))
    assert generate(tight, PROMPTS, max_new_tokens=4) == generate(tiny_model(config), PROMPTS, max_new_tokens=4)
    assert tight.layers.moe.options.capacity_factor == 0.1


def test_a_row_ends_with_its_ending_token() -> None:
    model = tiny_model(tiny_config(vocab_size=97))
    free = generate(model, PROMPTS, max_new_tokens=NEW)
    end = free[1][2]
    want = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert generate(model, PROMPTS, max_new_tokens=NEW, eos_id=end) == want
    assert generate(model, PROMPTS, max_new_tokens=NEW, eos_id=[96, end]) == generate(
        model, PROMPTS, max_new_tokens=NEW, eos_id=[end, 96]
    )
    array = np.array([p[:1] for p in PROMPTS])
    plain, ended = generate(model, array, max_new_tokens=NEW), generate(model, array, max_new_tokens=NEW, eos_id=end)
    behind = np.cumsum(plain == end, axis=1) - (plain == end) > 0
    np.testing.assert_array_equal(ended, np.where(behind, end, plain))


def test_stream_gives_the_same_tokens_step_by_step() -> None:
    model = tiny_model(tiny_config(vocab_size=97, sliding_window=5))
    free = generate(model, PROMPTS, max_new_tokens=NEW)
    options = dict(max_new_tokens=NEW, temperature=0.7, top_k=9, top_p=0.9, seed=4, eos_id=free[0][3])
    steps = list(stream(model, PROMPTS, **options))
    rows = [[token for token in column if token is not None] for column in zip(*steps, strict=True)]
    assert rows == generate(model, PROMPTS, **options)
    wide = list(stream(model, PROMPTS, width=24, **{**options, "max_new_tokens": 3}))
    assert wide == steps[:3]


def test_what_a_row_draws_does_not_depend_on_the_others() -> None:
    model = tiny_model(tiny_config(vocab_size=97))
    options = dict(max_new_tokens=NEW, temperature=1.0, seed=3)
    together = generate(model, PROMPTS, **options)
    assert together[:1] == generate(model, PROMPTS[:1], **options)
    assert together[0] == generate(model, [PROMPTS[0], [1] * 25], **options)[0]
    assert together[1:] == generate(model, PROMPTS[1:], numbers=[1, 2], **options)
    assert together != generate(model, PROMPTS, **{**options, "seed": 5})
    same = generate(model, [[1, 2]] * 3, **options)
    assert same[0] != same[1] != same[2]


def test_forms_of_input() -> None:
    model = tiny_model(tiny_config(vocab_size=97))
    want = generate(model, PROMPTS, max_new_tokens=4)
    assert generate(model, PROMPTS[0], max_new_tokens=4) == want[0]
    padded = np.zeros((3, 12), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    got = generate(model, jnp.array(padded), max_new_tokens=4, lengths=[3, 12, 1])
    np.testing.assert_array_equal(got, want)
    assert generate(model, np.array(PROMPTS[1]), max_new_tokens=4).tolist() == want[1]
    assert generate(model, [], max_new_tokens=4) == []


@pytest.mark.parametrize("way", ["few_rows", "apart", "blocked", "ragged_dot", "dense"])
def test_nan_stays_with_the_tokens_that_have_it(way: str) -> None:
    """A gate, an input, an expert's matrix: NaN for the tokens that chose what is NaN, the others as without it."""
    rng = np.random.default_rng(0)
    x_MD, gate_MC = rng.normal(size=(5, 8)).astype(np.float32), np.full((5, 2), 0.5, np.float32)
    w13_ED2F, w2_EFD = rng.normal(size=(3, 8, 12)).astype(np.float32), rng.normal(size=(3, 6, 8)).astype(np.float32)
    expert_MC = np.array([[0, 1], [1, 2], [0, 2], [1, 0], [3, 3]])  # 3 is nobody's

    def apply(x_MD: np.ndarray, gate_MC: np.ndarray, w2_EFD: np.ndarray) -> np.ndarray:
        weights = ExpertWeights(jnp.array(w13_ED2F), jnp.array(w2_EFD))
        if way == "few_rows":
            read = lambda e: ExpertWeights(*(w[e][None] for w in weights[:2]))  # noqa: E731 - shorter
            return np.asarray(few_rows_swiglu(jnp.array(x_MD), jnp.array(expert_MC), jnp.array(gate_MC), 3, read))
        if way == "apart":
            own = [ExpertWeights(*(w[e][None] for w in weights[:2])) for e in range(3)]
            return np.asarray(few_rows_apart(*map(jnp.array, (x_MD, expert_MC, gate_MC)), own))
        run = lambda w, x, gate, sizes: grouped_swiglu(x, gate, w, sizes, way)  # noqa: E731 - shorter
        rows = [weights, *map(jnp.array, (x_MD, expert_MC, gate_MC))]
        return np.asarray(exchange_experts(*rows, run, experts=3, transport="auto", capacity=None)[0])

    def poisoned(a: np.ndarray, *at: int) -> np.ndarray:
        a = a.copy()
        a[at] = np.nan
        return a

    plain_MD = apply(x_MD, gate_MC, w2_EFD)
    assert not plain_MD[4].any()
    cases = [((x_MD, poisoned(gate_MC, 2, 1), w2_EFD), [2]), ((poisoned(x_MD, 1), gate_MC, w2_EFD), [1])]
    if way not in ("ragged_dot", "dense"):  # which multiply every row with every matrix, by 0
        cases.append(((x_MD, gate_MC, poisoned(w2_EFD, 2)), [1, 2]))
    for given, hit in cases:
        got_MD = apply(*given)
        assert np.flatnonzero(np.isnan(got_MD).all(axis=1)).tolist() == hit
        others = [i for i in range(5) if i not in hit]
        np.testing.assert_allclose(got_MD[others], plain_MD[others], atol=1e-6)


@pytest.mark.parametrize("rows", [3, 130])  # experts one by one, and grouped
def test_a_row_of_nan_is_told_and_harms_no_other(rows: int) -> None:
    model = tiny_model(tiny_config(vocab_size=97))
    prompts = [[1, 2 + i] for i in range(90)] + [[1, 2]] * 40
    prompts = prompts[: rows - 1]
    want = generate(model, prompts, max_new_tokens=3)
    router_LDE = model.layers.moe.router[...]
    model.embed.weight[...] = model.embed.weight[...].at[96].set(jnp.nan)  # of the token that only one row has
    width, pad_B = 16, np.full(rows, 14, np.int32)
    tokens_BT = np.zeros((rows, width), np.int32)
    tokens_BT[:, 14:] = [*prompts, [1, 96]]
    logits_BV, cache = jax.jit(prefill, static_argnums=3)(model, tokens_BT, pad_B, 24)
    alive = [*[True] * (rows - 1), False]
    for _ in range(2):
        np.testing.assert_array_equal(np.isfinite(logits_BV).all(axis=1), alive)
        assert np.isnan(logits_BV[-1]).all()
        token_B = jnp.full(rows, 5)
        logits_BV, cache = jax.jit(decode)(model, cache, token_B, jnp.int32(width), pad_B, np.ones(rows, bool))
    assert generate(model, prompts, max_new_tokens=3) == want
    message = f"continuation {rows - 1}: the logits of its token 1 are NaN"
    for drawing in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}):
        with pytest.raises(FloatingPointError, match=message):
            generate(model, [*prompts, [1, 96]], max_new_tokens=1, **drawing)
    with pytest.raises(FloatingPointError, match=message):
        list(stream(model, [*prompts, [1, 96]], max_new_tokens=1))
    with pytest.raises(FloatingPointError, match="continuation 7: the logits"):
        generate(model, [[1, 96]], numbers=[7], max_new_tokens=1)
    model.layers.moe.router[...] = router_LDE.at[1, 0, 2].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="continuation 0: the logits of its token 1 are NaN"):
        generate(model, prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty: begin it with the BOS token"),
        ([[1, 97]], {}, "prompt 0 has tokens from 1 to 97: the vocabulary has 97"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number of at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0: it must be a finite number, 0"),
        ([[1]], {"top_p": 0.0}, r"top_p is 0.0: it must be a number in \(0, 1\]"),
        ([[1]], {"top_k": -2}, "top_k is -2: it must be a whole number"),
        ([[1]], {"lengths": [1, 1]}, r"lengths has shape \(2,\): it must be one integer for each of the 1 prompts"),
        ([[1]], {"lengths": 1}, r"lengths has shape \(\)"),
        ([[1]], {"lengths": [1.0]}, "lengths has numbers of float64: it must be one integer"),
        ([[1]], {"lengths": [True]}, "lengths has numbers of bool"),
        ([[1], [1, 2]], {"lengths": [1, 3]}, "lengths has 3 for prompt 1: it must be from 1 to 2"),
        ([[1], [1, 2]], {"lengths": [0, 2]}, "lengths has 0 for prompt 0: it must be from 1 to 1"),
        ([[1], [1, 2]], {"lengths": [1, -1]}, "lengths has -1 for prompt 1: it must be from 1 to 2"),
        ([[1]], {"max_new_tokens": -3}, "max_new_tokens is -3: it must be a whole number of at least 1"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens is True: it must be a whole number"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens is 2.0: it must be a whole number"),
        ([], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_is_refused(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(tiny_config(vocab_size=97)), prompts, **options)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "expert": 4, "context": 2}],
    ids=["data2-fsdp2-tensor2", "expert4-context2"],
)
def test_on_a_mesh(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(vocab_size=96))
    options = dict(max_new_tokens=4, eos_id=5)
    want = generate(model, PROMPTS, **options)
    drawn = generate(model, PROMPTS, temperature=1.0, **options)
    mesh = make_mesh(MeshConfig(**sizes))
    placed = jax.tree.map(jax.device_put, model, _as_model(model, param_shardings(model, mesh)))

    def read(x: Any) -> np.ndarray:
        assert not isinstance(x, jax.Array) or x.is_fully_replicated  # else no process of several could
        return np.asarray(x)

    monkeypatch.setattr(engine, "np", SimpleNamespace(**{**vars(np), "asarray": read}))
    with jax.set_mesh(mesh):
        assert generate(placed, PROMPTS, **options) == want
        assert generate(placed, PROMPTS, temperature=1.0, **options) == drawn
        assert [step[0] for step in stream(placed, PROMPTS, **options)][: len(want[0])] == want[0]


def _as_model(model: Mixtral, shardings: dict) -> Mixtral:
    return jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(shardings))
