"""Preference losses against their definitions in float64, values and gradients; divisors; limits; refused calls."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.train import preference
from mixtral_jax.train.preference.config import DpoConfig, LossType
from mixtral_jax.train.preference.losses import Pairs, completion_weights, dpo_loss, dpo_metrics, loss
from tests.oracles import preference as oracle

TYPES = get_args(LossType)
F_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
EPSILON = {"exo_pair": 1e-3, "robust": 0.1}
NAMES = ("policy_chosen", "policy_rejected")


def draw(seed=0, pairs=7):
    """Log-probabilities of answers of 3 to 40 tokens, near those of a reference."""
    rng = np.random.default_rng(seed)
    n_w, n_l = rng.integers(3, 40, pairs), rng.integers(3, 40, pairs)
    ref_w, ref_l = -n_w * rng.uniform(0.5, 3, pairs), -n_l * rng.uniform(0.5, 3, pairs)
    policy_w, policy_l = ref_w + rng.normal(0, 1.5, pairs), ref_l + rng.normal(0, 1.5, pairs)
    policy_w, policy_l = np.minimum(policy_w, -0.5), np.minimum(policy_l, -0.5)
    return {
        "policy_chosen": policy_w,
        "policy_rejected": policy_l,
        "ref_chosen": ref_w,
        "ref_rejected": ref_l,
        "chosen_lengths": n_w,
        "rejected_lengths": n_l,
    }


def twin(p):
    """The same numbers for the oracle: lists, rounded to float32 as ours are."""
    lists = {k: [float(np.float32(x)) for x in v] for k, v in p.items()}
    return lists | {"chosen_nll": [-x for x in lists["policy_chosen"]]}


def value_and_grads(kind, p, **options):
    def f(policy_chosen, policy_rejected):
        return loss(kind, **{**p, "policy_chosen": policy_chosen, "policy_rejected": policy_rejected}, **options)

    return jax.value_and_grad(f, argnums=(0, 1))(jnp.float32(p["policy_chosen"]), jnp.float32(p["policy_rejected"]))


def check(kind, p, *, eps=0.0, divergence="reverse_kl", **options):
    ours = {"f_alpha" if k == "alpha" else "discopop_tau" if k == "tau" else k: v for k, v in options.items()}
    value, grads = value_and_grads(kind, p, label_smoothing=eps, f_divergence=divergence, **ours)
    args = {"eps": eps, "divergence": divergence, **options}
    np.testing.assert_allclose(value, oracle.loss(kind, twin(p), **args), rtol=2e-5, atol=1e-6)
    for name, grad in zip(NAMES, grads, strict=True):
        np.testing.assert_allclose(grad, oracle.gradient(kind, twin(p), name, **args), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_definition(kind, beta):
    check(kind, draw(), beta=beta, eps=EPSILON.get(kind, 0.0))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo"])
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_label_smoothing(kind, eps):
    check(kind, draw(1), eps=eps, beta=0.3)


@pytest.mark.parametrize("kind", F_TYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_divergence(kind, divergence):
    for alpha in (0.5, 1.7) if divergence == "alpha" else (0.5,):
        check(kind, draw(2), eps=EPSILON.get(kind, 0.0), divergence=divergence, alpha=alpha)


def test_gamma_and_tau():
    check("simpo", draw(3), beta=2.0, gamma=1.4)
    check("discopop", draw(3), tau=0.3)


@pytest.mark.parametrize("kind", F_TYPES)
def test_alpha_near_one_is_reverse_kl(kind):
    """Also just outside the branch, where (t^(α-1) - 1) / (α-1) cancels if it is not written with expm1."""
    p, eps = draw(4), EPSILON.get(kind, 0.0)
    plain, plain_grads = value_and_grads(kind, p, label_smoothing=eps)
    for distance in (0.0, 5e-7, 2e-6, 1e-5, -1e-5):
        near, grads = value_and_grads(
            kind, p, label_smoothing=eps, f_divergence="alpha_divergence", f_alpha=1 + distance
        )
        np.testing.assert_allclose(near, plain, rtol=1e-4)
        for a, b in zip(grads, plain_grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_alpha_zero_is_forward_kl_and_js_is_zero_at_the_reference():
    p = draw(5)
    forward, _ = value_and_grads("sigmoid", p, f_divergence="forward_kl")
    alpha, _ = value_and_grads("sigmoid", p, f_divergence="alpha", f_alpha=0.0)
    np.testing.assert_allclose(alpha, forward, rtol=1e-5)
    same = {**p, "policy_chosen": p["ref_chosen"], "policy_rejected": p["ref_rejected"]}
    for divergence in DIVERGENCES:  # s = 0 on both sides, so ipo is (1/2β)² whatever the lengths
        np.testing.assert_allclose(loss("ipo", **same, f_divergence=divergence), 25.0, rtol=1e-6)


def test_without_a_reference_is_a_reference_of_zero():
    p = draw(6)
    policy = {k: v for k, v in p.items() if not k.startswith("ref")}
    zeros = np.zeros_like(p["ref_chosen"])
    for kind in TYPES:
        eps = EPSILON.get(kind, 0.0)
        free = loss(kind, **policy, label_smoothing=eps)
        assert free == loss(kind, **policy, ref_chosen=zeros, ref_rejected=zeros, label_smoothing=eps)
    np.testing.assert_allclose(
        loss("sigmoid", **policy),
        np.mean(np.log1p(np.exp(-0.1 * (p["policy_chosen"] - p["policy_rejected"])))),
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", ["simpo", "orpo", "sft"])
def test_simpo_orpo_and_sft_read_no_reference(kind):
    p = draw(7)
    assert loss(kind, **p) == loss(kind, **{**p, "ref_chosen": p["ref_chosen"] - 5})


def test_mixture_is_the_weighted_sum():
    p = draw(8)
    mixed, grads = value_and_grads(("sigmoid", "bco_pair", "sft"), p, loss_weights=(0.8, 0.2, 1.5))
    parts = [value_and_grads(kind, p) for kind in ("sigmoid", "bco_pair", "sft")]
    np.testing.assert_allclose(mixed, sum(w * v for w, (v, _) in zip((0.8, 0.2, 1.5), parts, strict=True)), rtol=1e-6)
    for side in (0, 1):
        expected = sum(w * g[side] for w, (_, g) in zip((0.8, 0.2, 1.5), parts, strict=True))
        np.testing.assert_allclose(grads[side], expected, rtol=1e-5, atol=1e-8)
    assert loss(["sigmoid", "sft"], **p) == loss("sigmoid", **p) + loss("sft", **p)


@pytest.mark.parametrize("kind", [k for k in TYPES if not k.startswith("aot")])
def test_parts_of_a_step_add_up(kind):
    """Unequal micro-batches, each with the divisors of the step, are one full batch: pairs, and chosen tokens."""
    p, eps = draw(9, pairs=8), EPSILON.get(kind, 0.0)
    config = DpoConfig(loss_type=kind, label_smoothing=eps)
    whole, whole_metrics = dpo_loss(config, Pairs(**p)), dpo_metrics(config, Pairs(**p))
    parts = [Pairs(**{k: v[cut] for k, v in p.items()}) for cut in (slice(0, 3), slice(3, 4), slice(4, 8))]
    divisors = {"num_pairs": 8, "num_chosen_tokens": p["chosen_lengths"].sum()}
    np.testing.assert_allclose(sum(dpo_loss(config, part, **divisors) for part in parts), whole, rtol=1e-5)
    for name, value in whole_metrics.items():
        total = sum(dpo_metrics(config, part, num_pairs=8)[name] for part in parts)
        np.testing.assert_allclose(total, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rubbish", [0.0, np.nan, np.inf])
def test_filling_counts_nowhere(kind, rubbish):
    p, eps = draw(10), EPSILON.get(kind, 0.0)
    expected, expected_grads = value_and_grads(kind, p, label_smoothing=eps)
    where = [0, 3, 3]  # filling at the front and twice in the middle
    filled = {k: np.insert(v, where, 0 if "lengths" in k else rubbish) for k, v in p.items()}
    mask = np.insert(np.ones(7), where, 0)
    value, grads = value_and_grads(kind, filled, label_smoothing=eps, pair_mask=mask)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, np.insert(want, where, 0.0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [k for k in TYPES if k not in ("ipo", "sppo_hard", "orpo")])
@pytest.mark.parametrize("gap", [-2000.0, 2000.0])
def test_far_from_the_reference_stays_finite(kind, gap):
    p = draw(11, pairs=2)
    p |= {"policy_chosen": p["ref_chosen"] + gap / 2, "policy_rejected": p["ref_rejected"] - gap / 2}
    value, grads = value_and_grads(kind, p, label_smoothing=EPSILON.get(kind, 0.0))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_orpo_takes_a_likelihood_of_its_own():
    p, nll = draw(12), np.arange(7.0)
    without = loss("orpo", **p) - (-p["policy_chosen"].sum() / p["chosen_lengths"].sum())
    np.testing.assert_allclose(
        loss("orpo", **p, chosen_nll=nll, num_chosen_tokens=50), without + nll.sum() / 50, rtol=1e-5
    )


def test_completion_weights_of_ld_alpha():
    index = np.array([[0, 0, 1, 2, 3], [0, 1, 2, 0, 0]])  # completions of 3 and 2 tokens: they share 2
    shared = np.array([[2], [2]])
    np.testing.assert_array_equal(
        completion_weights(index, shared, 0.3), np.float32([[0, 0, 1, 1, 0.3], [0, 1, 1, 0, 0]])
    )
    np.testing.assert_array_equal(completion_weights(index, shared, None), index > 0)


def test_metrics_by_hand():
    pairs = Pairs(
        policy_chosen=jnp.float32([-10, -20, -9]),
        policy_rejected=jnp.float32([-12, -19, -9]),
        ref_chosen=jnp.float32([-11, -18, -9]),
        ref_rejected=jnp.float32([-11, -18, -9]),
        chosen_lengths=jnp.int32([5, 10, 3]),
        rejected_lengths=jnp.int32([4, 10, 3]),
    )
    m = dpo_metrics(DpoConfig(beta=0.5), pairs)
    expected = {
        "rewards/chosen": 0.5 * (1 - 2 + 0) / 3,
        "rewards/rejected": 0.5 * (-1 - 1 + 0) / 3,
        "rewards/margins": 0.5 * (2 - 1 + 0) / 3,
        "rewards/accuracies": 1 / 3,  # a tie is no success
        "logps/chosen": -13,
        "logps/rejected": -40 / 3,
    }
    assert m.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(m[name], value, rtol=1e-6)
    forward = dpo_metrics(DpoConfig(beta=0.5, f_divergence="forward_kl"), pairs)
    assert forward["rewards/chosen"] == m["rewards/chosen"]  # raw βΔ, whatever the divergence
    simpo = dpo_metrics(DpoConfig(loss_type="simpo", beta=0.5), pairs)
    np.testing.assert_allclose(simpo["logps/chosen"], -(2 + 2 + 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(simpo["rewards/rejected"], -0.5 * (3 + 1.9 + 3) / 3, rtol=1e-6)


def test_metrics_have_no_gradient_and_jit_by_configuration():
    p = draw(13)
    config = DpoConfig(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5])
    step = jax.jit(dpo_loss, static_argnums=0)  # the configuration is hashable
    np.testing.assert_allclose(step(config, Pairs(**p)), dpo_loss(config, Pairs(**p)), rtol=1e-6)
    grad = jax.grad(lambda x: dpo_metrics(config, Pairs(**{**p, "policy_chosen": x}))["logps/chosen"])
    np.testing.assert_array_equal(grad(jnp.float32(p["policy_chosen"])), 0)


REFUSED_CALLS = [
    (("sigmod", {}), "loss_type 'sigmod' is unknown: did you mean sigmoid"),
    (("exo_pair", {}), "exo_pair needs label_smoothing above 0"),
    (("robust", {"label_smoothing": 0.5}), "robust needs label_smoothing from 0 to below 0.5, got 0.5"),
    (("nca_pair", {"f_divergence": "js"}), "f_divergence js is defined for .* not for nca_pair"),
    (("sigmoid", {"f_divergence": "kl"}), "f_divergence 'kl' is unknown"),
    ((("sigmoid", "sft"), {"loss_weights": (1.0,)}), "loss_weights has 1 numbers for 2 loss types"),
    (("sigmoid", {"beta": 0.0}), "beta must be above 0, got 0.0"),
    (("ipo", {"chosen_lengths": None}), "ipo needs chosen_lengths and rejected_lengths"),
    (("sft", {"chosen_lengths": None}), "sft needs chosen_lengths or num_chosen_tokens"),
    (("sigmoid", {"ref_chosen": None}), "both ref_chosen and ref_rejected"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED_CALLS)
def test_refused_calls(call, sentence):
    kind, changed = call
    with pytest.raises(ValueError, match=sentence) as error:
        loss(kind, **{**draw(), **changed})
    assert "\n" not in str(error.value)


def test_the_package_has_the_loss_as_a_pure_function_of_log_probabilities():
    chosen, rejected, ref_chosen, ref_rejected = (jnp.array([x]) for x in (-10.0, -12.0, -11.0, -11.5))
    value = preference.loss(
        "sigmoid", policy_chosen=chosen, policy_rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected,
        beta=0.1,
    )  # fmt: skip
    assert float(value) == pytest.approx(math.log1p(math.exp(-0.1 * 1.5)), rel=1e-6)


def test_losses_at_the_reference():
    """Where policy and reference agree, δ = 0: log 2, 1, 1, 2 log 2 and so on, whatever the lengths."""
    p = draw(14)
    same = {**p, "policy_chosen": p["ref_chosen"], "policy_rejected": p["ref_rejected"]}
    ln2 = math.log(2)
    expected = {"sigmoid": ln2, "robust": ln2, "hinge": 1, "ipo": 25, "nca_pair": 2 * ln2, "bco_pair": 2 * ln2}
    expected |= {"sppo_hard": 50, "aot": ln2, "aot_unpaired": ln2, "apo_zero": 1, "apo_down": 1, "sigmoid_norm": ln2}
    expected |= {"discopop": 0.5 * ln2 + 0.5}
    for kind, value in expected.items():
        np.testing.assert_allclose(loss(kind, **same), value, rtol=1e-5, err_msg=kind)
