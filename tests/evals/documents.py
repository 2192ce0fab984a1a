"""A few documents of each data set of the local tasks, in the columns that it has on the hub. We wrote them all."""

from collections.abc import Callable
from typing import Any

LETTERS = "ABCDE"
Document = dict[str, Any]


def _lettered(i: int, count: int) -> Document:
    return {
        "question": f"Which number follows {i}?",
        "question_stem": f"Which number follows {i}?",
        "choices": {"text": [str(i + c) for c in range(count)], "label": list(LETTERS[:count])},
        "answerKey": "B",
    }


def _options(i: int) -> Document:
    letters = {f"option_{letter}": f"number {i + c}" for c, letter in enumerate("abcd")}
    return {"id": f"q/{i}", "instruction": f"Welche Zahl folgt auf {i}?", "answer": "B", **letters, "option_e": None}


def _ending(i: int) -> Document:
    endings = [f"counts to {i + c}. [substeps] Then it stops." for c in range(4)]
    label = str(i % 4)
    return {
        "activity_label": "Counting", "ctx_a": f"[header] Count on [title] A child is at {i}.", "ctx_b": "the child",
        "endings": endings, "label": label,
    }  # fmt: skip


def _question(i: int) -> Document:
    return {"subject": ("anatomy", "virology")[i % 2], **_lettered(i, 4), "choices": list("stuv"), "answer": i % 4}


def _truth(i: int) -> Document:
    choices = {"choices": [f"It is {i}.", f"It is not {i}.", "Nobody knows."], "labels": [1, 0, 0]}
    return {"question": f"What is {i}?", "mc1_targets": choices, "mc2_targets": choices}


def _bias(i: int) -> Document:
    groups = {"ans0": ["the old one", "old"], "ans1": ["the young one", "nonOld"], "ans2": ["Not known", "unknown"]}
    return {
        "context": f"An old and a young person met {i} times.", "question": "Who was late?",
        "ans0": "The old one", "ans1": "The young one", "ans2": "Not known", "answer_info": groups,
        "label": 2 if i % 2 else 1, "additional_metadata": {"stereotyped_groups": ["old"]}, "category": "Age",
        "question_polarity": "neg", "context_condition": "ambig" if i % 2 else "disambig",
    }  # fmt: skip


def _program(i: int) -> Document:
    test = f"\ndef check(candidate):\n    assert candidate(1) == {1 + i}\n"
    return {
        "task_id": f"X/{i}", "prompt": f'def f(x):\n    """Add {i}."""\n', "entry_point": "f", "test": test,
        "canonical_solution": f"    return x + {i}\n",
    }  # fmt: skip


def _basic(i: int) -> Document:
    tests = [f"assert f({x}) == {x + i}" for x in range(3)]
    return {
        "task_id": 11 + i,
        "text": f"Write f that adds {i}.",
        "code": f"def f(x): return x + {i}",
        "test_list": tests,
    }


MAKERS: dict[str, Callable[[int], Document]] = {
    "mmlu": _question,
    "hellaswag": _ending,
    "winogrande": lambda i: {
        "sentence": f"Ann gave Bea {i} pens because _ had many.", "option1": "Ann", "option2": "Bea", "answer": "1",
    },
    "piqa": lambda i: {"goal": f"Count to {i}", "sol1": "Say the numbers.", "sol2": "Eat them.", "label": i % 2},
    "arc_easy": lambda i: _lettered(i, 4),
    "arc_challenge": lambda i: _lettered(i, 3),
    "openbookqa": lambda i: _lettered(i, 4),
    "csqa": lambda i: _lettered(i, 5),
    "nq_open": lambda i: {"question": f"what comes after {i}", "answer": [str(i + 1), f"number {i + 1}"]},
    "triviaqa": lambda i: {"question": f"What comes after {i}", "answer": {"aliases": [str(i + 1), f"N{i + 1}"]}},
    "boolq": lambda i: {"question": f"is {i} even", "passage": f"Take {i}. Halve it.", "label": i % 2},
    "gsm8k": lambda i: {"question": f"What is {i} + 1?", "answer": f"It is one more.\n#### {i + 1}"},
    "math": lambda i: {"problem": f"What is ${i} + 1$?", "solution": f"It is $\\boxed{{{i + 1}}}$.", "type": "Algebra"},
    "humaneval": _program,
    "mbpp": _basic,
    "truthfulqa": _truth,
    "bbq": _bias,
}  # fmt: skip
for language in ("fr", "de", "es", "it"):
    MAKERS |= {f"mmlu_{language}": _options, f"arc_challenge_{language}": _options, f"hellaswag_{language}": _ending}


def documents(file: str, count: int, start: int = 0) -> list[Document]:
    """Some of the data set that a local task reads under this name."""
    return [MAKERS[file](i) for i in range(start, start + count)]
