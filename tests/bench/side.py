"""Fine-tuning beside TRL, and generation beside transformers."""

import statistics

from tests.bench.measure import in_turn
from tests.bench.shapes import SHAPES

PROMPTS = {"two thirds of each row is prompt, as in the bundled chats": "0.667", "a quarter is": "0.25"}


def tuning(rounds: int, steps: int) -> str:
    """SFT, LoRA and DPO at shape S."""
    head = (
        "Shape S, 8 rows of 256 tokens a step (4 pairs for DPO, whose reference's forward pass counts), fp32, TRL's "
        "other settings its own.\n"
    )
    return "\n".join([head, *(_tuning(title, share, rounds, steps) for title, share in PROMPTS.items())])


def _tuning(title: str, share: str, rounds: int, steps: int) -> str:
    commands = {
        f"{who}, {kind}": [f"tests.bench.tuning_{module}", "S", str(steps), kind, share]
        for who, module, kinds in (("mixtral-jax", "ours", ("sft", "lora", "dpo")), ("TRL", "theirs", ("sft", "dpo")))
        for kind in kinds
    }
    results, batch = in_turn(commands, rounds), SHAPES["S"].batch
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results.items()}
    rows = [
        f"| {title} | seconds a step | rows/s | against TRL | peak memory, GB |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, runs in results.items():
        kind = name.split(", ")[1]
        rival = seconds["TRL, dpo" if kind == "dpo" else "TRL, sft"]
        memory = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        speed, ratio = batch / seconds[name], rival / seconds[name]
        rows.append(f"| {name} | {seconds[name]:.2f} | {speed:.2f} | {ratio:.2f}x | {memory:.2f} |")
    return "\n".join([*rows, ""])


def generation(rounds: int, new: int) -> str:
    """Cached greedy decoding at shape S, batch 1 and 8."""
    rows = [
        f"Shape S, fp32, greedy, {new} new tokens behind prompts of 32, random weights, the call compiled or warm.\n",
        "| | tokens/s | against transformers |",
        "|---|--:|--:|",
    ]
    for batch in (1, 8):
        commands = {who: ["tests.bench.generation", "S", str(new), str(batch), who] for who in ("ours", "theirs")}
        speeds = {
            who: statistics.median(run["tokens_per_second"] for run in runs)
            for who, runs in in_turn(commands, rounds).items()
        }
        for who, name in (("ours", "mixtral-jax"), ("theirs", "transformers")):
            rows.append(f"| {name}, batch {batch} | {speeds[who]:,.0f} | {speeds[who] / speeds['theirs']:.2f}x |")
    return "\n".join(rows)
