"""The source files of the product, their module names, and what each imports of ours."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("mixtral_jax", "data", "train")
# The folders of the top level are in the package by links: mixtral_jax/train -> ../train. Each file counts once.
SOURCES = [
    ROOT / "launch.py",
    *sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py") if not p.is_symlink()),
]


def relative(path: Path) -> str:
    """The path from the checkout, as documents name it."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """`train/step.py` -> `mixtral_jax.train.step`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "mixtral_jax" else ("mixtral_jax", *parts))


def room_of(module: str) -> str:
    """The room of a module of ours, and "" of any other."""
    top, _, rest = module.partition(".")
    inner = rest.partition(".")[0]
    return "" if top != "mixtral_jax" else inner if inner in ("data", "train", "launch") else "mixtral_jax"


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, at the top or inside a function; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Module of ours -> modules of ours that it imports."""
    names = {module_name(path): path for path in SOURCES}
    graph = {}
    for name, path in names.items():
        found = set(imports(ast.parse(path.read_text(encoding="utf-8")))) & names.keys()
        # `from package import module` is an import of the module, not of the package's door
        graph[name] = {m for m in found if not any(other.startswith(f"{m}.") for other in found)} - {name}
    return graph


def folder_of(module: str, names: dict[str, Path]) -> str:
    """The package that a module stands in; a package stands in itself."""
    return module if names[module].name == "__init__.py" else module.rpartition(".")[0]


def past_doors() -> list[str]:
    """Imports from inside a folder that has a door, past that door. The three rooms themselves have none."""
    names = {module_name(path): path for path in SOURCES}
    rooms = {"mixtral_jax", "mixtral_jax.train", "mixtral_jax.data"}
    found = []
    for name, path in names.items():
        for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if module not in names or names[module].name == "__init__.py":
                continue
            folder = folder_of(module, names)
            door = names[folder].read_text(encoding="utf-8")
            handed_out = f"from {folder} import {module.rpartition('.')[2]}\n" in door  # as a whole
            if folder not in rooms and folder != folder_of(name, names) and not handed_out:
                found.append(f"{relative(path)} imports {module}: through {folder} instead")
    return found
