"""The preference losses by their definitions: float64, one pair at a time, no tricks for large numbers."""

import math


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def score(ratio, divergence, alpha):
    """f'(π/π_ref) at log ratio Δ: the derivative of the generator of each divergence."""
    t = math.exp(ratio)
    return {
        "reverse_kl": lambda: math.log(t),
        "forward_kl": lambda: 1 - 1 / t,
        "js": lambda: math.log(2 * t / (t + 1)),
        "alpha": lambda: math.log(t) if alpha == 1 else (t ** (alpha - 1) - 1) / (alpha - 1),
    }[divergence]()


def pair_losses(kind, p, *, beta=0.1, eps=0.0, divergence="reverse_kl", alpha=0.5, gamma=0.5, tau=0.05):
    """Loss of each pair; `p` holds lists policy_chosen, policy_rejected, ref_*, *_lengths and chosen_nll."""
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths")
    rows = list(zip(*(p[name] for name in names), strict=True))
    if kind == "aot":
        a = sorted(policy_w - policy_l for policy_w, policy_l, *_ in rows)
        b = sorted(ref_w - ref_l for _, _, ref_w, ref_l, *_ in rows)
        return [smoothed(beta * (x - y), eps) for x, y in zip(a, b, strict=True)]
    if kind == "aot_unpaired":
        a = sorted(policy_w - ref_w for policy_w, _, ref_w, *_ in rows)
        b = sorted(policy_l - ref_l for _, policy_l, _, ref_l, *_ in rows)
        return [smoothed(beta * (x - y), eps) for x, y in zip(a, b, strict=True)]
    if kind in ("simpo", "orpo"):
        return [without_reference(kind, w / n_w, l / n_l, beta, eps, gamma) for w, l, _, _, n_w, n_l in rows]
    out = []
    for policy_w, policy_l, ref_w, ref_l, n_w, n_l in rows:
        w, l = policy_w - ref_w, policy_l - ref_l
        s_w, s_l = score(w, divergence, alpha), score(l, divergence, alpha)
        out.append(
            of_scores(kind, s_w, s_l, n_w, n_l, beta, eps, tau) if kind in SCORED else of_ratios(kind, w, l, beta)
        )
    return out


SCORED = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "sigmoid_norm", "sft")


def smoothed(x, eps):
    return -(1 - eps) * math.log(sigmoid(x)) - eps * math.log(1 - sigmoid(x))


def of_scores(kind, s_w, s_l, n_w, n_l, beta, eps, tau):
    """Losses of the scores s = f(Δ)."""
    x = beta * (s_w - s_l)
    win = sigmoid(x)  # the model's probability that the chosen answer wins
    match kind:
        case "sigmoid":
            return -(1 - eps) * math.log(win) - eps * math.log(1 - win)
        case "robust":
            return (-(1 - eps) * math.log(win) + eps * math.log(1 - win)) / (1 - 2 * eps)
        case "hinge":
            return max(0.0, 1 - x)
        case "ipo":
            return (s_w / n_w - s_l / n_l - 1 / (2 * beta)) ** 2
        case "exo_pair":
            return win * math.log(win / (1 - eps)) + (1 - win) * math.log((1 - win) / eps)
        case "discopop":
            mix = sigmoid(x / tau)
            return -(1 - mix) * math.log(win) + mix * math.exp(-x)
        case "sigmoid_norm":
            return -math.log(sigmoid(beta * (s_w / n_w - s_l / n_l)))
        case "sft":
            return 0.0  # no pair term; see loss()


def of_ratios(kind, w, l, beta):
    """Losses of the log ratios Δ themselves."""
    match kind:
        case "nca_pair":
            lost = -math.log(sigmoid(-beta * w)) / 2 - math.log(sigmoid(-beta * l)) / 2
            return lost - math.log(sigmoid(beta * w))
        case "bco_pair":
            return -math.log(sigmoid(beta * w)) - math.log(1 - sigmoid(beta * l))
        case "sppo_hard":
            return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2
        case "apo_zero":
            return 1 - sigmoid(beta * w) + sigmoid(beta * l)
        case "apo_down":
            return sigmoid(beta * w) + 1 - sigmoid(beta * (w - l))


def without_reference(kind, per_token_w, per_token_l, beta, eps, gamma):
    if kind == "simpo":
        return smoothed(beta * (per_token_w - per_token_l) - gamma, eps)
    p_w, p_l = math.exp(per_token_w), math.exp(per_token_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -beta * math.log(odds_ratio / (1 + odds_ratio))


def loss(kind, p, **options):
    """Mean over the pairs, plus the token mean of chosen_nll for sft and orpo."""
    value = math.fsum(pair_losses(kind, p, **options)) / len(p["policy_chosen"])
    if kind in ("sft", "orpo"):
        value += math.fsum(p["chosen_nll"]) / sum(p["chosen_lengths"])
    return value


def gradient(kind, p, name, **options):
    """d loss / d p[name] by central differences; chosen_nll follows policy_chosen, as it does by default."""
    out, h = [], 1e-5
    for i in range(len(p[name])):
        values = []
        for step in (h, -h):
            moved = {k: list(v) for k, v in p.items()}
            moved[name][i] += step
            if name == "policy_chosen":
                moved["chosen_nll"][i] -= step
            values.append(loss(kind, moved, **options))
        out.append((values[0] - values[1]) / (2 * h))
    return out
