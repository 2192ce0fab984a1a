"""Where what was found out about a checkpoint is written."""

from pathlib import Path

from mixtral_jax.train.read_model import run_place


def results_directory(checkpoint: str, path: str) -> Path | None:
    """<run>/eval/<step> of the step at `path`, see newest_step; None: the checkpoint is of no run."""
    run = run_place(checkpoint)
    return None if run is None else run / "eval" / Path(path).name
