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
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from mixtral_jax.data.loader import EvalSource
from mixtral_jax.data.prepare import PreparedSource, digest, write_atomically
from mixtral_jax.train.errors import UserError

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
            directory = Path(cache_dir) / "references" / digest(key)[:24]
            result[source.fingerprint] = _numbers(directory, key, source, ask, rows, share, say)
    return result


def weights_digest(weights: Any) -> str:
    """A hash of every bit of the weights, computed where they lie; the same on every mesh."""

    @jax.jit
    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, bits.size)
        mixed = (bits ^ (bits >> 15)) * (2 * place + 1) + bits * jnp.uint32(0x9E3779B1)
        return jnp.stack([jnp.sum(mixed), jnp.sum((mixed ^ (mixed >> 13)) * jnp.uint32(0x85EBCA77))])

    return digest(
        [
            [path, [int(v) for v in jax.device_get(checksum(x))]]
            for path, x in sorted(flatten_dict(weights, sep=".").items())
        ]
    )


def _numbers(
    directory: Path,
    key: dict[str, Any],
    source: PreparedSource,
    ask: Put,
    rows: int,
    share: tuple[int, int],
    say: Callable[[str], None],
) -> np.ndarray:
    """The numbers of one source; a job that was stopped goes on where it was."""
    directory.mkdir(parents=True, exist_ok=True)
    described, meta = json.dumps(key, sort_keys=True), directory / "meta.json"
    if meta.exists() and meta.read_text() != described:
        found = json.loads(meta.read_text())
        other = [name for name in key if found.get(name) != json.loads(described)[name]]
        raise UserError(f"{directory} holds reference numbers of another {', '.join(other)}: remove the directory")
    if jax.process_index() == 0:
        write_atomically(meta, described)
    batches = range(-(-source.rows // rows))
    parts = [batches[first : first + PART_BATCHES] for first in batches[::PART_BATCHES]]
    files = {directory / f"part-{i:05d}-of-{len(parts):05d}.npy": part for i, part in enumerate(parts)}
    missing = {file: part for file, part in files.items() if not file.exists()}
    if missing:
        say(f"reference: computing {source.rows:,} rows of {source.name}, {len(missing)} of {len(parts)} parts")
        _compute(missing, EvalSource(source, rows, share), ask)
    numbers = np.concatenate([np.load(file) for file in files])[: source.rows]
    if numbers.shape != (source.rows, source.format.pairs, 2):
        raise UserError(f"{directory} holds numbers of shape {numbers.shape}: it is damaged, remove the directory")
    return numbers


def _compute(files: Mapping[Path, Iterable[int]], source: EvalSource, ask: Put) -> None:
    for file, batches in files.items():
        answers = (ask(source.batch(number)).ref_logps for number in batches)
        found = [multihost_utils.process_allgather(answer, tiled=True)[0] for answer in answers]
        if jax.process_index() == 0:
            stream = io.BytesIO()
            np.save(stream, np.concatenate(found).astype(np.float32))
            write_atomically(file, stream.getvalue())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("reference")
