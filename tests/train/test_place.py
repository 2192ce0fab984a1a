"""Where a run may write: what is refused touches nothing, what makes room is moved, one process writes at a time."""

import errno
import json
import os
import shutil
import time

import pytest

import mixtral_jax as mj
from mixtral_jax import launch
from mixtral_jax.train import trainer as training
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import directory as directories
from mixtral_jax.train.run import lease as leases
from mixtral_jax.train.run.lease import FILE, Lease
from tests.tiny import metrics_of, write_run_file


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(training, "make_mesh", lambda config: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps that is done; tests work in copies of it."""
    directory = tmp_path_factory.mktemp("place")
    optimizer = {"learning_rate": 0.01, "warmup_steps": 0}
    file = write_run_file(directory, steps=2, checkpoint={"every": 1}, log={"every": 1}, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: None)
        assert launch.main(["pretrain", str(file)]) == 0
    return directory


@pytest.fixture
def run(finished, capsys):
    """Starts the run with overrides: (exit code, what it said). Everything is as the finished run left it."""
    shutil.rmtree(finished / "runs.test", ignore_errors=True)
    shutil.copytree(finished / "runs", finished / "runs.test", symlinks=True)

    def run(*words, stage="pretrain"):
        capsys.readouterr()
        code = launch.main([stage, str(finished / "run.yaml"), f"output_dir={finished / 'runs.test'}", *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    run.place = finished / "runs.test" / "run"
    return run


def everything(directory):
    """Every file and link below a directory, with what it holds; but for the logs of attempts."""
    return {
        str(p.relative_to(directory)): p.readlink() if p.is_symlink() else p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if (p.is_file() or p.is_symlink()) and "logs" not in p.parts
    }


HOW = (["--force"], ["--dry-run", "run_name=new"], ["--force", "--dry-run"], ["steps=4"])
REFUSED = {
    "no tokenizer": ["data.tokenizer=missing"],
    "no data": ["data.train.0.path=missing.jsonl"],
    "records without a text": ["data.train.0.text_key=body"],
    "held-out records without a text": ["data.validation.0.text_key=body"],
    "a base at an address of no kind": ["init_from=nosuch://bucket/base"],
    "a file of another format": ["data.train.0.path={run}/STATUS", "data.train.0.format=parquet"],
    "no held-out data": ["data.validation.0.path=missing.jsonl"],
    "no base": ["init_from=missing"],
    "a base that is none": ["init_from=."],
    "a template that does not fit": ["data.examples=chat", "data.template=v3"],
    "a vocabulary that is too small": ["model.vocab_size=100"],
    "a mistyped key": ["stepz=3"],
    "a type": ["steps=many"],
    "a place that is a file": ["checkpoint.directory={run}/STATUS"],
    "a bucket for logs": ["output_dir=gs://bucket/runs"],
    "a bucket for rows": ["data.cache_dir=s3://bucket/rows"],
    "an address of no kind": ["checkpoint.directory=nosuch://bucket/checkpoints"],
    "a file as an address": ["checkpoint.directory=file:///tmp/checkpoints"],
    "an address with one slash": ["output_dir=gs:/bucket/runs"],
    "a shell's home": ["output_dir=~/runs"],
    "a shell's variable": ["checkpoint.directory=$SCRATCH/checkpoints"],
    "a shell's home for rows": ["data.cache_dir=~/rows"],
    "a name that climbs": ["run_name=.."],
    "a hidden name": ["run_name=.hidden"],
    "a long name": ["run_name=" + "x" * 101],
    "a batch that does not divide": ["micro_batch_size=3"],
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("how", HOW, ids=" ".join)
def test_what_is_refused_touches_nothing(run, how, what):
    """By the run and by its rehearsal, in one or a few sentences, and the old run is as it was."""
    if how == ["steps=4"] and "base" in what:
        pytest.skip("a run that goes on needs the weights no more that it began with")
    before = everything(run.place.parent)
    code, said = run(*how, *[word.format(run=run.place) for word in REFUSED[what]])
    assert code == 2 and "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert 1 <= len(errors) <= 2, said
    assert everything(run.place.parent) == before


def test_a_new_run_that_is_refused_leaves_no_directory(run):
    assert run("run_name=new", "data.tokenizer=missing")[0] == 2
    assert not (run.place.parent / "new").exists()


@pytest.mark.parametrize("how", HOW[2:], ids=" ".join)
def test_checkpoints_on_a_disk_that_is_gone_are_refused(run, how):
    """Those of the run's own directory, which is a link; the rehearsal knows it too."""
    shutil.rmtree(run.place / "checkpoints")
    (run.place / "checkpoints").symlink_to("/nowhere/checkpoints")
    for words in (how, [*how, "--dry-run"]):
        code, said = run(*words)
        assert code == 2 and "checkpoint.directory: " in said and "checkpoints is no directory" in said


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOENT])
def test_a_status_that_cannot_be_written_is_a_fault_of_the_storage(run, monkeypatch, code):
    """As when the ticket for a file server has run out: the same command goes on once there is another."""
    written = directories.replace_or_overwrite

    def refuse(path, text):
        if path.name == "STATUS":
            raise OSError(code, os.strerror(code), str(path))
        written(path, text)

    monkeypatch.setattr(directories, "replace_or_overwrite", refuse)
    ended, said = run("steps=3")
    assert ended == 74 and "STATUS could not be written" in said.splitlines()[-1]
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("record", "stage", "words"),
    [
        ({"text": "the"}, "sft", "line 1: neither 'messages' nor 'prompt' with 'completion'"),
        ({"messages": [{"role": "user", "content": "the"}]}, "dpo", "line 1: no 'chosen'"),
        ({"messages": [{"role": "nobody", "content": "the"}]}, "sft", "nobody"),
    ],
)
def test_first_records_of_another_kind_are_refused_at_once(run, finished, record, stage, words):
    """The rehearsal knows it too, and the run before it tokenises a file."""
    file = finished / f"{stage}.jsonl"
    file.write_text(json.dumps(record) + "\n")
    given = [f"stage={stage}", "data.template=v1", f"data.train.0.path={file}", "data.validation=[]", "run_name=new"]
    for more in ([], ["--dry-run"]):
        code, said = run(*given, *more, stage=stage)
        assert code == 2 and words in said.splitlines()[-1]
        assert not (run.place.parent / "new").exists()


def test_all_that_is_wrong_is_said_at_once(run):
    _, said = run("--dry-run", "data.tokenizer=missing", "data.train.0.path=nowhere.jsonl", "init_from=gone", "steps=4")
    assert [word in said for word in ("tokenizer missing", "nowhere.jsonl", "init_from: gone")] == [True] * 3


def test_what_only_the_data_tell_is_refused_before_the_old_run_is_moved(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the router"}\nno json\n')
    before = everything(run.place.parent)
    code, said = run("--force", f"data.train.0.path={bad}")
    assert code == 2 and "bad.jsonl" in said
    assert everything(run.place.parent) == before


def test_force_moves_the_old_run_aside_and_deletes_nothing(run):
    (run.place / "notes.txt").write_text("a user's own")
    (run.place / "samples").mkdir()
    (run.place / "samples" / "mine.txt").write_text("a user's own")
    old = everything(run.place)
    code, said = run("--force")
    aside = run.place.with_name("run.old-1")
    assert code == 0 and f"{run.place} was moved to {aside}" in said
    assert everything(aside) == old
    assert [line["step"] for line in metrics_of(run.place) if "train/loss" in line] == [1, 2]
    log = (run.place / "logs" / "process_0.log").read_text()
    assert "was moved to" in log and log.count("versions ") == 1
    assert (aside / "logs" / "process_0.log").read_text().count("versions ") == 1
    assert sorted(p.name for p in (run.place / "attempts").iterdir()) == ["1", "goodput.jsonl"]
    assert run("--force")[0] == 0
    assert everything(aside) == old and run.place.with_name("run.old-2").is_dir()


def test_force_moves_checkpoints_that_lie_elsewhere_too(run, tmp_path):
    place = tmp_path / "elsewhere"
    where = ["run_name=apart", f"checkpoint.directory={place}"]
    assert run(*where)[0] == 0
    old = everything(place)
    assert run("--force", *where)[0] == 0
    assert everything(place.with_name("elsewhere.old-1")) == old and (place / "2" / "meta").is_dir()
    (place / "mine.txt").write_text("a user's own")
    before = everything(tmp_path) | everything(run.place.parent)
    code, said = run("--force", *where)
    assert code == 2 and "holds more than checkpoints (mine.txt)" in said
    assert everything(tmp_path) | everything(run.place.parent) == before


def test_force_with_a_step_moves_the_later_ones_aside(run):
    results = ("samples/1.jsonl", "samples/2.jsonl", "eval/1/passkey.json", "eval/2/passkey.json", "routing/2/x.html")
    for name in results:
        (run.place / name).parent.mkdir(parents=True, exist_ok=True)
        (run.place / name).write_text("of the first branch")
    assert run("resume=1")[0] == 2
    code, said = run("--force", "resume=1")
    assert code == 0 and "checkpoints 2 were moved to" in said and "resuming from checkpoint 1" in said
    assert "samples and evaluations of later steps were moved to" in said
    aside = run.place / "results.old-1"
    assert all((run.place / name).exists() != (aside / name).exists() == ("2" in name) for name in results)
    assert (run.place / "checkpoints.old-1" / "2" / "meta").is_dir() and (run.place / "checkpoints/2/meta").is_dir()


def test_force_takes_a_directory_by_its_real_name(run, tmp_path):
    """Through a link, and as a relative path, what lies inside of the run is moved with it, and its lease is one."""
    (tmp_path / "link").symlink_to(run.place.parent)
    for inner in (run.place / "inner", run.place):
        where = [f"output_dir={tmp_path / 'link'}", f"checkpoint.directory={inner}"]
        assert run("--force", *where)[0] == 0
        code, said = run("--force", *where)
        assert code == 0 and "taken over" not in said
    assert not list(run.place.parent.glob(f"**/{FILE}"))


def test_force_makes_room_where_a_link_points_to(run, tmp_path):
    (tmp_path / "large").mkdir()
    link = run.place.with_name("linked")
    link.symlink_to(tmp_path / "large")
    assert run("run_name=linked")[0] == 0
    old = everything(tmp_path / "large")
    assert run("run_name=linked", "--force")[0] == 0
    assert link.is_symlink() and everything(tmp_path / "large.old-1") == old and (link / "STATUS").exists()
    (run.place / "checkpoints").rename(tmp_path / "checkpoints")
    (run.place / "checkpoints").symlink_to(tmp_path / "checkpoints")
    assert run("--force", "resume=1")[0] == 0
    assert (tmp_path / "checkpoints.old-1" / "2" / "meta").is_dir()


@pytest.mark.parametrize("how", [["--force"], ["--force", "resume=1"]], ids=" ".join)
def test_force_says_at_once_what_cannot_be_moved(run, monkeypatch, tmp_path, how):
    place = tmp_path / "mounted"
    where = ["run_name=apart", f"checkpoint.directory={place}"]
    assert run(*where)[0] == 0
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(place))
    before = everything(tmp_path) | everything(run.place.parent)
    for words in (how, [*how, "--dry-run"]):
        code, said = run(*words, *where)
        assert code == 2 and f"{place} cannot be moved aside: it is where a file system is mounted" in said
        assert "compiled" not in said and everything(tmp_path) | everything(run.place.parent) == before


def test_another_stage_is_another_run(run, finished):
    """Else `sft` under the name of the pretraining before it says that nothing is left to do."""
    chats = finished / "chats.jsonl"
    chats.write_text('{"prompt": "the", "completion": "router"}\n' * 40)
    words = ["stage=sft", "data.template=v1", f"data.train.0.path={chats}", "data.validation=[]"]
    before = everything(run.place)
    for more in ([], ["steps=4", "data.restart=true"], ["--dry-run"]):
        code, said = run(*words, *more, stage="sft")
        assert code == 2 and "is of a run of stage pretrain, and this is stage sft" in said
    assert everything(run.place) == before


def test_a_bucket_that_nothing_here_reads_is_refused_in_a_sentence(run, monkeypatch):
    def missing(scheme):
        raise ImportError(f"Please install the file system of {scheme}")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    for words in (["steps=4"], ["--dry-run"], ["--force"]):
        code, said = run("checkpoint.directory=gs://bucket/checkpoints", *words)
        assert code == 2 and said.splitlines()[-1].endswith("cannot be read: Please install the file system of gs")


@pytest.mark.parametrize("change", ["num_key_value_heads=4", "vocab_size=400", "intermediate_size=32"])
def test_a_finished_run_refuses_another_shape(run, change):
    before = everything(run.place)
    code, said = run(f"model.{change}")
    assert code == 2 and f"model.{change.partition('=')[0]}" in said.splitlines()[-1]
    assert everything(run.place) == before


def test_a_finished_run_says_which_settings_have_no_effect(run):
    code, said = run("optimizer.learning_rate=0.5")
    last = said.splitlines()[-1]
    assert code == 0 and last.startswith("exit 0: nothing left to do: 2 of 2 steps are done")
    assert "changed since, without effect: " in last and "optimizer.learning_rate: 0.01 -> 0.5" in last
    assert load_config(run.place / "config.yaml").config.optimizer.learning_rate == 0.01
    assert "without effect" not in run(f"output_dir={run.place.parent.with_name('runs')}")[1]


def test_each_attempt_keeps_its_configuration_and_the_run_that_of_the_last(run):
    assert run("steps=3", "optimizer.learning_rate=0.02")[0] == 0
    assert run("seed=x")[0] == 2 and run("seed=5")[0] in (0, 2)
    assert sorted(p.name for p in (run.place / "attempts").iterdir()) == ["1", "2", "goodput.jsonl"]
    for number, steps in (("1", 2), ("2", 3)):
        attempt = run.place / "attempts" / number
        assert {p.name for p in attempt.iterdir()} == {"config.yaml", "config.input.yaml", "env.json"}
        assert load_config(attempt / "config.yaml").config.steps == steps
    assert (run.place / "config.yaml").read_text() == (run.place / "attempts/2/config.yaml").read_text()


# ---- one process at a time


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", 1.0)


def held_by_another(directory, lost=lambda line: None):
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory, lost)
    lease.take()
    leases._ours.discard(lease._said["id"])
    return lease


@pytest.mark.parametrize("words", [["steps=4"], ["--force"], []], ids=" ".join)
def test_a_second_start_is_refused_and_touches_nothing(run, quick, words):
    other = held_by_another(run.place)
    try:
        before = everything(run.place.parent)
        code, said = run(*words)
        assert code == 2 and f"{run.place} is being written by process" in said
        assert {k: v for k, v in everything(run.place.parent).items() if FILE not in k} == {
            k: v for k, v in before.items() if FILE not in k
        }
    finally:
        other.release()


def test_a_directory_of_checkpoints_has_a_lease_of_its_own(run, quick, tmp_path):
    other = held_by_another(tmp_path / "shared")
    try:
        code, said = run("run_name=second", f"checkpoint.directory={tmp_path / 'shared'}")
        assert code == 2 and f"{tmp_path / 'shared'} is being written by process" in said
        assert not (run.place.parent / "second" / FILE).exists()
    finally:
        other.release()


def test_a_requeued_job_goes_on_from_its_own_lease_and_lets_go_at_the_end(run, quick):
    said = {**leases._this_process(), "host": "the node before", "id": "its", "beat": 9}
    (run.place / FILE).write_text(json.dumps(said))
    code, out = run("steps=3")
    assert code == 0 and "is taken over from process" in out and "the node before" in out
    assert "taken over" in (run.place / "logs" / "process_0.log").read_text()
    assert not (run.place / FILE).exists()


def test_who_lost_the_run_ends_with_76_and_writes_no_more(run, quick, monkeypatch):
    ended = []
    monkeypatch.setattr("mixtral_jax.train.run.directory.os._exit", ended.append)
    config = mj.load_config(run.place / "config.yaml", steps=4, output_dir=str(run.place.parent))
    with mj.Trainer(config, quiet=True) as trainer:
        next(trainer.steps())
        taken = json.dumps({"host": "elsewhere", "pid": 1, "id": "theirs", "beat": 0})
        (run.place / "taken").write_text(taken)
        (run.place / "taken").rename(run.place / FILE)
        trainer.run._leases[0]._thread.join(2)
        assert ended == [76]
        status = (run.place / "STATUS").read_text()
        trainer.run.write_failure("lost", 76)
        assert (run.place / "STATUS").read_text() == status
    assert (run.place / FILE).read_text() == taken


def test_a_trainer_that_was_made_again_takes_no_part_any_more(run, quick, monkeypatch):
    """As in a notebook whose cell is run twice: the first one's threads live on."""
    monkeypatch.setattr("mixtral_jax.train.run.heartbeat.BEAT_SECONDS", 0.05)
    config = mj.load_config(run.place / "config.yaml", steps=4, output_dir=str(run.place.parent))
    first = mj.Trainer(config, quiet=True)
    next(first.steps())
    with mj.Trainer(config, quiet=True) as second:
        assert len(list(second.steps())) == 2
    time.sleep(0.3)
    assert json.loads((run.place / "STATUS").read_text())["state"] == "done"
    before = everything(run.place)
    for act in (lambda: next(first.steps()), first.save):
        with pytest.raises(UserError, match="another Trainer of this process has begun on this run since"):
            act()
    first.close()
    assert everything(run.place) == before


# ---- a copy of the tokenizer


@pytest.fixture
def moved_tokenizer(run, finished):
    file = finished / "tokenizer.json"
    file.rename(finished / "moved.json")
    yield finished / "moved.json"
    (finished / "moved.json").rename(file)


def test_a_run_can_be_asked_when_its_tokenizer_has_moved(run, finished, moved_tokenizer, capsys):
    place, capture = str(run.place), capsys
    assert launch.main(["generate", place, "--prompt", "the", "--max-new-tokens", "4"]) == 0
    assert launch.main(["generate", f"{place}/checkpoints/2", "--prompt", "the", "--max-new-tokens", "4"]) == 0
    out = finished / "hf"
    shutil.rmtree(out, ignore_errors=True)
    assert launch.main(["convert", "orbax2hf", place, str(out)]) == 0
    assert (out / "tokenizer.json").read_bytes() == moved_tokenizer.read_bytes()
    capture.readouterr()
    assert launch.main(["eval", place, str(run.place / "config.yaml"), "--json"]) == 0
    assert json.loads(capture.readouterr().out.splitlines()[-1])["eval/loss"] > 0


def test_the_copy_is_what_was_read(run, finished):
    copy = run.place / "tokenizer"
    assert (copy / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()
    assert json.loads((copy / "about.json").read_text()) == {"read": "tokenizer.json", "template": None}


def test_a_resume_with_another_tokenizer_is_refused(run, finished, tmp_path):
    text = (finished / "tokenizer.json").read_text()
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[5:7]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    code, said = run("steps=4", f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    assert code == 2 and "data.tokenizer is another one than the run began with" in said


def test_a_copy_that_was_cut_off_is_made_anew(run, finished):
    whole = (finished / "tokenizer.json").read_bytes()
    (run.place / "tokenizer" / "tokenizer.json").write_bytes(whole[:100])
    assert run("steps=3")[0] == 0
    assert (run.place / "tokenizer" / "tokenizer.json").read_bytes() == whole


def test_names_are_names(tmp_path):
    for name in ("a" * 100, "é.+=@-_1"):
        assert load_config(write_run_file(tmp_path, run_name=name)).config.run_name == name
    for name in ("..", ".", ".a", "a/b", "a b", "", "a" * 101, "字" * 70, "a\n"):
        with pytest.raises(UserError, match="run_name"):
            load_config(write_run_file(tmp_path, run_name=name))
