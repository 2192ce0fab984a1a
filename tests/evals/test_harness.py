"""The same checkpoint through the harness's own transformers model: the same requests, the same answers."""

import random
from contextlib import nullcontext

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from mixtral_jax.train.evals import TaskOptions, find_tasks, run_tasks, scoring
from mixtral_jax.train.evals.harness import HarnessModel
from tests.evals.cases import TASKS, write_model, write_tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("evals")


@pytest.fixture(scope="module")
def both(place):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = write_model(place / "hf")
    return model, tokenizer, HFLM(pretrained=str(place / "hf"), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def task_files(place):
    return write_tasks(place / "tasks")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SHORTEST", 32)
    monkeypatch.setattr(scoring, "NARROWEST", 64)
    monkeypatch.setattr(scoring, "_most_rows", lambda *_: 16)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_answers_and_scores_are_those_of_hf(both, task_files, chat) -> None:
    from lm_eval import evaluator

    model, tokenizer, theirs = both
    options = TaskOptions(include=[str(task_files)], limit=4, apply_chat_template=chat)
    names = [f"tiny_{name}" for name in TASKS if not (chat and name == "rolling")]
    found = run_tasks(model, tokenizer, find_tasks(names, options), options, template="v1")
    tasks = find_tasks(names, options)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(1234)  # as the harness's own command does
    want = evaluator.evaluate(theirs, tasks, limit=4, apply_chat_template=chat,
                              fewshot_as_multiturn=True, bootstrap_iters=10)  # fmt: skip
    for name in names:
        for mine, other in zip(found.samples[name], want["samples"][name], strict=True):
            assert_same(mine["resps"], other["resps"])
        for metric, value in found.scores[name].items():
            if not metric.endswith("stderr"):
                assert value == pytest.approx(want["results"][name][f"{metric},none"], rel=1e-5), (name, metric)


def test_examples_are_the_same_however_often_they_are_asked_for(both, task_files) -> None:
    model, tokenizer, _ = both
    options = TaskOptions(include=[str(task_files)], limit=4)
    tasks, drawn = find_tasks(["tiny_shots"], options), random.getstate()
    first, second = (run_tasks(model, tokenizer, tasks, options).samples["tiny_shots"] for _ in range(2))
    assert [sample["arguments"] for sample in first] == [sample["arguments"] for sample in second]
    assert random.getstate() == drawn  # a run draws from it too


def test_a_long_answer_gives_signs_of_life(both) -> None:
    model, tokenizer, _ = both
    beats: list[int] = []
    own = HarnessModel(model, tokenizer, "v1", lambda *_: nullcontext(beats.append))
    how = {"until": [], "max_gen_toks": 40, "do_sample": False}
    own._continue([[1, 2, 3]], how, [], [0], beats.append)
    assert beats == [0, 0]


def assert_same(mine, other) -> None:
    """Log-likelihoods within 1e-4; greedy or not, and texts, the same."""
    if isinstance(mine, list | tuple):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert_same(a, b)
    else:
        assert mine == (pytest.approx(other, abs=1e-4) if isinstance(mine, float) else other)
