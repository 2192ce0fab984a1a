"""Every configuration field is read by something: a setting that does nothing is a bug."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.sources import ROOT, SOURCES


def config_classes() -> dict[str, type[BaseModel]]:
    """Every config class of ours that a run file can reach, by name."""
    from mixtral_jax.train.config.load import STAGES

    found: dict[str, type[BaseModel]] = {}
    waiting: list[type[BaseModel]] = list(STAGES.values())
    while waiting:
        config_class = waiting.pop()
        if config_class.__name__ in found:
            continue
        found[config_class.__name__] = config_class
        waiting += [model for info in config_class.model_fields.values() for model in models(info.annotation)]
    return found


def models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in models(argument)]


def reads(path: Path, skip: set[str]) -> set[str]:
    """Attribute names that are read in a file, outside the bodies of the config classes in `skip`.

    A validator that looks at its own field does not make the field do anything, but a property does.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in skip:
            node.body = [part for part in node.body if isinstance(part, ast.FunctionDef) and not is_validator(part)]
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    dumped = [n.value for n in loads if n.attr == "model_dump"]  # `config.log.wandb.model_dump()`, `wandb.model_dump()`
    whole = {f"{getattr(n, 'attr', getattr(n, 'id', ''))}.*" for n in dumped}
    return {node.attr for node in loads} | whole


def holders(config_class: type[BaseModel]) -> set[str]:
    """The fields of other classes that hold one of these."""
    return {key for c in CLASSES.values() for key, i in c.model_fields.items() if config_class in models(i.annotation)}


def is_validator(function: ast.FunctionDef) -> bool:
    return any("validator" in ast.unparse(decorator) for decorator in function.decorator_list)


CLASSES = config_classes()
READ = set().union(*(reads(path, set(CLASSES)) for path in SOURCES))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_field_is_read(name: str) -> None:
    fields = CLASSES[name].model_fields
    # `getattr(self, axis)` over the mesh axes is a read too: the axes are names in MESH_AXES
    mesh_axes = set(importlib.import_module("mixtral_jax.parallel.mesh").MESH_AXES) if name == "MeshConfig" else set()
    if not any(f"{holder}.*" in READ for holder in holders(CLASSES[name])):  # `config.log.wandb.model_dump()`
        assert sorted(set(fields) - READ - mesh_axes) == []


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_field_is_described_for_the_reference(name: str) -> None:
    fields = CLASSES[name].model_fields
    sections = {key for key, info in fields.items() if models(info.annotation)}
    bare = {key for key, info in fields.items() if not info.description} - sections - {"stage"}
    assert sorted(bare) == []
    assert CLASSES[name].__doc__


def test_the_reference_is_current() -> None:
    from mixtral_jax.train.config.reference import reference

    page = reference()
    assert page == (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), "see the first lines of docs/config.md"
    shown = {path.rpartition(".")[2] for path in re.findall(r"^\| `([\w.]+)` \| ", page, re.M)}
    assert set().union(*(c.model_fields for c in CLASSES.values())) - {"stage"} == shown


def test_a_field_that_nothing_reads_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "class C:\n"
        "    used: int = 1\n"
        "    checked: int = 2\n"
        "    @field_validator('checked')\n"
        "    def _check(cls, v): return cls.checked\n"
        "    def twice(self): return self.used\n"
    )
    assert reads(file, {"C"}) == {"used"}
