"""Rooms import one way; heavy or foreign packages stay where DESIGN puts them."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from tests.rooms import boxes
from tests.sources import ROOT, SOURCES, import_graph, imports, past_doors, relative, room_of

# Room -> rooms that it may import.
ALLOWED = {
    "mixtral_jax": {"mixtral_jax"},
    "data": {"data"},
    "train": {"train", "data", "mixtral_jax"},
    "launch": {"train", "data", "mixtral_jax"},
}
# The lazy table of public names, and what it says to type checkers: the one exception.
FRONT_DOOR = "mixtral_jax/__init__.py"
ONLY_IN = {
    "orbax": {f"mixtral_jax/checkpoint/{name}.py" for name in ("trees", "slices", "pieces")},
    "tensorstore": {"mixtral_jax/checkpoint/trees.py", "mixtral_jax/checkpoint/slices.py"},
    "grain": {"data/loader.py"},
    "wandb": {"train/hooks/sinks.py"},
    "tensorboardX": {"train/hooks/sinks.py"},
    # oracles, in tests alone; `verify` and the demo use them where the user has them, and say so where not
    "torch": {"mixtral_jax/convert/compare.py", "train/commands/demo.py"},
    "transformers": {"mixtral_jax/convert/compare.py", "train/commands/demo.py"},
    "jinja2": {"data/text/jinja.py"},
    "trl": set(),
    "peft": set(),
    "tensorflow": set(),
}
FORBIDDEN_IN_DATA = {"jax", "jaxlib", "flax", "optax", "torch"}


def violations(name: str, text: str) -> list[str]:
    """What is wrong with the imports of the file `name` (relative to the checkout)."""
    room = name.split("/")[0].removesuffix(".py")
    found = []
    for module in sorted(set(imports(ast.parse(text)))):
        top = module.split(".")[0]
        if top in ("data", "train", "launch"):
            found.append(f"{name} imports {module}: the one spelling is mixtral_jax.{module}")
        allowed = ALLOWED["train" if name == FRONT_DOOR else room]
        if (other := room_of(module)) and other not in allowed and module != "mixtral_jax":
            found.append(f"{name} imports {module}")
        if top in ONLY_IN and name not in ONLY_IN[top]:
            found.append(f"{name} imports {module}, which belongs in {sorted(ONLY_IN[top]) or 'tests'}")
        if room == "data" and top in FORBIDDEN_IN_DATA:
            found.append(f"{name} imports {module}: the data room is numpy only")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(relative(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/rows/batch.py", "import mixtral_jax.config"),
        ("data/rows/batch.py", "def f():\n    import jax"),
        ("mixtral_jax/model.py", "import mixtral_jax.train.errors"),
        ("mixtral_jax/model.py", "import orbax.checkpoint"),
        ("train/trainer.py", "import mixtral_jax.launch"),
        ("train/trainer.py", "import train.step"),
        ("train/trainer.py", "import torch"),
    ],
)
def test_the_walk_sees_a_violation(name: str, text: str) -> None:
    assert len(violations(name, text)) == 1


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["cuda"], *extras["tpu"], *extras["aot"], *extras["eval"]]
    names = {canonical(requirement) for requirement in declared}
    providers = metadata.packages_distributions()
    for path in SOURCES:
        for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("mixtral_jax", "torch", "transformers"):
                continue
            owners = {canonical(owner) for owner in providers.get(top, [top])}
            assert owners & names, f"{path.name} imports {module}, which no dependency in pyproject.toml provides"


def canonical(requirement: str) -> str:
    """`Ruamel.yaml>=1` -> `ruamel-yaml`."""
    name = requirement.strip().split("[")[0]
    for mark in "<>=!~; ":
        name = name.split(mark)[0]
    return name.lower().replace("_", "-").replace(".", "-")


def test_no_two_files_import_each_other() -> None:
    """Not even through others: the imports of ours, those inside functions too, have an order."""
    TopologicalSorter(import_graph()).prepare()


def test_a_folder_is_entered_by_its_door() -> None:
    """Its `__init__` imports what others may use, and from outside nothing else is imported."""
    assert past_doors() == []


def test_no_two_folders_use_each_other() -> None:
    """Files beside folders count each for itself: a room's own files may stand above and below its folders."""
    TopologicalSorter(boxes()).prepare()


def test_the_data_room_loads_without_jax() -> None:
    code = (
        "import sys\n"
        "from mixtral_jax.data import config\n"
        "from mixtral_jax.data.records import sources\n"
        "from mixtral_jax.data.rows import batch, packing\n"
        "from mixtral_jax.data.text import examples, tokenizer\n"
        "heavy = {'jax', 'flax', 'torch', 'tensorflow', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_library_loads_without_the_other_rooms() -> None:
    code = (
        "import sys, mixtral_jax as mj\n"
        "assert 'jax' not in sys.modules\n"
        "mj.Mixtral, mj.MixtralConfig\n"
        "from mixtral_jax.generation.engine import generate\n"
        "foreign = {f'mixtral_jax.{r}' for r in ('train', 'data')} | {'torch', 'tensorflow', 'orbax', 'grain'}\n"
        "foreign &= set(sys.modules)\n"
        "assert not foreign, foreign\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
