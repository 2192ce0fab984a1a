"""Greedy generation: `python -m tests.bench.generation SHAPE TOKENS BATCH ours|theirs [OPTIONS]`.

A call for each line of input: a prompt of 32 random tokens a row; the first ones, which compile, are not timed.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.bench.shapes import Options, Shape, parse
from tests.bench.worker import serve

PROMPT = 32


def ours(shape: Shape, prompts: np.ndarray, new: int, options: Options) -> Callable[[], Any]:
    """A call of mixtral_jax.generate with random weights."""
    import jax

    from mixtral_jax.generation import generate
    from mixtral_jax.model import Mixtral
    from tests.bench.ours import compute_of, model_of

    model = Mixtral(model_of(shape), compute_of(options), key=jax.random.key(0))
    return lambda: generate(model, prompts, max_new_tokens=new)


def theirs(shape: Shape, prompts: np.ndarray, new: int, options: Options) -> Callable[[], Any]:
    """A call of transformers' generate with random weights."""
    import torch

    from tests.bench.theirs import DEVICE, model_of

    model, tokens = model_of(shape).to(getattr(torch, options.dtype)).eval(), torch.tensor(prompts, device=DEVICE)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
    return lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **how).cpu()


def prepare(shape: Shape, new: int, batch: int, who: str, options: Options) -> Callable[[int], Any]:
    """A call of either, which ends when the tokens are there."""
    prompts = np.random.default_rng(0).integers(3, shape.vocab, (batch, PROMPT)).astype(np.int32)
    call = {"ours": ours, "theirs": theirs}[who](shape, prompts, new, options)
    return lambda _: np.asarray(call())


if __name__ == "__main__":
    serve(prepare(parse(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Options.of(sys.argv[5:])))
