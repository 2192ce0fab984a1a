"""Sources prepared from the bundled samples, and what their rows hold."""

import gzip
import json
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare.cache import PreparedSource
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "data" / "samples"
MODEL = SAMPLES / "tokenizer.model"
TOKENIZER = load_tokenizer(MODEL)
SEQ_LEN = 64


def config_of(cache: Path, path: Path | str | list[str] = SAMPLES / "fr.val.jsonl.gz", **options: Any) -> DataConfig:
    train = ({"name": "fr", "path": path if isinstance(path, list) else str(path)},)
    return DataConfig(**{"tokenizer": str(MODEL), "train": train, "cache_dir": str(cache), "workers": 1, **options})


def prepare_one(config: DataConfig, seed: int = 0, seq_len: int = SEQ_LEN, **options: Any) -> PreparedSource:
    return prepare(config, seq_len, seed, progress=False, **options).train[0]


def records_of(source: PreparedSource) -> list[bytes]:
    reader = ArrayRecordDataSource(source.paths)
    return list(reader.__getitems__(range(len(reader))))


def texts_of(path: Path) -> list[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["text"] for line in content.splitlines()]


def lines_of(directory: Path, packed: Path) -> Path:
    """A compressed file as it is without that: in units of a few lines."""
    path = directory / packed.stem
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def documents_of(source: PreparedSource) -> list[tuple[int, ...]]:
    """The documents of rows in which none is split."""
    found: list[tuple[int, ...]] = []
    for record in records_of(source):
        row = source.format.decode(record)
        for segment in range(1, row.segment_ids.max() + 1):
            piece = row.tokens[row.segment_ids == segment].tolist()
            if segment == row.segment_ids.max() and row.weights[-1]:  # it reaches the place after the last input
                piece.append(int(row.targets[-1]))
            found.append(tuple(piece))
    return found


def leftovers(cache: Path) -> list[str]:
    """What lies in a cache beside hashes, locks and document stores."""
    others = [p for p in cache.iterdir() if p.name not in ("hashes", "locks")]
    return sorted(p.name for p in others if not any(p.glob("part-*")))
