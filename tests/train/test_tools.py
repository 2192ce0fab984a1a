"""Commands that train nothing, through the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_jax import launch
from mixtral_jax.train.commands import tools
from mixtral_jax.train.errors import UserError
from tests.tiny import write_run_file


def test_prepare_prints_what_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run_file(tmp_path)
    assert launch.main(["data", "prepare", str(file)]) == 0
    assert "train/words: 60 documents" in capsys.readouterr().out
    assert (tmp_path / "cache").is_dir()


def test_parts_are_prepared_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_run_file(tmp_path))
    assert launch.main(["data", "prepare", file, "--part", "1/2"]) == 0
    assert "still to be made by other machines" in capsys.readouterr().out
    assert launch.main(["data", "prepare", file, "--part", "2/2"]) == 0
    assert "train/words: 60 documents" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3/2", "0/2", "1", "a/b", "1/2/3", ""])
def test_a_part_is_i_of_n(text: str) -> None:
    with pytest.raises(UserError, match="must be I/N with I from 1 to N"):
        tools.parse_part(text)


def test_preview_shows_text_and_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["data", "preview", str(write_run_file(tmp_path)), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "mixture by size: every row once an epoch; rows 0 to" in out
    assert "row 1: row " in out


def test_train_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run_file(tmp_path)
    target = tmp_path / "made.model"
    arguments = [
        "data",
        "train-tokenizer",
        str(tmp_path / "train.jsonl"),
        "--output",
        str(target),
        "--vocab-size",
        "300",
    ]
    assert launch.main(arguments) == 0
    assert capsys.readouterr().out.endswith("made.model: 300 pieces\n")
    assert launch.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert launch.main([*arguments, "--force"]) == 0


@pytest.mark.parametrize(("identical", "code"), [(True, 0), (False, 4)])
def test_verify_exits_4_where_checkpoints_differ(
    identical: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = SimpleNamespace(identical=identical, lines=lambda: ["a line"], to_json=lambda: {"identical": identical})
    seen = []
    monkeypatch.setattr(tools.convert, "verify", lambda a, b, prompts: seen.append((a, b, prompts)) or report)
    assert launch.main(["convert", "verify", "x", "y", "--prompts", "p"]) == code
    assert capsys.readouterr().out == "a line\n"
    assert launch.main(["convert", "verify", "x", "y", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {"identical": identical}
    assert seen == [("x", "y", "p"), ("x", "y", None)]
