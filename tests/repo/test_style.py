"""The house rules that a machine can check."""

import ast
import builtins
import re
import symtable
from pathlib import Path

import pytest

from tests.sources import ROOT, SOURCES, relative

TESTS = sorted((ROOT / "tests").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
SUPPRESSION = re.compile(
    r"#\s*(type:\s*ignore|noqa|pragma:|mypy:)(\[[^\]]*\]|:\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*)?(?P<rest>.*)"
)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError|^\s*\.\.\.\s*$")


def bare_suppressions(text: str) -> list[str]:
    """Lines that silence a tool without saying why on the same line."""
    return [
        line
        for line in text.splitlines()
        if (found := SUPPRESSION.search(line)) and len(found["rest"].strip(" #:-")) < 4
    ]


def long_functions(text: str) -> list[str]:
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def unknown_names(text: str) -> set[str]:
    """What functions read of the module and nothing defines. Linters are told not to look: shapes are strings."""
    scopes, read = [symtable.symtable(text, "module", "exec")], set()
    known = {*dir(builtins), "__file__", "__path__"}
    known |= {s.get_name() for s in scopes[0].get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        known |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global()}
        read |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
    return read - known


def test_every_name_is_known() -> None:
    found = {relative(path): unknown_names(path.read_text(encoding="utf-8")) for path in (*SOURCES, *TESTS)}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_that_nothing_defines_is_found() -> None:
    text = "import os\ndef f(a: 'B D') -> None:\n    return os, g, [a for b in a], print\ndef h(): return f(x)\n"
    assert unknown_names(text) == {"g", "x"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert long_functions(text) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_left_unfinished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    protocols = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) and is_protocol(node)]
    inside = {i for node in protocols for i in range(node.lineno, (node.end_lineno or 0) + 1)}
    assert [line for i, line in enumerate(text.splitlines(), 1) if UNFINISHED.search(line) and i not in inside] == []


def is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_no_suppression_without_a_reason(path: Path) -> None:
    if path != Path(__file__):
        assert bare_suppressions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_children_import_nothing_from_the_current_directory(path: Path) -> None:
    """`python -c` and `-m` look there first; `multiprocessing` starts the former, and no option of its own says not."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"sys\.executable(?!, \"-P\")|^\s*(import|from) multiprocessing|ProcessPoolExecutor", text, re.M
    )


def test_a_bare_suppression_is_seen() -> None:
    mark = "# type: " + "ignore"
    assert bare_suppressions(f"x = 1  {mark}\ny = 2  {mark}[misc]\nz = 3  # no" + "qa: E501\n").__len__() == 3
    assert bare_suppressions(f"x = 1  {mark}[misc]  # the stub of numpy lacks this\n") == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_public_functions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body
    public = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert public == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=relative)
def test_links_and_files_named_in_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    code = re.findall(r"`((?:mixtral_jax|data|train|tests|configs|docs)/[\w/.-]+\.(?:py|md|yaml))(?:::(\w+))?`", text)
    for file, function in code:
        if not (ROOT / file).exists():
            missing.append(file)
        elif function and not re.search(rf"(def|class) {function}\b|^{function}\b", (ROOT / file).read_text(), re.M):
            missing.append(f"{file}::{function}")
    assert missing == []
