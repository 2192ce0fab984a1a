"""The end of `make demo`: what SFT and DPO changed, measured, and the tuned model as other programs load it.

python -m mixtral_jax.train.commands.demo BASE_RUN SFT_RUN DPO_RUN HF_DIRECTORY
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mixtral_jax.convert import load
from mixtral_jax.data.text import Tokenizer, encode_prompt, load_template, load_tokenizer
from mixtral_jax.generation import generate
from mixtral_jax.train.base import base_weights
from mixtral_jax.train.commands.evaluate import measure, open_validation
from mixtral_jax.train.config import RunConfig, load_config
from mixtral_jax.train.preference import make_sequence_logps
from mixtral_jax.train.weights import abstract_params, make_base_merge

PROMPTS = (
    "Translate to French: Select the text.",
    "Übersetze den folgenden englischen Text ins Deutsche:\n\nSelect the cell.",
    "Are you a robot?",
    "¿Cómo estás?",
)
NEW_TOKENS = 32


def main(base: str, sft: str, dpo: str, exported: str) -> int:
    """Print losses, preferences and answers before and after; 1 where a stage did not do what it is for."""
    console = Console(highlight=False, soft_wrap=True)
    tuned, preferred = (load_config(Path(run) / "config.yaml").config for run in (sft, dpo))
    losses = [measure(run, tuned) for run in (base, sft, dpo)]
    console.print(_loss_table([source.name for source in tuned.data.validation], losses))
    before, after = (pair_logps(preferred, run) for run in (sft, dpo))
    console.print(_preference_table(before, after))
    answers = {who: _answers(preferred, run) for who, run in {"base": base, "SFT": sft, "DPO": dpo}.items()}
    console.print(f"\nAnswers (the likeliest token each time; ... where {NEW_TOKENS} tokens did not end it):")
    for number, prompt in enumerate(PROMPTS):
        console.print(f"  [bold]{' '.join(prompt.split())}[/bold]")
        for who, texts in answers.items():
            console.print(f"    {who:5}{texts[number]}", markup=False)
    elsewhere, agrees = _load_elsewhere(exported, preferred, answers["DPO"][0])
    console.print(elsewhere, markup=False)
    console.print(_NEXT.format(exported=exported))
    failed = [] if agrees else ["transformers answers differently from the exported directory"]
    if not losses[1]["eval/loss"] < losses[0]["eval/loss"]:
        failed.append("SFT did not lower the validation loss")
    if not reward_accuracy(before["all"], after["all"]) > 0.5:
        failed.append("DPO's reward accuracy on held-out pairs is not above chance")
    if failed:
        print(f"exit 1: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def pair_logps(config: RunConfig, run: str) -> dict[str, np.ndarray]:
    """Source or "all" -> (pairs, 2): log-probabilities of chosen and rejected answers of the held-out pairs."""
    config = config.model_copy(update={"init_from": run})
    sequence_logps = make_sequence_logps(make_base_merge(config), None)
    weights = base_weights(config, abstract_params(config, None))
    sources, put = open_validation(config, None)
    found = {}
    for name, source in sources.items():
        batches = [put(batch) for batch in source]
        parts = [np.asarray(sequence_logps(weights, b))[np.asarray(b.mask) > 0] for b in batches]
        found[name] = np.concatenate(parts)
    return found | {"all": np.concatenate(list(found.values()))}


def reward_accuracy(before: np.ndarray, after: np.ndarray) -> float:
    """Share of pairs whose chosen answer gained more log-probability than the rejected one (TRL's accuracy)."""
    return _chosen_first(after - before)


def _chosen_first(pairs: np.ndarray) -> float:
    return float(np.mean(pairs[:, 0] > pairs[:, 1]))


def _loss_table(sources: list[str], losses: Sequence[dict[str, float]]) -> Table:
    table = Table(title="Loss of answers that no stage has seen (nats per token; smaller is better)")
    for name in ("source", "base", "after SFT", "after DPO", "SFT"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for label, key in [*((name, f"eval/{name}/loss") for name in sources), ("all", "eval/loss")]:
        base, sft, dpo = (row[key] for row in losses)
        table.add_row(label, f"{base:.3f}", f"{sft:.3f}", f"{dpo:.3f}", f"{100 * (sft / base - 1):+.0f} %")
    return table


def _preference_table(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> Table:
    table = Table(title="Held-out pairs: the better answer is likelier; it gained more (reward accuracy)")
    for name in ("source", "pairs", "likelier\nafter SFT", "\nafter DPO", "reward acc.\nbefore", "\nafter DPO"):
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
    for name, old in before.items():
        new = after[name]
        # before DPO the policy is its own reference: every pair is a tie
        shares = (_chosen_first(old), _chosen_first(new), 0.5, reward_accuracy(old, new))
        table.add_row(name, str(len(old)), *(f"{share:.1%}" for share in shares))
    return table


def _answers(config: RunConfig, run: str) -> list[str]:
    """What the model of a run makes of the prompts."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = _prompt_ids(config, tokenizer)
    rows = generate(load(run), ids, max_new_tokens=NEW_TOKENS, temperature=0.0, eos_id=tokenizer.eos_id)
    return [_text(tokenizer, row) for row in rows]


def _prompt_ids(config: RunConfig, tokenizer: Tokenizer) -> list[list[int]]:
    template = load_template(config.data.template, tokenizer)
    return [encode_prompt([{"role": "user", "content": prompt}], template) for prompt in PROMPTS]


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """One line; an answer that came to its end says so."""
    text = " ".join(tokenizer.decode([t for t in ids if t != tokenizer.eos_id]).split())
    return text if tokenizer.eos_id in ids else text + " ..."


def _load_elsewhere(directory: str, config: RunConfig, expected: str) -> tuple[str, bool]:
    """What transformers, where that is installed, makes of the exported directory, and whether it answers the same."""
    files = sorted(path.name for path in Path(directory).iterdir())
    line = f"\nExported to {directory}: {', '.join(files)}"
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return f"{line}\n  transformers is not installed: not loaded there (make test installs it)", True
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(config.data.tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([_prompt_ids(config, tokenizer)[0]])
    row = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0)
    theirs = _text(tokenizer, row[0, ids.shape[1] :].tolist())
    verdict = "the same answer as ours" if theirs == expected else f"another answer: {theirs}"
    return f"{line}\n  {type(model).__name__} of transformers loads it and gives {verdict}", theirs == expected


_NEXT = """
What to try next
  .venv/bin/python launch.py generate {exported} --chat --template v1 --prompt "Translate to Italian: Open the file."
  .venv/bin/python launch.py data preview configs/sft/tiny.yaml       # which tokens are learned
  .venv/bin/python launch.py sft configs/sft/tiny.yaml run_name=sft-lora lora.rank=8
"""

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(*sys.argv[1:]))
