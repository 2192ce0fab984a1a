"""A Mixtral of a few thousand parameters, batches of random rows, and short runs for the tests of the training room."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mixtral_jax.config import MixtralConfig
from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.model import Mixtral

TINY = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "rope_theta": 1e4, "initializer_range": 0.1,
}  # fmt: skip


def tiny_config(**changes) -> MixtralConfig:
    return MixtralConfig(**{**TINY, **changes})


def tiny_model(config: MixtralConfig, seed: int = 0) -> Mixtral:
    return Mixtral(config, key=jax.random.key(seed))


def split(model: Mixtral):
    """(params, merge) as the training room uses them."""
    graphdef, _ = nnx.split(model)
    return nnx.to_pure_dict(nnx.state(model)), lambda params, frozen: nnx.merge(graphdef, params)


def random_batch(shape, vocab=320, seed=0) -> Batch:
    """(A, b, T) rows of two documents and some padding; weights unequal, many 0, so that micro-batches differ."""
    rng = np.random.default_rng(seed)
    A, b, T = shape
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for index in np.ndindex(A, b):
        first, end = sorted(rng.integers(1, T + 1, 2))
        segments[index][:first], segments[index][first:end] = 1, 2
        positions[index][:first], positions[index][first:end] = np.arange(first), np.arange(end - first)
    keep = rng.random(shape) < rng.random((A, b, 1))
    weights = (rng.random(shape) * keep * (segments > 0)).astype(np.float32)
    tokens, targets = rng.integers(0, vocab, (2, *shape)).astype(np.int32)
    return Batch(tokens, targets, weights, segments, positions)


def regroup(batch: Batch, micro_batches: int) -> Batch:
    """The same rows in another number of micro-batches."""
    return Batch(*(x.reshape(micro_batches, -1, x.shape[-1]) for x in batch))


def largest_relative_difference(a, b) -> float:
    """max over leaves of |a - b| / |b|, both as vectors."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(np.subtract(x, y)) / (np.linalg.norm(y) + 1e-30)) for x, y in pairs)


def write_run_file(directory: Path, **changes) -> Path:
    """A pretraining file of a few steps over a few sentences and a byte-level tokenizer, all inside `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(directory / "tokenizer.json")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("val", 6)):
        lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 30))}) for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "stage": "pretrain", "run_name": "run", "output_dir": str(directory / "runs"), "steps": 8, "seq_len": 32,
        "global_batch_size": 8, "model": TINY,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "schedule": "constant"},  # one program for any length
        "data": {
            "tokenizer": str(directory / "tokenizer.json"), "cache_dir": str(directory / "cache"), "workers": 1,
            "train": [{"name": "words", "path": str(directory / "train.jsonl")}],
            "validation": [{"name": "words", "path": str(directory / "val.jsonl")}],
        },
        "eval": {"every": None}, "checkpoint": {"every": 3}, "log": {"every": 2, "tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    file = directory / "run.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def write_byte_tokenizer(path: Path) -> None:
    """A tokenizer.json with one piece for each byte, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


WORDS = (
    "the router sends each token to two of its experts and adds what they say, weighted by how sure it was"
).split()
