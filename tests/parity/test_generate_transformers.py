"""Greedy generation against transformers, through files on disk."""

from pathlib import Path

import pytest
import torch
import transformers

from mixtral_jax.convert import hf2orbax, load
from mixtral_jax.generation.engine import generate
from mixtral_jax.train.read_model import read_tokenizer
from mixtral_jax.train.text import Codec
from tests.tiny import write_byte_tokenizer

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


@pytest.mark.filterwarnings("ignore")
def test_what_generation_config_lists_ends_a_text(tmp_path: Path) -> None:
    """Ids end a text in a Hugging Face directory, and in the Orbax one made of it, as transformers ends it there."""
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**SHAPE, "vocab_size": 320})).eval()
    with torch.no_grad():
        free = theirs.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    end = free[0, len(PROMPTS[0]) + 4].item()
    theirs.generation_config.eos_token_id = [319, end]
    theirs.save_pretrained(tmp_path / "hf")
    write_byte_tokenizer(tmp_path / "hf" / "tokenizer.json")
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        made = again.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=NEW, do_sample=False)
    want = made[0, len(PROMPTS[0]) :].tolist()
    assert want[-1] == end and len(want) < NEW
    for place in ("hf", "orbax"):
        model = load(tmp_path / place)
        ends = Codec(model, read_tokenizer(tmp_path / place), None, ["x"]).ends
        assert {319, end} <= set(ends)
        assert generate(model, [PROMPTS[0]], max_new_tokens=NEW, eos_id=ends) == [want]
