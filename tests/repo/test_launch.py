"""The command line: exit codes, one-sentence errors, help without imports."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax import launch
from mixtral_jax.kernels import choice
from mixtral_jax.parallel import Machine
from mixtral_jax.train.commands.table import COMMANDS
from mixtral_jax.train.run import check
from tests.sources import ROOT

TEXT = """\
stage: pretrain
run_name: small
steps: 100
seq_len: 64
global_batch_size: 16
model: {preset: tiny}
data:
  tokenizer: some/tokenizer.model
  train: [{name: en, path: data/en.jsonl.gz}]
"""
INTERFACE = [
    "pretrain", "sft", "dpo", "plan", "eval", "generate", "doctor", "routing", "config:show", "config:schema",
    "data:prepare", "data:train-tokenizer", "data:preview", "data:cache:ls", "data:cache:rm",
    "convert:hf2orbax", "convert:orbax2hf", "convert:verify",
    "convert:upcycle", "convert:resize-vocab", "convert:peft2lora", "convert:lora2peft", "convert:merge-lora",
    "report", "runs:ls", "runs:diff", "runs:tail",
    "submit:slurm", "submit:k8s", "submit:sky", "submit:xpk", "submit:local",
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return str(path)


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in groups:
        for key, child in group.choices.items():
            yield from parsers(child, f"{name}:{key}" if name else key)
    if not groups:
        yield name, parser


ALL = dict(parsers(launch.build_parser()))


def calls(monkeypatch: pytest.MonkeyPatch, result: Any = 0) -> list[tuple[tuple, dict]]:
    """Replace whatever function a command would import by a recorder."""
    seen: list[tuple[tuple, dict]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        if isinstance(result, BaseException):
            raise result
        return result

    real = launch._function
    monkeypatch.setattr(
        launch,
        "_function",
        lambda module, name: real(module, name) if module == "train.config" else record,
    )
    return seen


def test_every_command_of_the_interface_is_there() -> None:
    assert sorted(ALL) == sorted(INTERFACE)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_option_has_a_sentence(name: str) -> None:
    assert ALL[name].description
    for action in ALL[name]._actions:
        assert action.help, action.dest


def test_help_needs_none_of_the_libraries() -> None:
    code = (
        "import sys, launch\n"
        "try: launch.main(['pretrain', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'jax', 'flax', 'numpy', 'pydantic', 'rich', 'grain', 'ruamel'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "longest continuation (default: 128)" in text
    assert "default: None" not in text
    assert "default: False" not in text


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["convert"], ["convert", "hf2orbax", "a"], ["generate", "c", "x=1"]]
)
def test_bad_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_an_argument_that_is_not_utf8_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("\udcff", "\ud83d"):  # what Python makes of the byte FF, and half of a pair
        assert launch.main(["generate", "nothere", "--prompt", f"Voil{word}"]) == 2
        assert "on the command line is not UTF-8" in capsys.readouterr().err.encode().decode()


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([]) == 2
    assert "pretrain" in capsys.readouterr().out


def test_every_function_that_a_command_names_exists() -> None:
    for command in COMMANDS.values():
        module, _, name = command.calls.partition(":")
        assert callable(launch._function(module, name) if name else launch.PREPARED[module])


def test_tensorboard_is_one_command_that_the_docs_name() -> None:
    done = subprocess.run(["make", "-n", "tensorboard"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tensorboard --logdir runs" in done.stdout
    assert "`make tensorboard`" in (ROOT / "docs" / "runs.md").read_text()


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--version"]) == 0
    assert re.fullmatch(r"mixtral-jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_copy_without_links_says_so_in_one_line(tmp_path: Path) -> None:
    """As a zip from Windows has them: a file that holds the link's target in place of each link."""
    package = ROOT / "mixtral_jax"
    (tmp_path / "mixtral_jax").mkdir()
    shutil.copy(package / "__init__.py", tmp_path / "mixtral_jax")
    shutil.copy(ROOT / "launch.py", tmp_path)
    for name in ("train", "data", "configs", "launch.py"):
        (tmp_path / "mixtral_jax" / name).write_text(os.readlink(package / name))
    command = [sys.executable, "launch.py", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: mixtral_jax/train is no folder, as in a zip unpacked without symbolic links")
    assert len(done.stderr.splitlines()) == 1
    command = [sys.executable, "-c", "import mixtral_jax"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: mixtral_jax/train is no folder")


def test_config_problems_are_lines_and_exit_2(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["config", "show", file, "step=3", "--seq_len", "no", "--optimizer.b1=2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: seq_len = no (override): must be a whole number, not text",
        "error: optimizer.b1 = 2 (override): must be less than 1",
        "error: step = 3 (override): unknown key; the nearest key is steps",
        "exit 2: 3 problems, named above",
    ]


def test_one_problem_is_one_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["dpo", file]) == 2
    assert capsys.readouterr().err == f"error: {file} is a pretrain file: run `pretrain {file}`, not `dpo`\n"
    assert launch.main(["pretrain", file + "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: configuration file {file}x does not exist")


def test_config_show_and_schema(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["config", "show", file, "steps=1e3"]) == 0
    out = capsys.readouterr().out
    assert "steps: 1000" in out
    assert "# override" in out
    assert f"# {file}:4" in out
    assert launch.main(["config", "schema", "pretrain"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["seq_len"]["exclusiveMinimum"] == 0


def test_dry_run_shows_the_arithmetic_and_writes_nothing(
    file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples = ROOT / "data" / "samples"
    there = [f"data.tokenizer={samples / 'tokenizer.model'}", f"data.train.0.path={samples / 'en.val.jsonl.gz'}"]
    assert launch.main(["pretrain", file, "--dry-run", "micro_batch_size=8", "mesh.fsdp=2", *there]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "data 4 x fsdp 2 x expert 1 x tensor 1 x context 1 on 8" in out
    assert "16 sequences = 2 micro-batches x 8 shards x 1 sequences; 1,024 tokens a step, 102,400 in 100 steps" in out
    assert "parameters, " in out
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    assert launch.main(["pretrain", file, "--dry-run", "micro_batch_size=4"]) == 2
    assert "micro_batch_size (4) is not a multiple of the 8 batch shards" in capsys.readouterr().err
    assert launch.main(["pretrain", file, "--dry-run", "mesh.data=3", "global_batch_size=15"]) == 2
    assert "3" in capsys.readouterr().err


def test_a_gpu_without_tokamax_is_refused_with_the_remedy(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the sequential loop for CPUs, in silence."""
    monkeypatch.setattr(check, "machine", lambda: Machine("gpu", "NVIDIA A100-SXM4-80GB"))
    monkeypatch.setattr(choice, "has_tokamax", lambda: False)
    samples = ROOT / "data" / "samples"
    there = [f"data.tokenizer={samples / 'tokenizer.model'}", f"data.train.0.path={samples / 'en.val.jsonl.gz'}"]
    command = ["pretrain", file, "--dry-run", "micro_batch_size=8", *there]
    assert launch.main(command) == 2
    assert "pip install 'mixtral-jax[cuda]', or name one of the slow back-ends" in capsys.readouterr().err
    assert launch.main([*command, "compute.moe.matmul=blocked"]) == 0
    out = capsys.readouterr().out
    assert "kernels  attention " in out and "note: experts falls back on blocked: named by compute.moe.matmul" in out


@pytest.mark.parametrize("code", [0, 3, 75, 124])
def test_the_exit_code_of_a_run_is_passed_on(file: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, code)
    assert launch.main(["pretrain", file, "--force", "--num-processes", "1", "--optimizer.b2", "0.9", "seed=7"]) == code
    *_, (_, start), ((config, provenance), options) = seen  # on a CPU the first keeps freed memory
    assert start == {"coordinator": None, "num_processes": 1, "process_id": None, "timeout": 60.0}
    assert (config.optimizer.b2, config.seed, options) == (0.9, 7, {"force": True})
    assert provenance.overrides == ("--optimizer.b2", "0.9", "seed=7")


def test_conversions_pass_their_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    assert launch.main(["convert", "orbax2hf", "a", "b", "--dtype", "bfloat16", "--max-shard-size", "1GB"]) == 0
    assert launch.main(["convert", "upcycle", "a", "b", "--experts", "4", "--top-k", "1", "--force"]) == 0
    assert launch.main(["convert", "resize-vocab", "a", "b", "--vocab-size", "9"]) == 0
    assert seen[0] == (("a", "b"), {"dtype": "bfloat16", "max_shard_size": "1GB", "force": False})
    assert seen[1] == (("a", "b"), {"experts": 4, "top_k": 1, "noise": 0.0, "force": True})
    assert seen[2] == (("a", "b"), {"vocab_size": 9, "force": False})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("gone"), 2),
        (FileExistsError("there"), 2),
        (PermissionError("closed"), 2),
        (RuntimeError("bug"), 1),
        (KeyboardInterrupt(), 1),
        (OSError(28, "No space left on device"), 74),
        (MemoryError(), 1),
        (BrokenPipeError(32, "Broken pipe"), 1),  # of a worker, say
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls(monkeypatch, error)
    assert launch.main(["doctor"]) == code
    text = capsys.readouterr().err
    assert ("Traceback" in text) == (code == 1 and not isinstance(error, KeyboardInterrupt | MemoryError))
    assert text.splitlines()[-1].startswith({1: "exit 1: ", 2: "error: ", 74: "exit 74: "}[code])


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_nobody_reads_ends_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head`: what is printed then goes nowhere, and the work is done to its end."""
    done = []

    def work() -> None:
        for _ in range(3):
            print("x" * 10_000, file=getattr(sys, name), flush=True)
        done.append(True)

    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(launch, "_function", lambda *_: work)
        assert launch.main(["doctor"]) == 0 and done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_an_answer_that_cannot_be_written_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(launch, "_function", lambda *_: lambda: print("the answer"))
        assert launch.main(["doctor"]) == 74
    assert "exit 74: the output could not be written: No space left on device" in capsys.readouterr().err


def test_a_value_error_of_a_library_is_our_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_function", lambda *_: lambda: json.loads("{"))
    assert launch.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["config", "show", "--traceback", file, "nope=1"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and text.splitlines()[-1].startswith("error: ")


def test_as_a_process(file: str) -> None:
    command = [sys.executable, launch.__file__, "config", "show", file]
    done = subprocess.run([*command, "nope=1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_notebook_on_a_machine_without_accelerators_has_a_quiet_cpu() -> None:
    """Set when the library is imported, before jax: libtpu, which is there for `plan`, looks for no TPU."""
    code = (
        "import os, glob; glob.glob = lambda pattern: FOUND; import mixtral_jax; print(os.environ.get('JAX_PLATFORMS'))"
    )
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    for found, first, platforms in (("[]", "", "cpu"), ("['x']", "", "None"), ("[]", "import jax; ", "None")):
        command = [sys.executable, "-c", first + code.replace("FOUND", found)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
        assert (done.stdout.strip(), done.stderr) == (platforms, ""), done
