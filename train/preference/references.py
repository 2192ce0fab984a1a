"""The reference of preference learning, as numbers in the batch: live, or computed once and kept.

`frozen` holds a copy of the weights that the run starts from, `lora_base` uses the frozen base under the adapters;
both are asked for every batch. `precomputed` asks once for every row, keeps the answers in the cache under a key of
everything that changes them, and then needs no second model. All three are the same jitted function.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.data.loader import EvalSource
from mixtral_jax.data.prepare import PreparedSource, Use, digest, keep, open_cache, recall
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.meetings import gather, hear, meet

PART_BATCHES = 64  # micro-batches in a file: what a killed job computes again at most
Put = Callable[[Any], Any]


def live(sequence_logps: Callable[[Any, Any], jax.Array], weights: Any, put: Put) -> Put:
    """A put that also asks a reference with these weights."""

    def with_reference(host_batch: Any) -> Any:
        batch = put(host_batch)
        return batch._replace(ref_logps=sequence_logps(weights, batch))

    return with_reference


def precomputed(
    sources: Iterable[PreparedSource],
    ask: Put,
    made_of: Mapping[str, Any],
    cache_dir: str,
    rows: int,
    share: tuple[int, int],
    say: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """Fingerprint of each prepared source -> (rows, K, 2) log-probabilities, from the cache or computed now.

    Args:
        ask: `live` with the reference's weights.
        made_of: all that changes the numbers beside the rows: the weights' digest, the model and how it computes.
        rows: of a micro-batch.
        share: (i, n), this process's part of each micro-batch.

    Raises:
        UserError: the cache holds numbers that were made of something else.
    """
    result: dict[str, np.ndarray] = {}
    for source in sources:
        if source.fingerprint not in result:
            key = {**made_of, "rows": source.fingerprint}  # of content, tokenizer, template, seq_len and packing
            directory = f"references/{digest(key)[:24]}"
            cache = open_cache(cache_dir)
            use = Use(cache, directory)
            result[source.fingerprint] = _numbers(cache, directory, key, source, ask, rows, share, say)
            use.end()
    return result


def _numbers(
    cache: Path,
    directory: str,
    key: dict[str, Any],
    source: PreparedSource,
    ask: Put,
    rows: int,
    share: tuple[int, int],
    say: Callable[[str], None],
) -> np.ndarray:
    """The numbers of one source; a job that was stopped goes on where it was.

    The directory may be one that all processes share or an own one of each: a part that some process has is not
    computed again, and each keeps what it lacked.
    """
    described, meta = json.dumps(key, sort_keys=True).encode(), f"{directory}/meta.json"
    if (found_meta := recall(cache, meta)) not in (None, described):
        noted = json.loads(found_meta or b"")
        other = [name for name in key if noted.get(name) != json.loads(described)[name]]
        place = cache / directory
        raise UserError(f"{place} holds reference numbers of another {', '.join(other)}: remove the directory")
    batches = range(-(-source.rows // rows))
    parts = [batches[first : first + PART_BATCHES] for first in batches[::PART_BATCHES]]
    files = [f"{directory}/part-{i:05d}-of-{len(parts):05d}.npy" for i in range(len(parts))]
    shapes = [(len(part) * rows, source.format.pairs, 2) for part in parts]
    found = [_read(cache, file, shape) for file, shape in zip(files, shapes, strict=True)]
    there = gather(np.array([part is not None for part in found]))  # by process and part
    if found_meta is None:
        keep(cache, meta, described)
    if missing := int(np.sum(~there.any(axis=0))):
        say(f"reference: computing {source.rows:,} rows of {source.name}, {missing} of {len(parts)} parts")
    asked, lacking = EvalSource(source, rows, share), [i for i, part in enumerate(found) if part is None]
    numbers = [np.zeros(shape, np.float32) if part is None else part for part, shape in zip(found, shapes, strict=True)]
    for i in np.flatnonzero(~there.all(axis=0)).tolist():
        holders = np.flatnonzero(there[:, i])
        numbers[i] = hear(numbers[i], int(holders[0])) if holders.size else _compute(parts[i], asked, ask)
        if i in lacking and jax.process_index() == 0:
            _write(cache, files[i], numbers[i])
    meet("reference")
    for i in lacking:
        if _read(cache, files[i], shapes[i]) is None:  # what process 0 has written lies elsewhere
            _write(cache, files[i], numbers[i])
    return np.concatenate(numbers)[: source.rows]


def _compute(batches: Iterable[int], source: EvalSource, ask: Put) -> np.ndarray:
    answers = (ask(source.batch(number)).ref_logps for number in batches)
    found = [multihost_utils.process_allgather(answer, tiled=True)[0] for answer in answers]
    return np.concatenate(found).astype(np.float32)


def _read(cache: Path, file: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A part, or None where it is not there or not whole."""
    try:
        numbers = np.load(io.BytesIO(recall(cache, file) or b""))
    except (EOFError, ValueError):
        return None
    return numbers if numbers.shape == shape and numbers.dtype == np.float32 else None


def _write(cache: Path, file: str, numbers: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, numbers)
    keep(cache, file, stream.getvalue())
