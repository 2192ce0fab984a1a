"""`make gpu-check` at toy size on the CPU: so nothing but the hardware is new on the day on which there is a GPU."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.bench import gpu_check, gpu_kernels


def run(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--toy", "--out", str(tmp_path / "check.md"), *words])
    code = gpu_check.main()
    return code, (tmp_path / "check.md").read_text()


def test_kernels_of_this_machine_are_right(monkeypatch, tmp_path):
    code, text = run(monkeypatch, tmp_path, "--only", "kernels")
    rows = [line for line in text.splitlines() if line.startswith(("| attention", "| experts"))]
    assert code == 0 and all(row.endswith("| right |") for row in rows)
    assert {"| attention chunked, window | bfloat16", "| experts blocked | float32"} <= {
        r[: r.index(" | ", r.index(" | ") + 3)] for r in rows
    }
    assert text.startswith("# GPU check\n\ncpu, ")


LINE = {"kernel": "experts tokamax", "dtype": "bfloat16", "farthest": 3e-2, "chosen": True}


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ({"errors": [1e-3, 2e-3]}, True),
        ({"errors": [1e-3, 2.0]}, False),
        ({"errors": [float("nan"), 1e-3]}, False),
        ({"absent": "ValueError: no"}, False),  # what `auto` takes must be there
        ({"absent": "ValueError: no", "chosen": False}, True),
    ],
)
def test_a_kernel_that_is_wrong_fails_the_check(monkeypatch, line, good):
    done = SimpleNamespace(stdout=json.dumps(LINE | line), returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setenv("BENCH_PLATFORM", "cpu")
    assert gpu_check.kernels(gpu_check.TOY)[1] is good


def test_errors_are_of_the_norm_of_what_is_right():
    assert gpu_kernels.farthest([[3.0, 4.5]], [[3.0, 4.0]]) == [0.1]


def test_a_part_says_why_it_is_left_out(monkeypatch):
    monkeypatch.setitem(gpu_check.NEEDED, "step", ("no_such_package",))
    assert gpu_check.measured("step", gpu_check.TOY, 9) == ("Left out: no_such_package is not installed.", True)
    monkeypatch.setitem(gpu_check.PARTS, "kernels", lambda _: time.sleep(5))
    assert gpu_check.measured("kernels", gpu_check.TOY, 0.05)[0].startswith("Left out: not done after 0 s")
    monkeypatch.setitem(gpu_check.PARTS, "kernels", lambda _: subprocess.run(["false"], check=True))
    assert gpu_check.measured("kernels", gpu_check.TOY, 9)[1] is False


def test_one_that_cannot_run_takes_none_with_it():
    def measure(rest):
        (name,) = rest
        if name == "bad":
            raise RuntimeError("bad ended")
        return {"ours": {"seconds": 1}, name: {"seconds": 2}}

    results = gpu_check._surviving(measure, {"bad": [], "good": []})
    assert list(results) == ["ours", "bad", "good"] and "bad ended" in results["bad"]["failed"]


@pytest.mark.slow
def test_every_part_at_toy_size(monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="the other side needs trl (extra: parity)")
    code, text = run(monkeypatch, tmp_path, "--minutes", "15")
    assert code == 0 and "did not run" not in text and "Left out" not in text
    for title in gpu_check.TITLES.values():
        assert f"## {title}" in text
    assert text.count("as the CPU's |") == 2 and "| dpo | " in text and "| batch 2 | " in text
    assert "transformers, grouped_mm, sdpa" in text
