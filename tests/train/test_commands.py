"""generate and eval through the command line, on a run made here."""

import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax import launch
from mixtral_jax.convert import load, orbax2hf, resize_vocab, save_hf
from mixtral_jax.data.text.tokenizer import load_tokenizer
from mixtral_jax.generation.engine import generate
from mixtral_jax.model import Mixtral
from mixtral_jax.train import read_model
from mixtral_jax.train.commands.evaluate import _table
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.text import grow
from tests.tiny import metrics_of, tiny_config, write_run_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a finished run, which drops in training alone; the run lies in runs/run beside it."""
    dropping = {"moe": {"capacity_factor": 0.5}}
    file = write_run_file(tmp_path_factory.mktemp("trained"), steps=3, compute=dropping)
    assert launch.main(["pretrain", str(file)]) == 0
    return file


def test_generate_prints_prompt_and_continuation(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.parent / "runs" / "run"
    arguments = ["generate", str(run), "--prompt", "the router", "--max-new-tokens", "6", "--temperature", "0"]
    assert launch.main(arguments) == 0
    tokenizer = load_tokenizer(trained.parent / "tokenizer.json")
    ids = [tokenizer.bos_id, *tokenizer.encode("the router")]
    new = generate(load(run / "checkpoints" / "3"), [ids], max_new_tokens=6, eos_id=tokenizer.eos_id)[0]
    shown = [token for token in new if token != tokenizer.eos_id]
    assert capsys.readouterr().out == tokenizer.decode(ids[1:] + shown) + "\n"


def test_every_kind_of_checkpoint_says_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained.parent / "runs" / "run"
    save_hf(load(run / "checkpoints" / "3"), tmp_path / "hf")
    shutil.copy(trained.parent / "tokenizer.json", tmp_path / "hf")
    said = []
    for place in (run, run / "checkpoints" / "3", tmp_path / "hf"):
        assert launch.main(["generate", str(place), "--prompt", "its", "--max-new-tokens", "5", "--seed", "7"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]


def test_several_prompts_and_standard_input(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(trained.parent / "runs" / "run"), "--max-new-tokens", "4", "--temperature", "0"]
    assert launch.main(["generate", *options, "--prompt", "to", "--prompt", "each token"]) == 0
    both = capsys.readouterr().out
    assert both.startswith("--- 1 ---\nto") and "\n--- 2 ---\neach token" in both
    monkeypatch.setattr("sys.stdin", io.StringIO("each token\n"))
    assert launch.main(["generate", *options]) == 0
    assert both.endswith(capsys.readouterr().out)


def test_a_chat_format_is_of_a_chat(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["generate", str(trained.parent / "runs" / "run"), "--prompt", "x", "--template", "v1"]) == 2
    assert "--template is a chat's, and the prompts are text: add --chat" in capsys.readouterr().err


def test_chat_shows_the_answer_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained.parent / "runs" / "run")
    assert launch.main(["generate", run, "--chat", "--prompt", "hello", "--max-new-tokens", "4"]) == 0
    assert "hello" not in capsys.readouterr().out


def test_a_checkpoint_without_tokenizer(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(load(trained.parent / "runs" / "run" / "checkpoints" / "3"), tmp_path / "hf")
    assert launch.main(["generate", str(tmp_path / "hf"), "--prompt", "x"]) == 2
    assert "holds no tokenizer: name one with --tokenizer" in capsys.readouterr().err


def test_exports_of_a_run_on_texts_name_its_tokenizers_tokens(trained: Path, tmp_path: Path) -> None:
    """Also behind an Orbax directory, which has no copy of the files."""
    run = trained.parent / "runs" / "run"
    resize_vocab(run, tmp_path / "orbax", vocab_size=328, progress=False)
    orbax2hf(run, tmp_path / "hf", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "again", progress=False)
    for place in ("orbax", "hf", "again"):
        config = json.loads((tmp_path / place / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize("how", [["--prompt", "x"], ["--chat"], ["--prompts", "nowhere.jsonl", "--out", "out.jsonl"]])
def test_options_out_of_range_are_refused_before_anything_is_read(capsys, how):
    for option, value, sentence in (("--top-p", "0", "top_p is 0"), ("--max-new-tokens", "0", "max_new_tokens is 0")):
        assert launch.main(["generate", "nowhere", *how, option, value]) == 2
        out, err = capsys.readouterr()
        assert sentence in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("command", [["generate"], ["generate", "--prompt", "x"], ["generate", "--chat"]])
def test_a_checkpoint_that_is_not_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([command[0], "nothere", *command[1:]]) == 2
    assert (
        capsys.readouterr().err
        == "error: nothere does not exist: it should be a checkpoint, a run or a model directory\n"
    )


def test_eval_measures_what_training_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.parent / "runs" / "run"
    assert launch.main(["eval", str(run), str(trained), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    logged = next(line for line in reversed(metrics_of(run)) if "eval/loss" in line)
    for name in ("eval/loss", "eval/perplexity", "eval/words/loss", "eval/words/bits_per_byte"):
        np.testing.assert_allclose(measured[name], logged[name], rtol=1e-5)
    assert launch.main(["eval", str(run), str(trained)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["source", "loss", "perplexity", "bits/byte", "accuracy"]
    assert [line.split()[0] for line in table[1:]] == ["words", "all"]
    assert f"{measured['eval/words/loss']:.4f}" in table[1]


def test_eval_of_answers_has_no_column_of_bits_per_byte() -> None:
    numbers = {"loss": 1.5, "perplexity": 4.48, "accuracy": 0.25}
    metrics = {f"eval/{prefix}{key}": value for prefix in ("", "chats/") for key, value in numbers.items()}
    lines = [line.split() for line in _table(metrics, ["chats"]).splitlines()]
    assert lines[0] == ["source", "loss", "perplexity", "accuracy"]
    assert lines[1:] == [[name, "1.5000", "4.480", "0.2500"] for name in ("chats", "all")]


def test_the_step_that_is_evaluated_is_looked_up_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may go on meanwhile: its processes agreed on a step, and read the newest at that moment."""

    def again(path: str) -> str:
        raise AssertionError("it was known")

    monkeypatch.setattr(read_model, "newest_step", again)
    assert launch.main(["eval", str(trained.parent / "runs" / "run"), str(trained)]) == 0


def test_eval_asks_a_mesh_for_its_own_rows_only(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["mesh.data=1", "mesh.fsdp=8", "global_batch_size=4"]  # training would want a multiple of 8
    command = ["eval", str(trained.parent / "runs" / "run"), str(trained), *shape]
    assert launch.main([*command, "eval.batch_size=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/loss"] > 0
    assert launch.main(command) == 2
    assert "micro_batch_size (4) is not a multiple of the 8 batch shards" in capsys.readouterr().err


def test_eval_refuses_a_file_without_validation(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained.parent / "runs" / "run")
    assert launch.main(["eval", run, str(trained), "data.validation=[]"]) == 2
    assert "data.validation is empty" in capsys.readouterr().err


def test_text_and_chats_as_a_library(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.parent / "runs" / "run"
    model, tokenizer, options = mj.load(run), mj.load_tokenizer(run), {"max_new_tokens": 6}
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("the router", "its")]
    new = generate(model, ids, eos_id=tokenizer.eos_id, **options)
    texts = [tokenizer.decode([t for t in row if t != tokenizer.eos_id]) for row in new]
    assert mj.generate(model, ids, eos_id=tokenizer.eos_id, **options) == new
    np.testing.assert_array_equal(mj.generate(model, np.array(ids[0]), **options), generate(model, ids[0], **options))
    assert mj.generate(model, "the router", tokenizer=tokenizer, **options) == texts[0]
    assert mj.generate(model, ["the router", "its"], tokenizer=tokenizer, **options) == texts
    assert mj.generate(model, [], tokenizer=tokenizer) == []
    chat = [{"role": "user", "content": "hello"}]
    answer = mj.generate(model, chat, tokenizer=tokenizer, **options)
    assert mj.generate(model, chat, tokenizer=tokenizer, template="v1", **options) == answer
    assert mj.generate(model, [chat, "its"], tokenizer=tokenizer, **options) == [answer, texts[1]]
    arguments = ["--chat", "--prompt", "hello", "--max-new-tokens", "6", "--temperature", "0"]
    assert launch.main(["generate", str(run), *arguments]) == 0
    assert capsys.readouterr().out == f"{answer}\n"


def test_text_without_a_tokenizer_is_a_sentence(trained: Path, tmp_path: Path) -> None:
    model = mj.load(trained.parent / "runs" / "run")
    for prompt in ("its", ["its"], [{"role": "user", "content": "its"}]):
        with pytest.raises(UserError, match=r"text needs a tokenizer: generate\(\.\.\., tokenizer="):
            mj.generate(model, prompt)
    with pytest.raises(UserError, match="holds no tokenizer"):
        mj.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        mj.load_tokenizer(tmp_path / "tokenizer.model")


def test_a_tokenizer_is_found_by_file_directory_run_and_step(trained: Path) -> None:
    run, file = trained.parent / "runs" / "run", trained.parent / "tokenizer.json"
    places = (file, trained.parent, run, run / "checkpoints", run / "checkpoints" / "3")
    assert {mj.load_tokenizer(place).fingerprint() for place in places} == {load_tokenizer(file).fingerprint()}


def test_a_tokenizer_must_fit_the_model(trained: Path) -> None:
    small = Mixtral(tiny_config(vocab_size=100), key=jax.random.key(0))
    with pytest.raises(UserError, match="the tokenizer has 258 pieces, the model knows 100"):
        mj.generate(small, "its", tokenizer=mj.load_tokenizer(trained.parent))


def test_the_front_door_names_everything() -> None:
    assert set(mj.__all__) == set(mj._PLACES) <= set(dir(mj))
    assert all(callable(getattr(mj, name)) for name in mj.__all__)


def test_a_character_of_several_tokens_comes_whole(trained: Path) -> None:
    tokenizer = load_tokenizer(trained.parent / "tokenizer.json")
    text = "aé€b"
    parts = list(grow(tokenizer, (), iter(tokenizer.encode(text))))
    assert parts == ["a", "é", "€", "b"]
    cut = tokenizer.encode("a€")[:-1]
    assert "".join(grow(tokenizer, (), iter(cut))) == tokenizer.decode(cut)
