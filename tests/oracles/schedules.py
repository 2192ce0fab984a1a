"""The learning rate of each update of a run with phases, step by step from the definition, in float64."""

import math


def learning_rates(
    steps: int, peak: float, warmup: int, schedule: str, decay: int | None, final: float, parts: list[tuple]
) -> list[float]:
    """Of updates 1 ... steps. `parts`: (from_step, schedule, fraction of the peak at its end), in order.

    A part begins with the rate that the update before it had, and ends where the next part begins, or with the last
    step. Before the first one the run's own schedule holds, wsd's without a decay.
    """
    schedule = "constant" if parts and schedule == "wsd" else schedule
    rates: list[float] = []
    begins = None
    for n in range(1, steps + 1):
        if n <= warmup:
            rates.append(peak * n / warmup)
            continue
        own = [i for i, part in enumerate(parts) if part[0] < n]
        if not own:
            rates.append(peak * _fraction(schedule, n, steps, warmup, decay, final))
            continue
        first, kind, fraction = parts[own[-1]]
        last = parts[own[-1] + 1][0] if own[-1] + 1 < len(parts) else steps
        if n == first + 1:  # the rate that stands: of the update before, or what the schedule would begin with
            begins = rates[-1] if rates else peak * _fraction(schedule, 0, steps, warmup, decay, final)
        done = (n - first) / (last - first)
        cosine = (1 - math.cos(math.pi * done)) / 2
        way = {"constant": 0.0, "linear": done, "cosine": cosine, "sqrt": done**0.5}[kind]
        rates.append(begins + (peak * fraction - begins) * way)
    return rates


def _fraction(schedule: str, n: int, steps: int, warmup: int, decay: int | None, final: float) -> float:
    if schedule == "constant":
        return 1.0
    length = steps - warmup
    if schedule == "wsd":
        length = decay or min(max(steps // 10, 1), length)
    done = min(max((n - (steps - length)) / length, 0.0), 1.0)
    return final + (1 - final) * ((1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done)
