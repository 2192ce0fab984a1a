"""The same training step in transformers: `python -m tests.bench.theirs SHAPE STEPS EXPERTS` prints JSON.

EXPERTS is one of transformers' implementations of the experts: eager, batched_mm or grouped_mm.
"""

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.bench.shapes import BALANCE_COEFFICIENT, LEARNING_RATE, Shape, parse


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


def measure(shape: Shape, steps: int, experts: str) -> dict[str, float]:
    """Seconds per step (median) and peak memory: forward, backward, clipping and AdamW in fp32."""
    torch.manual_seed(0)
    model = model_of(shape, attn_implementation="sdpa", experts_implementation=experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rng, times = np.random.default_rng(0), []
    for _ in range(steps + 2):
        tokens = torch.tensor(rng.integers(0, shape.vocab, (shape.batch, shape.seq_len)))
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        times.append(time.perf_counter() - began)
    return {
        "seconds": float(np.median(times[2:])), "loss": value,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(parse(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
