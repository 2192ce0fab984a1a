"""How a run begins: what a refused start leaves alone, and what is asked of storage before the first step."""

import errno
import json
from pathlib import Path

import pytest

from mixtral_jax.data.text import load_template, load_tokenizer
from mixtral_jax.train import build
from mixtral_jax.train import trainer as training
from mixtral_jax.train.build import prepare_data
from mixtral_jax.train.checkpoints import Found
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.console import Console
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import RunDirectory, resume
from mixtral_jax.train.run.check import sizes_of
from mixtral_jax.train.run.resume import survey
from mixtral_jax.train.run.tokenizer_copy import check_tokenizer, keep_tokenizer, kept_template
from tests.tiny import write_run_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_run_file(tmp_path)


def test_a_refused_start_leaves_the_attempt_of_another_one(file):
    """It has no number of its own yet, and the directory of the last may be empty for as long as data are prepared."""
    config, given = load_config(file)
    first = RunDirectory(config.run_dir)
    first.begin()
    RunDirectory(config.run_dir).write_failure("another process writes there", 2)
    assert (first.attempts / "1").is_dir()
    (first.attempts / "1").rmdir()
    first.describe(config, given, None)
    assert (first.attempts / "1" / "config.yaml").exists()


def test_a_refused_start_that_has_begun_takes_its_number_back(file):
    place = RunDirectory(load_config(file).config.run_dir)
    place.begin()
    place.write_failure("the data are no records", 2)
    assert not (place.attempts / "1").exists()


def other_tokenizer(file: Path) -> Path:
    """The same pieces, two of them under each other's id."""
    content = json.loads((file.parent / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[5:7]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    other = file.parent / "other.json"
    other.write_text(json.dumps(content))
    return other


def test_before_the_first_checkpoint_the_tokenizer_may_still_be_set_right(file):
    """The copy is made before the first step; nothing was trained with it where no checkpoint lies beside it."""
    config = load_config(file).config
    config.run_dir.mkdir(parents=True)
    keep_tokenizer(config.run_dir, load_tokenizer(config.data.tokenizer), config)
    right = load_config(file, [f"data.tokenizer={other_tokenizer(file)}"]).config
    found, tokenizer, _ = survey(right, False, lambda: sizes_of(None), print)
    assert found is None
    keep_tokenizer(config.run_dir, tokenizer, right)
    check_tokenizer(config.run_dir, tokenizer)


@pytest.mark.parametrize("changes", [[], ["optimizer.schedule=wsd", "optimizer.decay_steps=10"]])
def test_a_changed_tree_is_looked_at_whatever_the_steps_are(file, monkeypatch, changes):
    """In a run of epochs nobody has counted them yet; a warm-up beyond those that were done makes no other tree."""
    config = load_config(file, ["steps=0", "data.epochs=1", "optimizer.warmup_steps=7", *changes]).config
    before = config.model_dump(mode="json")
    before["model"]["rope_theta"] = 1.0
    looked = []
    monkeypatch.setattr(resume.checkpoint, "check_fits", lambda path, state: looked.append(path))
    resume.check_same_tree(Found(3, file, {}, {"config": before}), config)
    assert looked == [file]


def test_the_copy_has_the_chat_format_of_the_last_attempt(file):
    """Else the run would be asked in a format that it was not trained with."""
    run = file.parent / "runs"
    run.mkdir()
    for template in ("v1", "{name: v1, bos: false}"):
        config = load_config(file, ["stage=sft", "data.validation=[]", f"data.template={template}"]).config
        tokenizer = load_tokenizer(config.data.tokenizer)
        keep_tokenizer(run, tokenizer, config)
        format = load_template(config.data.template, load_tokenizer(config.data.tokenizer)).format
        assert kept_template(run) == format.model_dump(mode="json")
    kept = (run / "tokenizer" / "about.json").stat().st_ino
    keep_tokenizer(run, tokenizer, config)
    assert (run / "tokenizer" / "about.json").stat().st_ino == kept


def test_which_checkpoints_there_are_is_what_process_0_sees(file, monkeypatch):
    """The listings of the others may be older."""
    config = load_config(file, ["resume=never"]).config
    monkeypatch.setattr(resume, "told", lambda say: (say(), "[5]")[1], raising=False)
    monkeypatch.setattr(resume, "agree", lambda **values: compared.extend(values))
    compared = []
    with pytest.raises(UserError, match="holds checkpoint 5"):
        resume.look(config, config.run_dir / "checkpoints", False, print)
    assert compared == ["force"]


def test_storage_that_does_not_answer_is_asked_again_at_each_step_of_a_start(file, monkeypatch):
    """Each listing of a bucket may be refused, and the one of it as well that removes what was left unfinished."""
    config = load_config(file, [f"checkpoint.directory={file.parent / 'far'}"]).config
    refused, told = dict[str, bool](), list[str]()

    def once(name):
        whole = getattr(resume.checkpoints, name)

        def asked(*words):
            if refused[name]:
                refused[name] = False
                raise OSError(errno.EIO, "503 Service Unavailable")
            return whole(*words)

        monkeypatch.setattr(resume.checkpoints, name, asked)

    once("saved_steps"), once("discard_unfinished")
    monkeypatch.setattr("mixtral_jax.train.checkpoints.patience.PAUSES", (0.0,))
    place = RunDirectory(config.run_dir)
    refused |= {"saved_steps": False, "discard_unfinished": True}
    survey_whole = resume.survey

    def survey_then_refuse(*words):
        found = survey_whole(*words)
        refused["saved_steps"] = True
        return found

    monkeypatch.setattr(resume, "survey", survey_then_refuse)
    start = resume.where_to_start(config, False, place, lambda: None)
    assert any("503" in note for note in start.notes)
    refused["saved_steps"] = True
    console = Console(place.log, speak=False, progress=False)
    monkeypatch.setattr(console, "say", told.append)
    start.clear(console)
    console.close()
    place.release()
    assert sum("503" in line for line in told) == 2


def test_status_stands_while_the_data_are_prepared_that_say_the_steps(file, monkeypatch):
    """And a start that then finds nothing left to do is no attempt."""
    config = load_config(file, ["steps=0", "data.epochs=0.5", "checkpoint.every=null"]).config
    place, said = config.run_dir, []

    def prepare(config):
        said.append(json.loads((place / "STATUS").read_text()))
        return prepare_data(config)

    monkeypatch.setattr(training, "make_mesh", lambda config: None)
    monkeypatch.setattr(build, "prepare_data", prepare)
    for attempt in (1, 2):
        said.clear()
        assert training.run(config) == 0
        assert said and (said[0]["state"], said[0]["attempt"]) == ("preparing", attempt)
        status = json.loads((place / "STATUS").read_text())
        assert (status["state"], status["attempt"]) == ("done", 1)
        assert sorted(p.name for p in (place / "attempts").iterdir()) == ["1", "goodput.jsonl"]
        account = json.loads((place / "attempts" / "goodput.jsonl").read_text())
        assert (account["attempt"], account["exit_code"], account["step_count"]) == (1, 0, status["step"])
