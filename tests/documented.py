"""What docs/runs.md says of metrics, for the tests of runs that write them."""

import re

from tests.sources import ROOT


def undocumented(lines: list[dict]) -> set[str]:
    """Metric names in lines of metrics.jsonl that no row of the table in docs/runs.md explains."""
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    known = {name for cell in cells for name in re.findall(r"`([\w/<>]+)`", cell)} | {"step"}
    # eval/<source>/loss is eval/loss of one source
    plain = {r"^eval/(words|answers)/": "eval/", r"^data/[\w.-]+/": "data/<source>/"}

    def row_of(name: str) -> str:
        for pattern, general in plain.items():
            name = re.sub(pattern, general, name)
        return name

    return {name for line in lines for name in line if row_of(name) not in known}
