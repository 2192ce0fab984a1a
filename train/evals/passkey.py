"""`eval --passkey`: is what was said once in a long text found again, by length of the text and by depth in it?

Mixtral 2401.04088, section 3.2 and figure 4; the task is that of Landmark Attention (2305.16300).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mixtral_jax.data.text import KEYS, Tokenizer, passkey_ids
from mixtral_jax.model import Mixtral
from mixtral_jax.seeds import hashed
from mixtral_jax.train.evals.long_rows import score_long


def passkey_accuracy(
    model: Mixtral,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> dict[str, Any]:
    """{"lengths", "depths", "samples", "seed", "accuracy"}: of each depth, for each length, the share of keys found.

    A key is found where each token of it is the model's first choice behind those before: greedy decoding of the
    prompt gives exactly these tokens then. Each length is that of prompt and key together, in tokens.

    Raises:
        ValueError: a length that has no room for the task, or a depth that is not from 0 to 1.
    """
    rng = np.random.default_rng(hashed(seed) if seed < 0 else seed)  # any integer is a seed
    found: list[np.ndarray] = []
    for length in lengths:
        keys = [(int(key), depth) for depth in depths for key in rng.integers(*KEYS, samples)]
        asked = [passkey_ids(tokenizer, key, length, depth) for key, depth in keys]
        first = [len(prompt) for prompt, _ in asked]
        scores = score_long(model, [prompt + answer for prompt, answer in asked], first=first, advance=advance)
        found.append(np.array([scored.best_T.all() for scored in scores]).reshape(len(depths), samples).mean(axis=1))
    accuracy = np.stack(found, axis=1).tolist()
    grid = {"lengths": list(lengths), "depths": list(depths), "samples": samples, "seed": seed}
    return {**grid, "accuracy": accuracy}


def passkey_table(result: dict[str, Any]) -> Table:
    """The accuracy in percent, light to dark."""
    table = Table(title="Keys found, %")
    table.add_column("depth, tokens", justify="right")
    for length in result["lengths"]:
        table.add_column(f"{length:,}", justify="right")
    for depth, row in zip(result["depths"], result["accuracy"], strict=True):
        table.add_row(f"{depth:.0%}", *(_cell(share) for share in row))
    return table


def _cell(share: float) -> Text:
    """White to dark blue, which print and the colour-blind tell apart."""
    red, green, blue = (round(255 + share * (dark - 255)) for dark in (8, 48, 107))
    ink = "white" if share > 0.5 else "black"
    return Text(f"{100 * share:.0f}", style=f"{ink} on rgb({red},{green},{blue})")
