"""The same training step in transformers: `python -m tests.bench.theirs SHAPE [OPTIONS]`, a step for a line of input.

`experts` is one of transformers' implementations: eager, batched_mm or grouped_mm. dtype bfloat16 is also that of
weights and moments, which is what a user gets by typing it; with `autocast` both are fp32 and products bf16.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Options, Shape, parse
from tests.bench.worker import PLATFORM, serve

DEVICE = "cuda" if torch.cuda.is_available() and PLATFORM != "cpu" else "cpu"


def model_of(shape: Shape, **options: Any) -> MixtralForCausalLM:
    """The model of a shape, on the device that is measured."""
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            num_local_experts=shape.experts, num_experts_per_tok=shape.top_k, output_router_logits=True,
            router_aux_loss_coef=BALANCE_COEFFICIENT, use_cache=False, **options,
        )
    )  # fmt: skip
    return model.to(DEVICE)


def prepare(shape: Shape, options: Options) -> Callable[[int], float]:
    """Forward, backward, clipping and AdamW, as a function of the step's number that gives the loss."""
    torch.manual_seed(0)
    attention = "sdpa" if options.attention == "auto" else options.attention
    model = model_of(shape, attn_implementation=attention, experts_implementation=options.experts)
    model = model.to(getattr(torch, options.dtype)).train()
    how = dict(lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **how)  # as transformers' Trainer does
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=options.autocast)

    def step(index: int) -> float:
        numbers = np.random.default_rng(index).integers(0, shape.vocab, (shape.batch, shape.seq_len))
        tokens = torch.tensor(numbers, device=DEVICE)
        with autocast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def device_facts() -> dict[str, float]:
    """Of a GPU: the most that was in use on it, in place of the host's memory."""
    return {} if DEVICE == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    serve(prepare(parse(sys.argv[1]), Options.of(sys.argv[2:])), device_facts)
