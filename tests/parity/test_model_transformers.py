"""Logits, routing, losses and every gradient against transformers, through files on disk (NUMERICS B7, B8, C1)."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral_jax.config import ComputeConfig
from mixtral_jax.model import Mixtral, next_token_sums
from mixtral_jax.moe import block as moe_block
from mixtral_jax.moe.balance import balance_loss, router_stats
from mixtral_jax.moe.router import route
from tests.optional import often
from tests.parity.hf_models import Pair, build, gradients, ours

B, T = 3, 17
GAP = 1e-5  # below it the two libraries may route differently and both be right
COEF = 0.5  # of the balance loss where it is on; so large that the rounding of a top-1 gate (p / p) is small beside it

GRID: dict[str, dict[str, Any]] = {
    "top1of4": dict(num_local_experts=4, num_experts_per_tok=1, rope_theta=1e4),
    "top2of8": dict(num_local_experts=8, num_experts_per_tok=2, vocab_size=131),
    "top4of16_head_dim_one_kv_head": dict(
        num_local_experts=16, num_experts_per_tok=4, head_dim=6, num_attention_heads=6, num_key_value_heads=1,
        intermediate_size=20,
    ),
    "all_experts_kv_is_heads": dict(num_local_experts=3, num_experts_per_tok=3, num_key_value_heads=4),
    "tied": dict(num_local_experts=5, num_experts_per_tok=2, tie_word_embeddings=True, vocab_size=61),
    "window": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=5, rope_theta=1e4),
    "dense": dict(num_local_experts=1, rope_theta=1e4, head_dim=10, tie_word_embeddings=False),
    "dense_window": dict(num_local_experts=1, rope_theta=1e4, sliding_window=4, num_hidden_layers=3),
}  # fmt: skip


class Rows(NamedTuple):
    """A batch with right padding in row 1, left padding in row 2, and labels masked at random."""

    tokens: np.ndarray
    labels: np.ndarray  # as transformers wants them: not shifted, -100 where there is none
    mask: np.ndarray

    def for_ours(self) -> tuple[np.ndarray, ...]:
        targets, weights = np.zeros_like(self.tokens), np.zeros(self.tokens.shape, np.float32)
        targets[:, :-1] = self.tokens[:, 1:]
        weights[:, :-1] = self.labels[:, 1:] != -100
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        return self.tokens, targets, weights, positions, self.mask.astype(np.int32)


def draw_rows(vocab: int) -> Rows:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, vocab, (B, T)).astype(np.int32)
    mask = np.ones((B, T), np.int32)
    mask[1, 12:] = 0
    mask[2, :4] = 0
    labels = np.where((mask == 1) & (rng.random((B, T)) < 0.7), tokens, -100)
    labels[2, 4] = -100  # transformers would predict it from a padding token
    return Rows(tokens, labels, mask)


class Case(NamedTuple):
    """Both libraries on the same rows; gradients at balance coefficient 0 and COEF."""

    pair: Pair
    rows: Rows
    hf_logits: np.ndarray
    hf_probs: list[np.ndarray]  # of each layer, (B * T, E)
    hf_losses: dict[float, float]
    hf_gradients: dict[float, dict]
    logits: np.ndarray
    experts: list[np.ndarray]  # of each layer, (B * T, C)
    losses: dict[float, float]
    gradients: dict[float, dict]
    stats: Any


def run_transformers(pair: Pair, rows: Rows, directory) -> tuple:
    hf, sparse = pair.hf, not pair.config.is_dense
    options = {"output_router_logits": True} if sparse else {}
    losses, grads = {}, {}
    for coef in (0.0, COEF) if sparse else (0.0,):
        hf.router_aux_loss_coef = coef
        hf.zero_grad()
        out = hf(input_ids=torch.tensor(rows.tokens, dtype=torch.long), attention_mask=torch.tensor(rows.mask),
                 labels=torch.tensor(rows.labels, dtype=torch.long), **options)  # fmt: skip
        out.loss.backward()
        losses[coef], grads[coef] = out.loss.item(), gradients(hf, directory / f"gradients{coef}")
    probs = [torch.softmax(z, -1).detach().numpy() for z in out.router_logits] if sparse else []
    return out.logits.detach().numpy(), probs, losses, grads


def run_ours(pair: Pair, rows: Rows, monkeypatch) -> tuple:
    """Logits, the chosen experts, and loss with gradients, from two compiled functions."""
    chosen: list[np.ndarray] = []
    route = moe_block.route

    def watched(*args, **options):
        routing = route(*args, **options)
        jax.debug.callback(lambda e: chosen.append(np.asarray(e)), routing.expert_MC, ordered=True)
        return routing

    model = ours(pair)
    tokens, targets, weights, positions, segments = rows.for_ours()
    monkeypatch.setattr(moe_block, "route", watched)
    logits = np.asarray(jax.jit(lambda m: m(tokens, positions, segments))(model))
    jax.effects_barrier()
    monkeypatch.setattr(moe_block, "route", route)

    @jax.jit
    def value_and_grad(model: Mixtral, coef):
        def loss(model):
            sums, stats = next_token_sums(model, tokens, targets, weights, positions, segments)
            aux = 0.0 if pair.config.is_dense else balance_loss(stats, "hf_pooled", pair.config.num_experts_per_tok)
            return sums.loss_sum / weights.sum() + coef * aux, stats

        return jax.value_and_grad(loss, has_aux=True)(model)

    losses, grads = {}, {}
    for coef in (0.0,) if pair.config.is_dense else (0.0, COEF):
        (value, stats), grad = value_and_grad(model, coef)
        losses[coef], grads[coef] = float(value), nnx.to_pure_dict(nnx.state(grad))
    return logits, chosen, losses, grads, jax.device_get(stats)


SELDOM = ("top1of4", "all_experts_kv_is_heads", "dense_window")


@pytest.fixture(scope="module", params=often(GRID, lambda name: name not in SELDOM))
def case(request, tmp_path_factory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    shape = GRID[request.param]
    with warnings.catch_warnings():
        if "sliding_window" in shape:  # we warn that the released Mixtral models have none
            warnings.filterwarnings("ignore", "config.json sets sliding_window")
        pair = build(directory / "model", seed=1, **shape)
        rows = draw_rows(pair.config.vocab_size)
        theirs = run_transformers(pair, rows, directory)
    with pytest.MonkeyPatch.context() as patch:
        return Case(pair, rows, *theirs, *run_ours(pair, rows, patch))


def test_shape_is_read_from_the_files(case):
    theirs, attention = case.pair.hf.config, case.pair.hf.model.layers[0].self_attn
    for field in ("vocab_size", "num_key_value_heads", "sliding_window", "tie_word_embeddings", "intermediate_size"):
        assert getattr(case.pair.config, field) == getattr(theirs, field), field
    assert case.pair.config.head_dim == attention.head_dim
    assert case.pair.config.rope_theta == theirs.rope_parameters["rope_theta"]


def test_logits(case):
    valid = case.rows.mask == 1
    assert 0.3 < case.hf_logits[valid].std() < 3  # of unit scale, so that the bound means something
    assert np.abs(case.logits - case.hf_logits)[valid].max() <= 1e-5


def test_router_indices(case):
    config = case.pair.config
    if config.is_dense:
        assert not case.experts and not case.hf_probs
        return
    valid, k = case.rows.mask.reshape(-1) == 1, config.num_experts_per_tok
    assert len(case.experts) == len(case.hf_probs) == config.num_hidden_layers
    for chosen, probs in zip(case.experts, case.hf_probs, strict=True):
        ranked = np.sort(probs, axis=-1)[:, ::-1]
        clear = np.ones(len(probs), bool) if k == probs.shape[1] else ranked[:, k - 1] - ranked[:, k] > GAP
        assert clear[valid].mean() > 0.95
        theirs = np.sort(np.argsort(-probs, axis=-1)[:, :k], axis=-1)
        np.testing.assert_array_equal(np.sort(chosen, axis=-1)[valid & clear], theirs[valid & clear])


def test_loss(case):
    for coef, value in case.losses.items():
        assert abs(value - case.hf_losses[coef]) <= 2e-6 * case.hf_losses[coef]
    if COEF in case.losses:
        assert case.losses[COEF] - case.losses[0.0] > 0.5 * COEF


@pytest.mark.parametrize("balance", [False, True])
def test_every_gradient(case, balance):
    coef = COEF if balance and not case.pair.config.is_dense else 0.0
    flat = jax.tree_util.tree_leaves_with_path(case.gradients[coef])
    theirs = dict(jax.tree_util.tree_leaves_with_path(case.hf_gradients[coef]))
    assert len(flat) == len(theirs) >= 10
    for path, g in flat:
        name, want = jax.tree_util.keystr(path), np.asarray(theirs[path], np.float64)
        if name == "['layers']['moe']['router']" and coef == 0 and case.pair.config.num_experts_per_tok == 1:
            # the gate is constantly 1: the router learns from the balance loss alone
            assert np.abs(g).max() < 1e-7 and np.abs(want).max() < 1e-7
            continue
        assert np.linalg.norm(want) > 1e-4, f"{name} is not tested: its gradient vanishes"
        assert np.linalg.norm(np.asarray(g, np.float64) - want) <= 1e-5 * np.linalg.norm(want), name


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 1)])
def test_balance_loss_is_that_of_transformers(experts, top_k):
    """C1: value and gradient on the same router logits, with and without a mask."""
    rng = np.random.default_rng(3)
    x_LME = rng.normal(0, 2, (3, B * T, experts)).astype(np.float32)

    @jax.jit
    def value_and_grad(x_LME, valid):
        def loss(x_LME):
            layers = [router_stats(route(x, jnp.eye(experts), top_k), valid) for x in x_LME]
            return balance_loss(jax.tree.map(lambda *a: jnp.stack(a), *layers), "hf_pooled", top_k)

        return jax.value_and_grad(loss)(x_LME)

    for mask in (draw_rows(9).mask, None):
        valid = np.ones(B * T, np.float32) if mask is None else mask.reshape(-1).astype(np.float32)
        value, grad = value_and_grad(x_LME, valid)
        x = torch.tensor(x_LME, requires_grad=True)
        mask = mask if mask is None else torch.tensor(mask)
        want = load_balancing_loss_func(tuple(x), experts, top_k, mask)
        want.backward()
        assert abs(float(value) - want.item()) <= 2e-6 * want.item()
        assert np.abs(np.asarray(grad) - x.grad.numpy()).max() <= 1e-5 * np.abs(x.grad.numpy()).max()


def test_model_statistics_are_those_of_the_router(case):
    """C1 in the whole model: both balance losses from transformers' router logits by the definition."""
    config = case.pair.config
    if config.is_dense:
        return
    valid, k, E = case.rows.mask.reshape(-1) == 1, config.num_experts_per_tok, config.num_local_experts
    f, p = [], []
    for probs in case.hf_probs:
        chosen = np.argsort(-probs, axis=-1)[valid][:, :k]
        f.append(np.bincount(chosen.reshape(-1), minlength=E) / valid.sum())
        p.append(probs[valid].astype(np.float64).mean(axis=0))
    per_layer = sum(E / k * (a @ b) for a, b in zip(f, p, strict=True))
    pooled = E * (np.mean(f, axis=0) @ np.mean(p, axis=0))
    stats = jax.tree.map(jnp.asarray, case.stats)
    assert abs(float(balance_loss(stats, "per_layer", k)) - per_layer) <= 2e-6 * per_layer
    assert abs(float(balance_loss(stats, "hf_pooled", k)) - pooled) <= 2e-6 * pooled


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    p, q = (torch.log_softmax(torch.tensor(np.asarray(z, np.float64)), -1) for z in (p_logits, q_logits))
    return (p.exp() * (p - q)).sum(-1).numpy()


def test_bfloat16(tmp_path, monkeypatch):
    """B7: our bf16 is as near to transformers' fp32 as transformers' own bf16 is; near 0 where no route flips."""
    shape = dict(hidden_size=64, intermediate_size=112, vocab_size=211, num_local_experts=8, num_experts_per_tok=2)
    pair = build(tmp_path / "model", seed=2, dtype=torch.bfloat16, **shape)
    tokens = np.random.default_rng(0).integers(0, 211, (8, 48)).astype(np.int32)
    chosen: list[np.ndarray] = []
    route = moe_block.route

    def watched(*args, **options):
        routing = route(*args, **options)
        jax.debug.callback(lambda e: chosen.append(np.asarray(e)), routing.expert_MC, ordered=True)
        return routing

    monkeypatch.setattr(moe_block, "route", watched)
    logits = np.asarray(jax.jit(lambda m: m(tokens))(ours(pair, ComputeConfig(dtype="bfloat16"))))
    jax.effects_barrier()
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        exact = pair.hf(input_ids=ids, output_router_logits=True)
        rounded = pair.hf.to(torch.bfloat16)(input_ids=ids).logits.float().numpy()
    alike = np.ones(tokens.shape, bool)
    for mine, z in zip(chosen, exact.router_logits, strict=True):
        theirs = np.sort(torch.topk(z, 2).indices.numpy(), axis=-1)
        alike &= (np.sort(mine, axis=-1) == theirs).all(axis=-1).reshape(tokens.shape)
    alike = np.logical_and.accumulate(alike, axis=1)
    assert logits.dtype == np.float32 and alike.sum() > 40
    mine, theirs = kl(exact.logits.numpy(), logits), kl(exact.logits.numpy(), rounded)
    assert mine[alike].mean() <= 1e-4
    assert mine.mean() <= 1.5 * theirs.mean()
