"""Without the extra `parity` each file here is one skip that says so."""

from pathlib import Path

import pytest

from tests.optional import missing


class Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(str(missing()), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if missing() else None
