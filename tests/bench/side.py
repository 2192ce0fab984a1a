"""Fine-tuning beside TRL, and generation beside transformers."""

from tests.bench.rounds import beside, faster
from tests.bench.shapes import SHAPES

PROMPTS = {"two thirds of each row is prompt, as in the bundled chats": "0.667", "a quarter is": "0.25"}


def tuning(steps: int) -> str:
    """SFT, LoRA and DPO at shape S."""
    head = (
        "Shape S, 8 rows of 256 tokens a step (4 pairs for DPO, whose reference's forward pass counts), TRL's other "
        "settings its own (in bf16 as its default is: autocast beside fp32 weights), of which one recomputes each "
        "layer in the backward pass; the row `no checkpointing` is without it, and keeps freed memory as we do. The "
        "LoRA step stands beside our SFT step. Every row is full, so that TRL's packing saves nothing here: it makes "
        "one row of 2,048 tokens of them, and attends under a mask.\n"
    )
    tables = [_tuning(f"fp32, {title}", share, steps, "float32") for title, share in PROMPTS.items()]
    title, share = next(iter(PROMPTS.items()))
    return "\n".join([head, *tables, _tuning(f"bf16, {title}", share, steps, "bfloat16")])


def _tuning(title: str, share: str, steps: int, dtype: str) -> str:
    def command(module: str, kind: str, *options: str) -> list[str]:
        return [f"tests.bench.tuning_{module}", "S", kind, share, f"dtype={dtype}", *options]

    results, batch = {}, SHAPES["S"].batch
    packed = {"TRL, sft, packing": command("theirs", "sft", "packing=true")}
    for kind, others in (("sft", {**packed, "mixtral-jax, lora": command("ours", "lora")}), ("dpo", {})):
        fast = ["tests.bench.kept", *command("theirs", kind, "checkpointing=false")]
        others = {f"TRL, {kind}": command("theirs", kind), f"TRL, {kind}, no checkpointing": fast, **others}
        results |= beside(f"mixtral-jax, {kind}", command("ours", kind), others, steps)
    rows = [
        f"| {title} | seconds a step | rows/s | ours is faster by | peak memory, GB |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, run in results.items():
        seconds, memory = run["seconds"], run["peak_bytes"] / 1e9
        rows.append(f"| {name} | {seconds:.2f} | {batch / seconds:.2f} | {faster(run)} | {memory:.2f} |")
    return "\n".join([*rows, ""])


def generation(new: int, calls: int) -> str:
    """Cached greedy decoding at shape S, batch 1 and 8, in fp32 and in bf16."""
    rows = [
        f"Shape S, greedy, {new} new tokens behind prompts of 32, random weights, the call compiled or warm.\n",
        "| | tokens/s | ours is faster by | peak memory, GB |",
        "|---|--:|--:|--:|",
    ]

    def command(batch: int, who: str, dtype: str) -> list[str]:
        return ["tests.bench.generation", "S", str(new), str(batch), who, f"dtype={dtype}"]

    for batch in (1, 8):
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            precisions = {name: dtype, "fp32": "float32"}  # bf16 beside both
            others = {f"transformers, {n}, batch {batch}": command(batch, "theirs", d) for n, d in precisions.items()}
            results = beside(f"mixtral-jax, {name}, batch {batch}", command(batch, "ours", dtype), others, calls)
            for label, run in results.items():
                speed, memory = batch * new / run["seconds"], run["peak_bytes"] / 1e9
                rows.append(f"| {label} | {speed:,.0f} | {faster(run)} | {memory:.2f} |")
    return "\n".join(rows)
