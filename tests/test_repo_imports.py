"""Rooms import one way; heavy or foreign packages stay where DESIGN puts them."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("mixtral_jax", "data", "train", "launch")
# Room -> rooms that it may import.
ALLOWED = {
    "mixtral_jax": {"mixtral_jax"},
    "data": {"data"},
    "train": {"train", "data", "mixtral_jax"},
    "launch": {"train", "data", "mixtral_jax"},
}
ONLY_IN = {
    "orbax": {"mixtral_jax/checkpoint.py", "mixtral_jax/orbax_stream.py"},
    "tensorstore": {"mixtral_jax/checkpoint.py", "mixtral_jax/orbax_stream.py"},
    "grain": {"data/loader.py"},
    "wandb": {"train/metrics.py"},
    "tensorboardX": {"train/metrics.py"},
    # oracles, in tests alone; `verify` and the demo use them where the user has them, and say so where not
    "torch": {"mixtral_jax/convert/outputs.py", "train/demo.py"},
    "transformers": {"mixtral_jax/convert/outputs.py", "train/demo.py"},
    "trl": set(),
    "peft": set(),
    "tensorflow": set(),
}
FORBIDDEN_IN_DATA = {"jax", "jaxlib", "flax", "optax", "torch"}


def sources() -> list[Path]:
    rooms = [path for room in ROOMS[:3] for path in sorted((ROOT / room).rglob("*.py"))]
    return [ROOT / "launch.py", *rooms]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            assert node.module
            yield node.module


def violations(name: str, text: str) -> list[str]:
    """What is wrong with the imports of the file `name` (relative to the checkout)."""
    room = name.split("/")[0].removesuffix(".py")
    found = []
    for module in imports(ast.parse(text)):
        top = module.split(".")[0]
        if top in ROOMS and top not in ALLOWED[room]:
            found.append(f"{name} imports {module}")
        if top in ONLY_IN and name not in ONLY_IN[top]:
            found.append(f"{name} imports {module}, which belongs in {sorted(ONLY_IN[top]) or 'tests'}")
        if room == "data" and top in FORBIDDEN_IN_DATA:
            found.append(f"{name} imports {module}: the data room is numpy only")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/batch.py", "import mixtral_jax.config"),
        ("data/batch.py", "def f():\n    import jax"),
        ("mixtral_jax/model.py", "from train.errors import UserError"),
        ("mixtral_jax/model.py", "import orbax.checkpoint"),
        ("train/loop.py", "import launch"),
        ("train/loop.py", "from torch import nn"),
    ],
)
def test_the_walk_sees_a_violation(name: str, text: str) -> None:
    assert len(violations(name, text)) == 1


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["cuda"], *extras["tpu"], *extras["aot"]]
    names = {canonical(requirement) for requirement in declared}
    providers = metadata.packages_distributions()
    for path in sources():
        for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ROOMS or top in ("torch", "transformers"):
                continue
            owners = {canonical(owner) for owner in providers.get(top, [top])}
            assert owners & names, f"{path.name} imports {module}, which no dependency in pyproject.toml provides"


def canonical(requirement: str) -> str:
    """`Ruamel.yaml>=1` -> `ruamel-yaml`."""
    name = requirement.strip().split("[")[0]
    for mark in "<>=!~; ":
        name = name.split(mark)[0]
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_data_room_loads_without_jax() -> None:
    code = (
        "import sys, data.batch, data.config, data.packing, data.tokenizer, data.sources, data.examples\n"
        "heavy = {'jax', 'flax', 'torch', 'tensorflow', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_library_loads_without_the_other_rooms() -> None:
    code = (
        "import sys, mixtral_jax\n"
        "foreign = {'train', 'data', 'torch', 'tensorflow', 'orbax', 'grain'} & set(sys.modules)\n"
        "assert not foreign, foreign\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
