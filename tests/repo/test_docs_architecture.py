"""docs/architecture.md: its picture is that of today's imports, its ways are short, its files exist."""

import re

from tests.rooms import PICTURE, draw
from tests.sources import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_picture_is_current() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "python -m tests.rooms draws it anew"


def test_each_way_takes_at_most_eight_files_that_exist() -> None:
    ways = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:3]
    for way in ways:
        files = re.findall(r"^\| \d+ \| `([^`]+)`", way, flags=re.MULTILINE)
        assert 4 < len(files) <= 8
        assert [file for file in files if not (ROOT / file).is_file()] == []
