"""maj@k of MATH as a filter of the harness; importing this registers it as `math_majority`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter


@register_filter("math_majority")
class MathMajority(Filter):
    """Of each problem's solutions the first one with the answer that most of them have, normalised as Minerva does."""

    def apply(self, resps: Iterable[Sequence[str]], docs: Any) -> list[list[str]]:
        return [[_majority(solutions)] for solutions in resps]


def _majority(solutions: Sequence[str]) -> str:
    from lm_eval.tasks.minerva_math.utils import get_unnormalized_answer, normalize_final_answer

    answers = [normalize_final_answer(get_unnormalized_answer(text)) for text in solutions]
    return solutions[answers.index(Counter(answers).most_common(1)[0][0])]
