"""Router losses and load statistics against their definitions (NUMERICS C1, C4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.moe.balance import RouterStats, balance_loss, load_metrics, router_stats, z_loss
from mixtral_jax.moe.router import route
from tests.optional import torch
from tests.oracles import mixtral as oracle

L, M, E = 3, 30, 6


def stats_of(logits_LME, valid_M, top_k):
    layers = [router_stats(route(x, jnp.eye(E), top_k), valid_M) for x in logits_LME]
    return jax.tree.map(lambda *a: jnp.stack(a), *layers)


def draw(masked):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (L, M, E)).astype(np.float32)
    valid = (rng.random(M) < 0.6) if masked else np.ones(M, bool)
    return logits, valid.astype(np.float32)


def oracle_stats(logits, valid, top_k):
    """Counts, probability sums, z and entropy of each layer, token by token."""
    counts, probs, z, entropy = [], [], [], []
    for layer in logits:
        n, total, squares, nats = np.zeros(E), torch.zeros(E, dtype=torch.float64), 0.0, 0.0
        for row, is_token in zip(layer, valid, strict=True):
            if is_token:
                p = torch.softmax(row, 0)
                n[oracle.choose(p, top_k)] += 1
                total = total + p
                squares = squares + torch.logsumexp(row, 0) ** 2
                nats += -(p * torch.log(p)).sum().item()
        counts.append(n.tolist())
        probs.append(total)
        z.append(squares)
        entropy.append(nats)
    return counts, probs, z, entropy


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_and_gradients(masked, top_k):
    logits, valid = draw(masked)
    losses = {
        "per_layer": lambda s: balance_loss(s, "per_layer", top_k),
        "hf_pooled": lambda s: balance_loss(s, "hf_pooled", top_k),
        "z": z_loss,
    }

    @jax.jit
    def run(logits, valid):
        stats = stats_of(logits, valid, top_k)
        return stats, {
            n: jax.value_and_grad(lambda x, f=f: f(stats_of(x, valid, top_k)))(logits) for n, f in losses.items()
        }

    stats, got = run(logits, valid)
    n = valid.sum()
    for name, (value, grad) in got.items():
        x = oracle.tensors(logits)
        counts, probs, z, entropy = oracle_stats(x, valid, top_k)
        want = {
            "per_layer": lambda: sum(oracle.switch_balance(c, p, n, top_k) for c, p in zip(counts, probs, strict=True)),  # noqa: B023 - called in the same turn of the loop
            "hf_pooled": lambda: oracle.pooled_balance(counts, probs, n, top_k),  # noqa: B023 - called in the same turn of the loop
            "z": lambda: sum(z) / n,  # noqa: B023 - called in the same turn of the loop
        }[name]()
        want.backward()
        assert abs(float(value) - want.item()) <= 2e-6 * want.item(), name
        assert np.abs(np.asarray(grad) - x.grad.numpy()).max() <= 1e-5 * x.grad.abs().max().item(), name
        assert not np.asarray(grad)[:, valid == 0].any()  # padding gets no gradient
    np.testing.assert_array_equal(stats.counts_LE, counts)
    np.testing.assert_allclose(stats.probs_LE, [p.detach() for p in probs], rtol=2e-6)
    np.testing.assert_allclose(stats.z_L, [s.item() for s in z], rtol=2e-6)
    np.testing.assert_allclose(stats.entropy_L, entropy, rtol=2e-6)
    np.testing.assert_array_equal(stats.tokens_L, [n] * L)


def made_of(counts_LE, tokens=80.0, top_k=2):
    """Statistics of a router whose probabilities are exactly its loads."""
    counts = jnp.asarray(counts_LE, jnp.float32)
    zero = jnp.zeros(len(counts_LE))
    return RouterStats(counts, counts / top_k, *[zero] * 5, jnp.full(len(counts_LE), tokens))


def test_balanced_values():
    even = made_of([[20.0] * 8] * 4)
    assert float(balance_loss(even, "per_layer", 2)) == pytest.approx(4 * 1.0)
    assert float(balance_loss(even, "hf_pooled", 2)) == pytest.approx(2.0)


def test_pooling_hides_collapse():
    """Each of 4 layers sends everything to two experts, but to different ones: 2.0 pooled (perfect), 4.0 per layer."""
    counts = np.zeros((4, 8))
    for layer in range(4):
        counts[layer, 2 * layer : 2 * layer + 2] = 80
    stats = made_of(counts)
    assert float(balance_loss(stats, "hf_pooled", 2)) == pytest.approx(2.0)
    assert float(balance_loss(stats, "per_layer", 2)) / 4 == pytest.approx(4.0)
    assert float(load_metrics(stats, 2)["moe/balance"]) == pytest.approx(4.0)


def test_conversion_between_the_two_where_layers_route_alike():
    """hf_pooled = k * the mean per layer, so coef(per_layer, summed) = coef(hf_pooled) * k / L."""
    stats = made_of([[60.0, 40, 30, 10, 8, 6, 4, 2]] * 4)
    per_layer, pooled = (float(balance_loss(stats, kind, 2)) for kind in ("per_layer", "hf_pooled"))
    assert pooled == pytest.approx(2 * per_layer / 4)
    assert 0.02 * pooled == pytest.approx(0.02 * 2 / 4 * per_layer)


def test_load_metrics():
    counts = np.array([[80.0, 40, 40, 0], [40, 40, 40, 40]])
    drops = dict(dropped_L=jnp.asarray([16.0, 0.0]), dropped_first_L=jnp.asarray([8.0, 0.0]))
    stats = made_of(counts)._replace(**drops, entropy_L=jnp.asarray([80.0, 40.0]), overflow_L=jnp.asarray([36.0, 40.0]))
    got = {k: float(v) for k, v in load_metrics(stats, 2).items()}
    assert got["moe/load_max"] == pytest.approx(2.0) and got["moe/load_min"] == 0
    assert got["moe/dead_fraction"] == pytest.approx(1 / 8)
    assert got["moe/entropy"] == pytest.approx(0.75)
    assert got["moe/dropped_fraction"] == pytest.approx(0.05) == got["moe/dropped_first"]  # of 160 and of 80
    assert got["moe/overflow_fraction"] == pytest.approx((36 / 144 + 40 / 160) / 2)  # of what was not dropped


def test_no_token_at_all_gives_zero_not_nan():
    stats = jax.tree.map(jnp.zeros_like, made_of([[0.0] * 4] * 2))
    for value in (balance_loss(stats, "per_layer", 2), balance_loss(stats, "hf_pooled", 2), z_loss(stats)):
        assert float(value) == 0
    assert all(np.isfinite(float(v)) for v in load_metrics(stats, 2).values())
