"""The blocks of docs/library.md and README.md run from the first to the last, each document in one session."""

import re
from pathlib import Path

from tests.sources import ROOT


def run_blocks(document: str, directory: Path, monkeypatch) -> dict:
    """What the session knows at the end."""
    (directory / "data").symlink_to(ROOT / "data")
    recipe = directory / "configs" / "pretrain" / "quickstart.yaml"
    recipe.parent.mkdir(parents=True)
    shipped = (ROOT / recipe.relative_to(directory)).read_text(encoding="utf-8")
    assert "\neval: {" in shipped  # of all the validation texts a few rows: evaluations would take most of the time
    recipe.write_text(shipped.replace("\neval: {", "\neval: {batches: 2, "), encoding="utf-8")
    monkeypatch.chdir(directory)
    monkeypatch.setattr("mixtral_jax.train.trainer.make_mesh", lambda config: None)  # eight devices are for other tests
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    session: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), session)
    session["trainer"].close()
    return session


def test_the_library_page(tmp_path: Path, monkeypatch) -> None:
    session = run_blocks("docs/library.md", tmp_path, monkeypatch)
    assert session["trainer"].step == 10 and len(session["trainer"].history) > 1
    assert session["logits"].shape == (1, 4, session["tiny"].vocab_size)
    assert session["again"].config == session["model"].config


def test_the_readme(tmp_path: Path, monkeypatch) -> None:
    session = run_blocks("README.md", tmp_path, monkeypatch)
    assert session["trainer"].step == 10 and (tmp_path / "notebook-hf" / "config.json").exists()
