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
from mixtral_jax.data.prepare.cache import PreparedSource, digest, write_atomically
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
    batches = list(range(-(-source.rows // rows)))
    parts = [batches[i : i + PART_BATCHES] for i in range(0, len(batches), PART_BATCHES)]
    files = [directory / f"part-{i:05d}-of-{len(parts):05d}.npy" for i in range(len(parts))]
    missing = [file for file in files if not file.exists()]
    if missing:
        say(f"reference: computing {source.rows:,} rows of {source.name}, {len(missing)} of {len(parts)} parts")
        _compute(files, parts, EvalSource(source, rows, share), ask)
    numbers = np.concatenate([np.load(file) for file in files])[: source.rows]
    if numbers.shape != (source.rows, source.format.pairs, 2):
        raise UserError(f"{directory} holds numbers of shape {numbers.shape}: it is damaged, remove the directory")
    return numbers


def _compute(files: list[Path], parts: list[list[int]], source: EvalSource, ask: Put) -> None:
    for file, wanted in zip(files, parts, strict=True):
        if file.exists():
            continue
        found = [_on_host(ask(source.batch(step)).ref_logps)[0] for step in wanted]
        if jax.process_index() == 0:
            _save(file, np.concatenate(found))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("reference")


def _on_host(values: jax.Array) -> np.ndarray:
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(values, tiled=True))
    return np.asarray(values)


def _save(file: Path, numbers: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, numbers.astype(np.float32))
    write_atomically(file, stream.getvalue())
