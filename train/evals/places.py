"""Where what was found out about a checkpoint is written."""

import os
from pathlib import Path

import jax

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.read_model import run_place


def results_directory(checkpoint: str, path: str, out: str | None) -> Path | None:
    """`out`, or <run>/eval/<step> of the step at `path`, see newest_step; None: the checkpoint is of no run.

    It is made here, before there is anything to lose.

    Raises:
        UserError: it cannot be.
    """
    run = run_place(checkpoint)
    directory = Path(out) if out else run and run / "eval" / Path(path).name
    if directory is not None and jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be made ({error.strerror}): --out names where to write") from error
        if not os.access(directory, os.W_OK):
            raise UserError(f"{directory} may not be written into: --out names another place")
    return directory
