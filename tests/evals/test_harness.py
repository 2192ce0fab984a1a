"""The same checkpoint through the harness's own transformers model: the same requests, the same answers."""

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train.evals import TaskOptions, find_tasks, harness, run_tasks, scoring
from mixtral_jax.train.evals.harness import Asked, Chat, HarnessModel
from tests.evals.cases import TASKS, write_model, write_tasks
from tests.prepared import MODEL
from tests.tiny import tiny_config


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
    found = run_tasks(model, tokenizer, find_tasks(names, options, longest=128), options, template="v1")
    tasks = find_tasks(names, options, longest=128)
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
    tasks, drawn = find_tasks(["tiny_shots"], options, longest=128), random.getstate()
    first, second = (run_tasks(model, tokenizer, tasks, options).samples["tiny_shots"] for _ in range(2))
    assert [sample["arguments"] for sample in first] == [sample["arguments"] for sample in second]
    assert random.getstate() == drawn  # a run draws from it too


def test_a_long_answer_gives_signs_of_life(both) -> None:
    model, tokenizer, _ = both
    beats: list[int] = []
    own = HarnessModel(model, tokenizer, "v1", lambda *_: nullcontext(beats.append))
    how = {"until": [], "max_gen_toks": 40, "do_sample": False}
    own._continue([Asked([1, 2, 3], [1], how)], [], [0], beats.append)
    assert beats == [0, 0]


def test_an_answer_goes_on_from_its_context_and_that_of_a_chat_begins_anew(monkeypatch) -> None:
    """Four spaces are a piece that begins with one, which is not shown where a text begins."""
    from lm_eval.api.instance import Instance

    tokenizer, answer = load_tokenizer(MODEL), "    c = a\n    return c"
    new = tokenizer.encode(f"{answer}\nprint", "text")
    monkeypatch.setattr(harness, "stream", lambda *_, **__: ([token] for token in new))
    model = SimpleNamespace(config=tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=128))
    own = HarnessModel(model, tokenizer, "v1", lambda *_: nullcontext(lambda _: None))
    code = "def f(a):\n"
    question = {"role": "user", "content": "Go on."}

    def answered(context: str, *stops: str) -> str:
        how = {"until": [*stops], "max_gen_toks": 60}
        return own.generate_until([Instance("generate_until", {}, (context, how), 0)])[0]

    assert code + answered(code) == tokenizer.decode([*own.tok_encode(code), *new])
    assert answered(code, "\nprint") == answer
    assert answered(code, "    c") == ""
    begun = [question, {"role": "assistant", "content": code}]
    assert answered(Chat(json.dumps(begun)), "\nprint") == answer
    assert answered(Chat(json.dumps([question])), "\nprint") == answer[1:] == tokenizer.decode(new)[: len(answer) - 1]


def assert_same(mine, other) -> None:
    """Log-likelihoods within 1e-4; greedy or not, and texts, the same."""
    if isinstance(mine, list | tuple):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert_same(a, b)
    else:
        assert mine == (pytest.approx(other, abs=1e-4) if isinstance(mine, float) else other)
