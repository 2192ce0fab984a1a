"""docs/library.md runs from its first block to its last, in one session."""

import re
from pathlib import Path

from tests.sources import ROOT


def test_the_blocks_run_in_order(tmp_path: Path, monkeypatch) -> None:
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixtral_jax.train.trainer.make_mesh", lambda config: None)  # eight devices are for other tests
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.DOTALL)
    session: dict = {}
    for block in blocks:
        exec(compile(block, "library.md", "exec"), session)
    assert session["trainer"].step == 10 and len(session["trainer"].history) > 1
    assert session["logits"].shape == (1, 4, session["tiny"].vocab_size)
    assert session["again"].config == session["model"].config
