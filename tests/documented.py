"""What docs/runs.md says of metrics, for the tests of runs that write them."""

import re

from tests.sources import ROOT


def undocumented(lines: list[dict]) -> set[str]:
    """Metric names in lines of metrics.jsonl that no row of the table in docs/runs.md explains."""
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    known = {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)} | {"step"}
    # eval/<source>/loss is eval/loss of one source
    return {
        name for line in lines for name in line if re.sub(r"^eval/words/|^eval/answers/", "eval/", name) not in known
    }
