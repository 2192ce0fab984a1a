"""The container recipe, which no daemon builds here: what it copies is there, what it installs fits the pins."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECIPE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def told(instruction):
    return re.findall(rf"^{instruction} (.+)$", RECIPE, re.MULTILINE)


def test_it_copies_what_is_there_and_starts_what_is_installed():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for sources in (line.split()[:-1] for line in told("COPY")):
        assert all((ROOT / source).exists() and not any(fnmatch(source, x) for x in ignored) for source in sources)
    assert all(f'"{name}"' in told("ENTRYPOINT")[0] for name in PROJECT["scripts"])
    shell = "\n".join(["#!/bin/sh", *told("RUN")])
    checked = [Path(sys.executable).with_name("shellcheck"), "--exclude=SC2154", "-"]  # EXTRA is an argument
    subprocess.run(checked, input=shell, text=True, check=True)


@pytest.mark.parametrize("extra", ["cpu", "tpu", "cuda"])
def test_what_it_installs_are_the_dependencies_and_the_pins_fit_them(tmp_path, extra):
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    places = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sh", "-c", told("RUN")[0].replace("/tmp/needed", str(tmp_path / "needed"))]
    said = subprocess.check_output(command, cwd=ROOT, env={"PATH": places, "EXTRA": extra}, text=True)
    assert said.split() == ["install", "--requirement", f"{tmp_path}/needed", "--constraint", "constraints.txt"]
    needed = [Requirement(line) for line in (tmp_path / "needed").read_text().splitlines() if line]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"].get(extra, [])]
    assert needed == [Requirement(text) for text in wanted]
    python = re.search(r"python:([\d.]+)", told("FROM")[0])[1]
    lines = re.findall(r"^[^#\n].*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate({"python_version": python})]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    named = [one for one in needed if canonicalize_name(one.name) in pinned]  # of jax-triton we have tested none
    assert len(named) >= len(PROJECT["dependencies"])
    assert [one for one in named if not one.specifier.contains(pinned[canonicalize_name(one.name)])] == []
