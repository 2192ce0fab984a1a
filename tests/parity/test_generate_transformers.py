"""Greedy generation against transformers, through files on disk."""

from pathlib import Path

import pytest
import torch
import transformers

from mixtral_jax.convert import load
from mixtral_jax.generation.engine import generate

SHAPE = dict(
    vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    tie_word_embeddings=False, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
PROMPTS = [[1, 17, 30], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1]]
NEW = 12


@pytest.mark.filterwarnings("ignore")  # config.json sets a window, which the released Mixtral does not have
@pytest.mark.parametrize("window", [None, 6])
def test_greedy_ids(window: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, sliding_window=window)).eval()
    theirs.save_pretrained(tmp_path)
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with torch.no_grad():
        made = theirs.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    want = []
    for row in made[:, width:].tolist():
        want.append(row[: row.index(2) + 1] if 2 in row else row)
    got = generate(load(tmp_path), PROMPTS, max_new_tokens=NEW, eos_id=2)
    assert got == want
    assert max(len(set(row)) for row in got) > 3  # not one token for ever
