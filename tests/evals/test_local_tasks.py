"""The local tasks ask and score as the harness's own tasks do on the same documents."""

import gzip
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals.tasks import PREFIX, listing, own_code_eval, rows, with_local
from tests.evals.documents import documents

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (extra: eval)")
TESTED, EXAMPLES = 4, 14  # documents of each; MMLU's two subjects share the latter
ONE_OF_A_KIND = [name for name in rows() if not name.endswith(("_fr", "_es", "_it"))]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def write(path: Path, found: list[dict[str, Any]]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)


def loaded(specs: list[Any], *folders: str) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[root / folder for folder in folders])
    return dict(manager.load(specs))


def requests(task: Any) -> list[tuple[str, Any]]:
    """What the model is asked, without the options of a generation."""
    task.set_fewshot_seed(1234)
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.build_all_requests(rank=0, world_size=1)
    return [(i.request_type, i.args[0] if i.request_type == "generate_until" else i.args) for i in task.instances]


def hubs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tasks of the harness that a local one stands on, with the documents where the hub's would be."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    row = rows()[name]
    found = [documents(row.file, TESTED), documents(row.file, EXAMPLES, start=TESTED)]

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        test, shots = ([r for r in part if row.part is None or r[row.part] == name] for part in found)
        splits = {s: datasets.Dataset.from_list(test) for s in ("test", "validation", "val")}
        return splits | {s: datasets.Dataset.from_list(shots) for s in ("train", "dev")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folder, root = row.of.rpartition("/")[0], Path(lm_eval.__file__).parent / "tasks"
    own = [load_yaml(path, resolve_func=False) for path in sorted(root.glob(f"{row.of}.yaml"))]
    parts = {r[row.part] for r in found[0]} if row.part else None
    names = [config["task"] for config in own if parts is None or config["dataset_name"] in parts]
    return loaded(names, folder)["tasks"]


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_asks_and_scores_as_the_harness_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows()[name]
    if name == f"{PREFIX}math":
        pytest.importorskip("math_verify", reason="needs lm-eval[math] (extra: eval)")
    write(tmp_path / f"{row.file}.jsonl.gz", documents(row.file, TESTED))
    for split in ("train", "dev"):
        write(tmp_path / f"{row.file}.{split}.jsonl", documents(row.file, EXAMPLES, start=TESTED))
    with own_code_eval():
        ours = loaded(with_local([name], str(tmp_path)))["tasks"]
        theirs = hubs_own(name, monkeypatch)
    assert len(ours) == len(theirs) == (2 if row.part else 1)
    for mine, own in zip(ours.values(), theirs.values(), strict=True):
        if row.shots:
            assert mine.config.num_fewshot == row.shots
            own.set_config("num_fewshot", row.shots)
        assert requests(mine) == requests(own)
        assert [*mine.eval_docs] == [*own.eval_docs]
        assert mine.aggregation().keys() == own.aggregation().keys()
        if mine.OUTPUT_TYPE == "multiple_choice":
            doc = mine.eval_docs[0]
            answers = [(-float(i), False) for i in range(len(mine.doc_to_choice(doc)))]
            assert mine.process_results(doc, answers) == own.process_results(doc, answers)


@pytest.mark.parametrize("file", ["arc_easy", "openbookqa", "csqa", "boolq"])
def test_files_made_for_reading_serve_too(file: str, tmp_path: Path) -> None:
    found = documents(file, TESTED)
    plain = [{"question": r["question"], "choices": r["choices"]["text"], "answer": 1} for r in found if "choices" in r]
    plain = plain or [{**r, "answer": bool(r["label"]), "label": None} for r in found]
    write(tmp_path / f"{file}.parquet.jsonl", [])  # another name, which is nobody's
    write(tmp_path / f"{file}_sample.json", plain)
    first = with_local([PREFIX + file], str(tmp_path))
    write(tmp_path / f"{file}.jsonl", found)
    second = with_local([PREFIX + file], str(tmp_path))
    assert requests(first[0]) == requests(second[0])
    assert [first[0].doc_to_target(doc) for doc in first[0].eval_docs] == [
        second[0].doc_to_target(doc) for doc in second[0].eval_docs
    ]


def test_without_examples_other_documents_are_examples(tmp_path: Path) -> None:
    """And never the one that is asked."""
    write(tmp_path / "mmlu.jsonl", documents("mmlu", 16))
    tasks = loaded(with_local([f"{PREFIX}mmlu"], str(tmp_path)))["tasks"]
    assert [*tasks] == [f"{PREFIX}mmlu_anatomy", f"{PREFIX}mmlu_virology"]
    for task in tasks.values():
        for _, (context, _choice) in requests(task):
            asked = [part.split("\n")[0] for part in context.split("\n\n")[1:]]
            assert len(asked) == 6
            assert len(set(asked)) == 6


def test_a_clone_of_the_data_set_is_read_by_its_splits(tmp_path: Path) -> None:
    import datasets

    place = tmp_path / "nq_open" / "nq_open"
    place.mkdir(parents=True)
    for split, count in (("train", 9), ("validation", 3)):
        found = datasets.Dataset.from_list(documents("nq_open", count))
        found.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
    (task,) = with_local([f"{PREFIX}nq_open"], str(tmp_path))
    assert len(task.eval_docs) == 3
    assert len(requests(task)[0][1].split("Q: ")) == 1 + 5 + 1


def test_the_answer_of_the_most_counts(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", documents("gsm8k", 1))
    (task,) = with_local([f"{PREFIX}gsm8k"], str(tmp_path))
    requests(task)
    (instance,) = task.instances
    assert instance.repeats == 8
    instance.resps = [f"So. The answer is {n}." for n in (7, 1, 7, 1, 1, 2, 3, 4)]
    task.apply_filters()
    assert instance.filtered_resps == {"maj@8": "1"}
    assert task.process_results(task.eval_docs[0], ["1"]) == {"exact_match": 1.0}


def test_the_answer_of_the_most_counts_for_mathematics(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="needs lm-eval[math] (extra: eval)")
    write(tmp_path / "math.jsonl", documents("math", 1))
    (task,) = with_local([f"{PREFIX}math"], str(tmp_path))
    requests(task)
    (instance,) = task.instances
    end = "Final Answer: The final answer is ${}$. I hope it is correct."
    instance.resps = [end.format(answer) for answer in ("2", "1", "\\frac{2}{2}", "1 cm")]
    task.apply_filters()
    assert instance.filtered_resps == {"maj@4": end.format("1")}


def test_what_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_JAX_DATA", raising=False)
    with pytest.raises(UserError, match=r"^local_boolq reads a file: say where, by --data-dir,"):
        with_local(["local_boolq"], None)
    monkeypatch.setenv("MIXTRAL_JAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"has no boolq\.parquet.* split validation of aps/super_glue, boolq on the"):
        with_local(["local_boolq"], None)
    write(tmp_path / "boolq.jsonl", [{"question": "is it", "label": 0}])
    with pytest.raises(UserError, match=r"boolq\.jsonl is not like aps/super_glue, boolq .*'passage' is undefined"):
        with_local(["local_boolq"], None)
    (tmp_path / "boolq.jsonl").write_text('{"question": \n')
    with pytest.raises(ValueError, match=r"boolq\.jsonl.*line 1.*malformed JSON"):
        with_local(["local_boolq"], None)
    for wrong, message in (({"answer": -1}, "answer is -1, of 2 choices"), ({"answer": "B"}, "answer is 'B', of 2"),
                           ({}, "answer is None")):  # fmt: skip
        write(tmp_path / "csqa.jsonl", [{"question": "is it?", "choices": ["yes", "no"], **wrong}])
        with pytest.raises(UserError, match=rf"^local_csqa: .*csqa\.jsonl.*line 1.*{message}"):
            with_local(["local_csqa"], None)


def test_subjects_that_no_task_has_are_told(tmp_path: Path) -> None:
    found = documents("mmlu", 4)
    for rows_, message in (
        ([*found, {**found[0], "subject": "Anatomy"}], "subject 'Anatomy' is none of the 57; did you mean anatomy?"),
        ([], "mmlu.jsonl is not like .* it has no rows"),
    ):
        write(tmp_path / "mmlu.jsonl", rows_)
        with pytest.raises(UserError, match=message):
            with_local([f"{PREFIX}mmlu"], str(tmp_path))


def test_the_list_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "mmlu_sample.jsonl", documents("mmlu", 2))
    head, *found = (re.split(r"  +", line) for line in listing(str(tmp_path)).splitlines())
    table = {row[0]: dict(zip(head, row, strict=True)) for row in found}
    assert table.keys() == rows().keys()
    assert table["local_mmlu"]["there"] == "mmlu_sample.jsonl"
    assert {row["there"] for name, row in table.items() if name != "local_mmlu"} == {"-"}
    assert (table["local_gsm8k"]["shots"], table["local_gsm8k"]["metric"]) == ("8", "maj@8")
    assert table["local_arc_challenge_de"]["on the hub"] == "alexandrainst/m_arc, de"
