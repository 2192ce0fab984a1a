"""Data: how fast text becomes rows, and whether training waits for them."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare.prepared import prepare

SAMPLES = Path("data/samples")
QUICKSTART = "configs/pretrain/quickstart.yaml"


def section(tokenizer: str | None, copies: int, steps: int) -> str:
    """Tokens a second of preparation, and the share of a step that a run of the quickstart waits for data."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = preparation(Path(folder), tokenizer or str(SAMPLES / "tokenizer.model"), copies)
        return f"{prepared}\n\n{waiting(Path(folder), steps)}"


def preparation(folder: Path, tokenizer: str, copies: int) -> str:
    """The bundled text, `copies` times, into rows of 2,048 tokens, nothing cached."""
    files, characters = sorted(SAMPLES.glob("*.train.jsonl.gz")), 0
    for file in files:
        text = gzip.decompress(file.read_bytes())
        characters += copies * len(text.decode())
        for copy in range(copies):
            (folder / f"{copy}-{file.stem}").write_bytes(text)
    train = ({"name": "text", "path": str(folder / "*.jsonl")},)
    config = DataConfig.model_validate(dict(tokenizer=tokenizer, train=train, cache_dir=str(folder / "cache")))
    began = time.perf_counter()
    tokens = prepare(config, 2048, 0, progress=False).train[0].tokens
    seconds = time.perf_counter() - began
    return (
        f"Preparation with {Path(tokenizer).name}: {characters / 1e6:.0f} million characters, {tokens:,} tokens in "
        f"{seconds:.1f} s on {os.cpu_count()} cores, **{tokens / seconds / 1e6:.2f} M tokens/s**."
    )


def waiting(folder: Path, steps: int) -> str:
    """What of a step of the quickstart is spent waiting for its batch."""
    changes = [f"steps={steps}", f"output_dir={folder}", f"data.cache_dir={folder / 'rows'}"]
    command = [sys.executable, "launch.py", "pretrain", QUICKSTART, *changes]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    lines = [json.loads(line) for line in (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    shares = [x["perf/data_wait_seconds"] / x["perf/step_seconds"] for x in lines if "perf/step_seconds" in x]
    return (
        f"Over {steps} steps of `make quickstart` training waits for data {100 * sum(shares) / len(shares):.2f} % of "
        f"the time, in its worst interval {100 * max(shares):.2f} %."
    )
