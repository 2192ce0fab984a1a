"""Every shipped YAML parses, survives a round trip, and trains for two steps at toy size."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mixtral_jax.data.train_tokenizer import train_sentencepiece
from mixtral_jax.train import trainer
from mixtral_jax.train.config.load import load_config, resolved_yaml
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.config.tree import tree_from_text
from tests.optional import often

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
ALIKE = [path for path in FILES if path.stem.endswith(("v5e-256", "v5p-128", "v6e-256", "v6e-64", "h100-8"))]
WORDS = ["le", "chat", "is", "on", "die", "Matte", "und", "el", "perro", "il", "gatto", "print(x)"]
TOY_MODEL = "{preset: tiny, vocab_size: 300, hidden_size: 32, head_dim: 8, num_attention_heads: 4, num_hidden_layers: 2, intermediate_size: 16}"  # noqa: E501 - one YAML value


def named(path: Path) -> str:
    """Of a test's parameter."""
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a few records of every kind."""
    directory = tmp_path_factory.mktemp("toy")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(200)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "tokenizer.model").write_bytes(train_sentencepiece(texts, 300))
    _tokenizer_json(texts).save(str(directory / "tokenizer.json"))
    chats = [{"prompt": rng.choice(WORDS), "completion": rng.choice(WORDS)} for _ in range(100)]
    (directory / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    answers = [dict(zip(("chosen", "rejected"), rng.sample(WORDS, 2), strict=True)) for _ in range(30)]
    pairs = "".join(json.dumps({"prompt": rng.choice(WORDS)} | pair) + "\n" for pair in answers)
    (directory / "preference.jsonl").write_text(pairs)
    return directory


def _tokenizer_json(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the tokens of ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def toy_overrides(directory: Path, file: RunConfig) -> list[str]:
    """Overrides that make any run small; everything that does not change the size stays as the file says."""
    sources = f"[{{name: toy, path: {directory / f'{file.data.examples}.jsonl'}, weight: 1}}]"
    pieces = "tokenizer.json" if file.data.tokenizer.endswith(".json") else "tokenizer.model"
    return [
        f"output_dir={directory / 'runs'}", f"model={TOY_MODEL}", "init_from=null",
        "steps=2", "seq_len=32", "global_batch_size=8", "micro_batch_size=null", "mesh={}", "optimizer.warmup_steps=0",
        "compute.attention=auto", "compute.moe.matmul=auto", "compute.moe.transport=auto",
        "compute.moe.chunk_tokens=null",
        f"data.tokenizer={directory / pieces}", f"data.train={sources}", "data.phases=null",
        f"data.validation={sources}",
        f"data.cache_dir={directory / 'cache'}", "data.workers=1", "eval.batches=1", "log.wandb=null",
        "checkpoint.directory=null", "sample.max_new_tokens=2",
    ]  # fmt: skip


def test_there_is_something_to_test() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_shipped_file_is_complete_and_says_what_it_is(path: Path, tmp_path: Path) -> None:
    config, _ = load_config(path)
    assert config.stage == path.parent.name
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again).config == config
    written = tree_from_text(path.read_text(encoding="utf-8")).values
    missing = type(config).model_fields.keys() - written.keys()
    assert missing <= {
        "early_stopping",
        "init_from",
        "resume",
        "micro_batch_size",
        "sample",
        "log",
        "compute",
        "mesh",
        "router",
    }


@pytest.mark.parametrize(
    "path", often(FILES, lambda path: path not in ALIKE), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_a_shipped_file_trains_two_steps(
    path: Path, toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "make_mesh", lambda config: None)  # meshes are for other tests
    overrides = toy_overrides(toy, load_config(path).config)
    config, provenance = load_config(path, overrides)
    assert trainer.run(config, provenance) == 0
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert json.loads((config.run_dir / "STATUS").read_text())["exit_code"] == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("exit 0")
