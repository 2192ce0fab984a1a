"""The same training step in transformers: `python -m tests.bench.theirs SHAPE EXPERTS`, a step for each line of input.

EXPERTS is one of transformers' implementations of the experts: eager, batched_mm or grouped_mm.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Shape, parse
from tests.bench.worker import serve


def model_of(shape: Shape, **options: Any) -> MixtralForCausalLM:
    """The model of a shape."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            num_local_experts=shape.experts, num_experts_per_tok=shape.top_k, output_router_logits=True,
            router_aux_loss_coef=BALANCE_COEFFICIENT, use_cache=False, **options,
        )
    )  # fmt: skip


def prepare(shape: Shape, experts: str) -> Callable[[int], float]:
    """Forward, backward, clipping and AdamW in fp32, as a function of the step's number that gives the loss."""
    torch.manual_seed(0)
    model = model_of(shape, attn_implementation="sdpa", experts_implementation=experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step(index: int) -> float:
        numbers = np.random.default_rng(index).integers(0, shape.vocab, (shape.batch, shape.seq_len))
        tokens = torch.tensor(numbers)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


if __name__ == "__main__":
    serve(prepare(parse(sys.argv[1]), sys.argv[2]))
