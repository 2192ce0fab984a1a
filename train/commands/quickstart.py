"""The end of `make quickstart`: what the model learned, measured against gzip, what it writes, what its routers do.

python -m mixtral_jax.train.commands.quickstart runs/quickstart
"""

import gzip
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixtral_jax.convert import load
from mixtral_jax.data.text import load_tokenizer, texts_of
from mixtral_jax.train.commands.routing import routing
from mixtral_jax.train.config import RunConfig, load_config
from mixtral_jax.train.run_files import lines_backwards
from mixtral_jax.train.text import generate

LANGUAGES = {
    "en": "The following example shows how to",
    "fr": "Dans la boîte de dialogue, vous pouvez",
    "de": "Wählen Sie die Option, um",
    "es": "Haga clic en el botón para",
    "it": "Per impostazione predefinita, il",
    "code": "def __init__(self",
}

_ROUTED = 8000  # tokens of each language, whose routing is shown


def main(run_dir: str) -> int:
    """Print the comparison, samples, where to go from here, and the page of the routers.

    Returns 1 where gzip compresses a language better.
    """
    config = load_config(Path(run_dir) / "config.yaml").config
    console = Console(highlight=False, soft_wrap=True)
    metrics = next(line for line in lines_backwards(Path(run_dir) / "metrics.jsonl") if "eval/loss" in line)
    beaten = compare(config, metrics, console)
    write_samples(config, run_dir, console)
    console.print(_NEXT.format(run=run_dir))
    begun = time.perf_counter()
    routing(run_dir, tokens=_ROUTED)
    console.print(f"made in {time.perf_counter() - begun:.0f} s: open it in a browser")
    if not beaten:
        print("exit 1: gzip compresses a language better than the model does", file=sys.stderr)
    return 0 if beaten else 1


def gzip_bits_per_byte(texts: list[str]) -> float:
    """Bits per byte of `gzip -9` of the texts joined by a blank line (NUMERICS D7)."""
    joined = "\n\n".join(texts).encode()
    return 8 * len(gzip.compress(joined, compresslevel=9, mtime=0)) / len(joined)


def compare(config: RunConfig, metrics: dict[str, Any], console: Console) -> bool:
    """Print bits per byte beside gzip's; whether the model wins in every natural language."""
    table = Table(title="Bits per byte of text that the model has not seen (smaller is better)")
    for name in ("text", "this model", "gzip -9", ""):
        table.add_column(name, justify="left" if name in ("text", "") else "right")
    won = True
    for source in config.data.validation:
        ours = metrics[f"eval/{source.name}/bits_per_byte"]
        theirs = gzip_bits_per_byte(list(texts_of(source)))
        verdict = f"{100 * (1 - ours / theirs):.0f} % smaller" if ours < theirs else "gzip wins"
        table.add_row(source.name, f"{ours:.3f}", f"{theirs:.3f}", verdict)
        won &= ours < theirs or source.name == "code"
    console.print(table)
    return won


def write_samples(config: RunConfig, run_dir: str, console: Console) -> None:
    """A few lines in each language."""
    answers = generate(
        load(run_dir), list(LANGUAGES.values()), tokenizer=load_tokenizer(config.data.tokenizer),
        max_new_tokens=48, temperature=0.5, top_p=0.95, seed=1,
    )  # fmt: skip
    console.print("\nWhat it writes (temperature 0.5), three minutes after knowing nothing:")
    for (language, prompt), answer in zip(LANGUAGES.items(), answers, strict=True):
        console.print(f"  [bold]{language:4}[/bold] {escape(' '.join((prompt + answer).split()))}")


_NEXT = """
Everything is in {run}: report.html (its page), metrics.jsonl, tensorboard/, checkpoints/, config.yaml, env.json.

What to try next
  .venv/bin/python launch.py generate {run} --prompt "Debian is" --temperature 0.7
  .venv/bin/python launch.py convert orbax2hf {run} quickstart-hf     # load it with transformers
  .venv/bin/python launch.py pretrain configs/pretrain/quickstart.yaml run_name=longer steps=5000
  .venv/bin/python launch.py config show configs/pretrain/quickstart.yaml
  make test                                                          # why it can be trusted
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
