"""How often each expert was chosen over the steps of a run: moe.jsonl in a few dozen columns."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixtral_jax.train.report.history import bucket_width
from mixtral_jax.train.run_files import Advance, lines_backwards

COLUMNS = 60


class Loads(NamedTuple):
    """`load_LES`: choices of each expert, relative to an even share (1), over the steps up to each of `steps`."""

    load_LES: np.ndarray
    steps: list[int]


def read_loads(file: Path, advance: Advance | None = None) -> Loads | None:
    """Summed over buckets of steps; None: there are none. Lines that are damaged or of another shape do not count."""
    sums, done, width = dict[int, tuple[int, np.ndarray]](), None, 1
    for line in lines_backwards(file, advance=advance):
        try:
            counts_LE = np.asarray(line.get("counts"), float)
        except (ValueError, TypeError):
            continue
        if counts_LE.ndim != 2:
            continue
        step = line["step"]
        if done is None:
            shape, width = counts_LE.shape, bucket_width(step, COLUMNS)
        elif step >= done or counts_LE.shape != shape:
            continue
        done = step
        newest, sum_LE = sums.get(step // width, (step, 0))
        sums[step // width] = newest, sum_LE + counts_LE
    if not sums:
        return None
    steps, counts_SLE = zip(*(sums[bucket] for bucket in sorted(sums)), strict=True)
    whole = np.stack(counts_SLE).transpose(1, 2, 0)
    mean = whole.mean(axis=1, keepdims=True)
    return Loads(np.divide(whole, mean, out=np.full_like(whole, np.nan), where=mean > 0), list(steps))
