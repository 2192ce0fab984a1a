"""What the extra `parity` brings, where it is installed; elsewhere a test that comes to need it is skipped there."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import pytest

PARITY = ("torch", "transformers", "trl", "peft", "mistral_common")


def missing() -> str | None:
    """Why tests beside other libraries cannot run here; None where they can."""
    absent = [name for name in PARITY if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)} (extra: parity)" if absent else None


class Absent:
    """Stands for a module: whoever asks it for anything is skipped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks through what a test file holds
            raise AttributeError(attribute)
        pytest.skip(f"needs {self._name} (extra: parity)")


def module(name: str) -> Any:
    return Absent(name) if importlib.util.find_spec(name) is None else importlib.import_module(name)


torch, transformers = module("torch"), module("transformers")


def often(values: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """Values of a parametrization; those that are not kept run with the slow tests only."""
    return [value if keep(value) else pytest.param(value, marks=pytest.mark.slow) for value in values]
