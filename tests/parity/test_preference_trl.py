"""Our preference losses against TRL's own code, fed the same token log-probabilities: values, gradients, metrics."""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # experimental modules say that they are
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

from mixtral_jax.train.preference.config import DpoConfig, LossType
from mixtral_jax.train.preference.losses import Pairs, completion_weights, dpo_loss, dpo_metrics

TRL_TYPES = [kind for kind in get_args(LossType) if kind not in ("simpo", "orpo")]
F_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
EPSILON = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.05}
PAIRS, T = 6, 24
CPU = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


class Draw:
    """P chosen rows, then P rejected rows of T tokens; completions of unequal lengths behind unequal prompts."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.completion = np.zeros((2 * PAIRS, T), np.int32)
        for row in self.completion:
            start = rng.integers(1, 8)
            row[start : start + rng.integers(1, T - 8)] = 1
        shifted = self.completion[:, 1:]
        self.logps = (-rng.exponential(1.0, shifted.shape) * shifted).astype(np.float32)
        index = shifted.cumsum(1) * shifted
        n = shifted.sum(1)
        shared = np.tile(np.minimum(n[:PAIRS], n[PAIRS:]), 2)[:, None]
        self.index, self.n, self.shared = index, n, shared
        ref = self.logps.sum(1) + rng.normal(0, 2, 2 * PAIRS)
        self.ref = ref.astype(np.float32)

    def pairs(self, logps, ld_alpha=None):
        sums = jnp.sum(completion_weights(self.index, self.shared, ld_alpha) * logps, axis=1)
        nll = -jnp.sum(logps * (self.index > 0), axis=1)[:PAIRS]
        return Pairs(
            sums[:PAIRS],
            sums[PAIRS:],
            self.ref[:PAIRS],
            self.ref[PAIRS:],
            self.n[:PAIRS],
            self.n[PAIRS:],
            chosen_nll=nll,
        )


def trl_dpo(draw, config):
    """TRL's loss, its gradient with respect to each token's log-probability, and its metrics; no trainer is built."""
    trainer = object.__new__(DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = CPU
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.precompute_ref_logps = True
    trainer.ld_alpha, trainer.beta = config.ld_alpha, config.beta
    trainer.f_divergence_type = {"js": "js_divergence", "alpha": "alpha_divergence"}.get(
        config.f_divergence, config.f_divergence
    )
    trainer.f_alpha_divergence_coef = config.f_alpha
    trainer.loss_types = list(config.loss_type)
    trainer.loss_weights = list(config.loss_weights or [1.0] * len(config.loss_type))
    trainer.label_smoothing = config.label_smoothing
    trainer.args = SimpleNamespace(discopop_tau=config.discopop_tau)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    logps = torch.tensor(draw.logps, requires_grad=True)
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )
    completion = torch.tensor(draw.completion)
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": torch.tensor(draw.ref[:PAIRS]),
        "ref_rejected_logps": torch.tensor(draw.ref[PAIRS:]),
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), logps.grad.numpy(), {k: v[-1] for k, v in trainer._metrics["train"].items()}


def ours(draw, config):
    def f(logps):
        return dpo_loss(config, draw.pairs(logps, config.ld_alpha))

    value, grad = jax.value_and_grad(f)(jnp.asarray(draw.logps))
    return value, grad, dpo_metrics(config, draw.pairs(draw.logps, config.ld_alpha))


def compare(mine, theirs, completion):
    value, grad, metrics = mine
    their_value, their_grad, their_metrics = theirs
    np.testing.assert_allclose(value, their_value, rtol=2e-5)
    inside = completion[:, 1:] > 0  # TRL also moves the zeros outside the completion; there is nothing to learn there
    scale = np.abs(their_grad[inside]).max()
    assert scale > 0
    np.testing.assert_allclose(np.where(inside, grad, 0), np.where(inside, their_grad, 0), rtol=1e-4, atol=1e-5 * scale)
    for name, number in metrics.items():
        np.testing.assert_allclose(number, their_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", TRL_TYPES)
@pytest.mark.parametrize(("seed", "beta"), [(0, 0.1), (1, 0.5), (2, 0.02)])
def test_every_type(kind, seed, beta):
    config = DpoConfig(loss_type=kind, beta=beta, label_smoothing=EPSILON.get(kind, 0.0))
    draw = Draw(seed)
    mine, theirs = ours(draw, config), trl_dpo(draw, config)
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert set(mine[2]) == names | {"logps/chosen", "logps/rejected"} <= set(theirs[2])
    compare(mine, theirs, draw.completion)


@pytest.mark.parametrize("kind", F_TYPES)
@pytest.mark.parametrize(
    "divergence", [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 1.5), ("alpha", 1.0)]
)
def test_f_divergences(kind, divergence):
    name, alpha = divergence
    config = DpoConfig(loss_type=kind, label_smoothing=EPSILON.get(kind, 0.0), f_divergence=name, f_alpha=alpha)
    compare(ours(Draw(3), config), trl_dpo(Draw(3), config), Draw(3).completion)


def test_alpha_bound():
    """(α-1)Δ beyond 80: both stop there, in value and in gradient."""
    draw = Draw(4)
    draw.ref[PAIRS] = draw.logps[PAIRS].sum() - 120
    config = DpoConfig(f_divergence="alpha", f_alpha=1.9, loss_type="hinge")
    mine, theirs = ours(draw, config), trl_dpo(draw, config)
    compare(mine, theirs, draw.completion)
    assert not np.any(mine[1][PAIRS]) and np.any(mine[1][0])


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sft", "apo_zero"])
def test_ld_alpha(kind, ld_alpha):
    config = DpoConfig(loss_type=kind, ld_alpha=ld_alpha)
    compare(ours(Draw(5), config), trl_dpo(Draw(5), config), Draw(5).completion)


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [
        (["sigmoid", "sft"], [1.0, 0.5]),  # RPO
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO
        (["hinge", "ipo"], None),
        (["aot", "apo_down", "exo_pair"], [0.1, 2.0, 0.7]),
    ],
)
def test_mixtures(kinds, weights):
    # TRL's sigmoid knows no label smoothing, ours does: smoothing only where both have it.
    epsilon = 1e-3 if "exo_pair" in kinds else 0.0
    config = DpoConfig(loss_type=kinds, loss_weights=weights, label_smoothing=epsilon)
    compare(ours(Draw(6), config), trl_dpo(Draw(6), config), Draw(6).completion)


def trl_averaged(trainer_class, draw, config, nll_weight=1.0):
    """CPOTrainer or ORPOTrainer on given log-probabilities: its whole loss, with the forward pass replaced."""
    trainer = object.__new__(trainer_class)
    trainer.accelerator, trainer.aux_loss_enabled = CPU, False
    trainer.beta, trainer.label_smoothing = config.beta, config.label_smoothing
    trainer.loss_type, trainer.simpo_gamma, trainer.alpha, trainer.cpo_alpha = "simpo", config.gamma, 0.0, nll_weight
    logps = torch.tensor(draw.logps, requires_grad=True)
    mask = torch.tensor(draw.completion[:, 1:])
    average = (logps * mask).sum(1) / mask.sum(1)
    nll = -(logps * mask)[:PAIRS].sum() / mask[:PAIRS].sum()
    trainer.concatenated_forward = lambda *_: (average[:PAIRS], average[PAIRS:], logps, logps, nll)
    loss, metrics = trainer_class.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    return loss.item(), logps.grad.numpy(), metrics


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize(("beta", "gamma", "epsilon"), [(2.0, 0.5, 0.0), (2.5, 1.4, 0.0), (0.1, 0.0, 0.2)])
def test_simpo(seed, beta, gamma, epsilon):
    """CPOTrainer's simpo; its cpo_alpha is our weight of sft."""
    draw = Draw(seed)
    options = {"beta": beta, "gamma": gamma, "label_smoothing": epsilon}
    alone = DpoConfig(loss_type="simpo", **options)
    compare(ours(draw, alone), trl_averaged(CPOTrainer, draw, alone, 0.0), draw.completion)
    mixed = DpoConfig(loss_type=["simpo", "sft"], loss_weights=[1, 0.3], **options)
    compare(ours(draw, mixed), trl_averaged(CPOTrainer, draw, mixed, 0.3), draw.completion)


@pytest.mark.parametrize("seed", [9, 10])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(seed, beta):
    """ORPOTrainer, given a likelihood of the completion (its own forward takes prompt and completion together)."""
    config = DpoConfig(loss_type="orpo", beta=beta)
    mine = ours(Draw(seed), config)
    assert {"log_odds_ratio", "log_odds_chosen"} <= set(mine[2])
    compare(mine, trl_averaged(ORPOTrainer, Draw(seed), config), Draw(seed).completion)
