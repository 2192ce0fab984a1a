"""A run's own copy of its tokenizer and of its chat format: when the files move, the run can still be asked."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from mixtral_jax.convert import KEPT, kept_tokenizer
from mixtral_jax.data.text import Tokenizer, load_template, load_tokenizer, read_by_name
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.errors import UserError


def keep_tokenizer(run: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Copy what data.tokenizer was read from, once for each chat format, so that there is a whole copy or none."""
    named, about = config.data.tokenizer, run.joinpath(*KEPT)
    scratch = about.parent.with_suffix(".tmp")
    only = read_by_name(named)
    chats = config.data.examples != "text"
    template = load_template(config.data.template, load_tokenizer(named)).format.model_dump() if chats else None
    text = json.dumps({"read": only, "template": template}, indent=2) + "\n"
    if _fingerprint(run) == tokenizer.fingerprint() and about.read_text() == text:
        return
    for place in (scratch, about.parent):
        shutil.rmtree(place, ignore_errors=True)
    scratch.mkdir()
    for name, content in tokenizer.files.items():
        (scratch / name).write_bytes(content)
    (scratch / about.name).write_text(text)
    scratch.rename(about.parent)


def check_tokenizer(run: Path, tokenizer: Tokenizer) -> bool:
    """Whether the ids are known to mean what they meant when the run began: it has a copy of its tokenizer.

    Raises:
        UserError: they mean something else.
    """
    began = _fingerprint(run)
    if began not in (None, tokenizer.fingerprint()):
        raise UserError(
            f"data.tokenizer is another one than the run began with, of which {run / KEPT[0]} is a copy: set it back, "
            "or choose another run_name; or set data.restart=true where that is meant"
        )
    return began is not None


def kept_template(run: Path) -> dict[str, Any] | None:
    """The chat format that a run was trained with, if it has a copy and was one of chats."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(run.joinpath(*KEPT).read_text())["template"]
    return None


def _fingerprint(run: Path) -> str | None:
    path = kept_tokenizer(run)
    with contextlib.suppress(ValueError):  # one that is cut off is made anew
        return None if path is None else load_tokenizer(path).fingerprint()
    return None
