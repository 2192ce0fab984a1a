"""Text that the model writes while it learns."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.data.text.chat import encode_prompt
from mixtral_jax.data.text.template import Template
from mixtral_jax.data.text.tokenizer import Tokenizer
from mixtral_jax.generation.generate import generate
from mixtral_jax.model import Mixtral
from mixtral_jax.train.console import Console
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.optimizer import Params


class SampleConfig(FrozenConfig):
    """Text that the model writes while it learns."""

    every: int | None = Field(None, gt=0, description="steps between samples; null: none")
    prompts: tuple[str, ...] = Field((), description="beginnings to continue; an empty one starts from BOS")
    max_new_tokens: int = Field(64, gt=0, description="length of each sample in tokens")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token")


class Sample:
    """Continues the prompts; writes samples/<step>.jsonl and shows the beginnings."""

    def __init__(
        self, config: SampleConfig, continue_prompts: Callable[[Params], list[str]], directory: Path, console: Console
    ):
        self._config, self._continue, self._directory, self._console = config, continue_prompts, directory, console

    def due(self, step: int, last: bool) -> bool:
        every = self._config.every
        return every is not None and (last or step % every == 0)

    def run(self, moment: Moment) -> None:
        pairs = list(zip(self._config.prompts, self._continue(moment.state.params), strict=True))
        for prompt, text in pairs:
            self._console.say(f"  {prompt}⟶{' '.join(text.split())[:160]}")
        if jax.process_index() == 0:
            self._directory.mkdir(exist_ok=True)
            lines = [json.dumps({"step": moment.step, "prompt": p, "text": t}, ensure_ascii=False) for p, t in pairs]
            (self._directory / f"{moment.step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def continuations(
    config: SampleConfig, tokenizer: Tokenizer, template: Template | None, seed: int, merge: Callable[[Params], Mixtral]
) -> Callable[[Params], list[str]]:
    """A function from parameters to what the model makes of each prompt: of text, or with a template of a message."""
    if template is None:
        prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in config.prompts]
        prompts = [encode_prompt(chat, tokenizer, template) for chat in chats]

    def continue_prompts(params: Params) -> list[str]:
        rows = generate(
            merge(params),
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=seed,
            eos_id=tokenizer.eos_id,
        )
        # the model may have more rows than the tokenizer has pieces, and an untrained one draws from them too
        known = [[t for t in row if t < tokenizer.vocab_size and t != tokenizer.eos_id] for row in rows]
        return [tokenizer.decode(row) for row in known]

    return continue_prompts
