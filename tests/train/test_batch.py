"""Continuations of a file of prompts: what its lines hold, and that a killed command goes on with the same ones."""

import errno
import fcntl
import functools
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax import launch
from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.text import load_template, load_tokenizer
from mixtral_jax.generation import generate
from mixtral_jax.model import Mixtral
from mixtral_jax.train.commands import batch
from mixtral_jax.train.commands import generate as command
from mixtral_jax.train.errors import StorageError, UserError
from mixtral_jax.train.text import Codec
from tests.sources import ROOT
from tests.tiny import tiny_config, tiny_model, write_byte_tokenizer
from tests.tuning import preference_pair

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3}
MANY: dict[str, Any] = {"samples": 2, "batch_size": 3, **OPTIONS}
RECORDS = [
    {"prompt": "the router", "id": "a"},
    {"messages": [{"role": "user", "content": "its"}, {"role": "assistant", "content": "experts"}]},
    {"prompt": [{"from": "human", "value": "each token of them"}], "completion": "kept"},
    {"prompt": "two"},
]


def write_prompts(directory: Path, records: list[Any] = RECORDS) -> str:
    file = directory / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def run(directory: Path, out: str = "out.jsonl", **changes: Any) -> list[dict[str, Any]]:
    """What `--prompts FILE --out FILE` does behind the loading of the model."""
    prompts = batch.read_prompts(str(directory / "prompts.jsonl"), [], chat=False)
    model, codec = model_and_codec(directory, prompts)
    batch.complete(model, codec, prompts, directory / out, **{**MANY, **changes})
    return [json.loads(line) for line in (directory / out).read_text().splitlines()]


@functools.cache
def the_model() -> Mixtral:
    return tiny_model(tiny_config())


def model_and_codec(directory: Path, prompts: list[batch.Prompt]) -> tuple[Any, Codec]:
    write_byte_tokenizer(directory / "tokenizer.json")
    model = the_model()
    return model, Codec(model, load_tokenizer(directory / "tokenizer.json"), "v1", [p.asked for p in prompts])


def test_each_line_is_what_its_prompt_alone_gives(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    lines = run(tmp_path)
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(4) for s in range(2)]
    assert [line["record"] for line in lines[::2]] == RECORDS
    assert lines[2]["prompt"] == [{"role": "user", "content": "its"}]
    assert lines[4]["prompt"] == [{"role": "user", "content": "each token of them"}]
    model, codec = model_and_codec(tmp_path, batch.read_prompts(str(tmp_path / "prompts.jsonl"), [], chat=False))
    for line in lines:
        ids = codec.encode(line["prompt"])
        (new,) = generate(model, [ids], eos_id=codec.ends, numbers=[line["sample"] * 4 + line["index"]], **OPTIONS)
        assert line["completion"] == codec.text(line["prompt"], ids, new) and line["tokens"] == len(new)
        assert line["finish"] == ("stop" if new[-1] in codec.ends else "length")
    assert lines[0]["completion"] != lines[1]["completion"]


def say_by_number(calls: list[list[int]]) -> Any:
    """A model that says three tokens of its prompt's number, and notes it."""

    def said(model: Any, ids: Any, *, numbers: Sequence[int] = (), **options: Any) -> list[list[int]]:
        calls.extend([[*numbers]] * bool(ids))
        return [[10 + number, 20, 30] for number in numbers]

    return said


def test_what_was_killed_goes_on_wherever_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path)
    calls: list[list[int]] = []
    monkeypatch.setattr(batch, "generate", say_by_number(calls))
    run(tmp_path, "whole.jsonl")
    want = (tmp_path / "whole.jsonl").read_bytes()
    assert len(calls) == 3 and all(len(numbers) == 3 for numbers in calls)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_atomically", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path)
    partial = tmp_path / ".out.jsonl.incomplete"
    gathered = partial.read_bytes()
    for size in [0, *range(1, len(gathered), 211), len(gathered) - 1, len(gathered)]:
        partial.write_bytes(gathered[:size])
        calls.clear()
        run(tmp_path)
        assert (tmp_path / "out.jsonl").read_bytes() == want and not partial.exists()
        there = max(0, gathered[:size].count(b"\n") - 1)
        assert len(calls) == 3 - there // 3 if there < 8 else not calls
        (tmp_path / "out.jsonl").unlink()


def test_other_options_prompts_or_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path)
    monkeypatch.setattr(batch, "generate", say_by_number([]))
    monkeypatch.setattr(batch, "write_atomically", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    before = (tmp_path / ".out.jsonl.incomplete").read_bytes()
    with pytest.raises(UserError, match=r"begun with other options \(temperature 1.0 there, 0.5 here\)"):
        run(tmp_path, temperature=0.5)
    write_prompts(tmp_path, RECORDS[::-1])
    with pytest.raises(UserError, match=r"other options \(prompts \w+ there"):
        run(tmp_path)
    write_prompts(tmp_path)
    monkeypatch.setattr(batch, "arrays_identity", lambda _: "other")
    with pytest.raises(UserError, match=r"other options \(weights \w+ there, other here\)"):
        run(tmp_path)
    assert (tmp_path / ".out.jsonl.incomplete").read_bytes() == before


def test_what_is_there_is_done_or_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path)
    calls: list[list[int]] = []
    monkeypatch.setattr(batch, "generate", say_by_number(calls))
    first = run(tmp_path)
    (tmp_path / ".out.jsonl.incomplete").write_text("killed before this was removed")
    calls.clear()
    assert run(tmp_path) == first and not calls and not (tmp_path / ".out.jsonl.incomplete").exists()
    for other in ({"seed": 4}, {"samples": 1}):
        with pytest.raises(UserError, match=r"out\.jsonl is made of other weights, prompts or options"):
            run(tmp_path, **other)
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="is made of other"):
        run(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "mine" and not calls


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    with open(tmp_path / ".out.jsonl.incomplete", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="written by another process"):  # may be one that is being killed
            run(tmp_path)


def test_without_locks_of_the_file_system_one_process_may_write(tmp_path: Path, monkeypatch, capsys) -> None:
    write_prompts(tmp_path)
    monkeypatch.setattr(batch, "generate", say_by_number([]))
    error = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(batch.fcntl, "flock", lambda *_: (_ for _ in ()).throw(error))
    assert len(run(tmp_path)) == 8
    assert "has no locks (Function not implemented)" in capsys.readouterr().err


def test_the_precision_is_the_one_that_is_computed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path)
    monkeypatch.setattr(batch, "generate", say_by_number([]))
    monkeypatch.setattr(batch, "write_atomically", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert the_model().compute.dtype == "auto"
    with (tmp_path / ".out.jsonl.incomplete").open() as file:
        assert json.loads(file.readline())["dtype"] == "float32"


def test_a_signal_asks_for_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr(command, "run_template", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        launch.main(["generate", "c", "--prompts", write_prompts(tmp_path), "--out", "o"])
    assert ended.value.code == 75 and "exit 75: SIGTERM: run the same command again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from mixtral_jax.train.commands import batch
from tests.train import test_batch
generate, calls = batch.generate, []
def killing(*args, **options):
    calls.append(1)
    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else generate(*args, **options)
batch.generate = killing
test_batch.run(Path(sys.argv[1]))
"""


@pytest.mark.slow  # starts Python; what a kill can leave is tried byte by byte above
def test_after_kill_9_the_second_start_gives_the_same_bytes(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    code = [sys.executable, "-P", "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / ".out.jsonl.incomplete").read_bytes().count(b"\n") == 7  # of two batches
    assert run(tmp_path) == run(tmp_path, "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 2: malformed JSON"),
        ('{"text": "a"}', r"line 2: neither 'prompt' nor 'messages' \(it has 'text'\)"),
        ('{"prompt": 3}', "line 2: 'prompt' is neither text nor messages"),
        (r'{"prompt": "\ud800"}', "line 2: .*surrogates not allowed"),
        (r'{"prompt": "a", "id": "\ud800"}', "line 2: .*surrogates not allowed"),
        ('{"prompt": "a", "system": "s"}', "line 2: 'system' and 'tools' have no place in plain text"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "x"}', "line 2: 'tools' is text, but not JSON"),
        ('{"messages": []}', "line 2: 'messages' asks nothing"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', r"line 2: messages\[0\]: unknown role 'usr'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: 'messages' asks nothing"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_made(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, " + message):
        run(tmp_path)
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_an_option_out_of_range_leaves_nothing(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    with pytest.raises(ValueError, match="temperature is -1"):
        run(tmp_path, temperature=-1)
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_a_system_prompt_and_tools_of_their_own_columns_are_asked_with(tmp_path: Path) -> None:
    """As runs read them."""
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    function = {"name": "f", "parameters": {}}
    write_prompts(tmp_path, [{"prompt": "a", "system_prompt": "s"}, {"messages": [user], "functions": [function]}])
    first, second = batch.read_prompts(str(tmp_path / "prompts.jsonl"), [], chat=True)
    assert (first.asked, first.tools) == ([system, user], ())
    assert second.asked == [user] and second.tools[0]["function"] == function
    model, codec = model_and_codec(tmp_path, [first, second])
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2: template v1 cannot tell the model of tools"):
        batch.complete(model, codec, [first, second], tmp_path / "out.jsonl", **MANY)
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_files_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\r\n\ntwo\xe2\x80\xa8\x0clines\n")  # no line ends but at its \n
    (tmp_path / "p.jsonl.gz").write_bytes(
        gzip.compress(b'{"prompt": "one"}\n\n{"prompt": "two\xe2\x80\xa8\\flines"}\n')
    )
    second = "two\u2028\flines"
    system = {"role": "system", "content": "s"}
    for name in ("p.txt", "p.jsonl.gz"):
        assert [p.asked for p in batch.read_prompts(str(tmp_path / name), [], chat=False)] == ["one", second]
        asked = batch.read_prompts(str(tmp_path / name), [system], chat=True)[1].asked
        assert asked == [system, {"role": "user", "content": second}]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UserError, match=r"none\.txt holds no prompts"):
        batch.read_prompts(str(tmp_path / "none.txt"), [], chat=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompts", "p"], "--prompts FILE and --out FILE belong together"),
        (["--samples", "2"], "--samples and --batch-size belong to --prompts FILE --out FILE"),
        (["--batch-size", "2"], "--samples and --batch-size belong to --prompts FILE --out FILE"),
        (["--prompts", "p", "--out", "o", "--prompt", "x"], "--prompt and --prompts: give one of them"),
        (["--prompts", "p", "--out", "o", "--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["--prompts", "p", "--out", "nodir/o"], "--out nodir/o is a directory, or in none that is there"),
        (["--prompts", "p", "--out", "."], "--out . is a directory"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch.main(["generate", "nothere", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_the_documented_way_to_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "generate", say_by_number([]))
    run(tmp_path, "answers.jsonl")
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "docs/generate.md", "exec"), {})
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == len(RECORDS)
    template = load_template("v1", load_tokenizer(tmp_path / "tokenizer.json"))
    for pair in pairs:
        preference_pair(pair, SourceConfig(name="pairs", path="pairs.jsonl"), template)
