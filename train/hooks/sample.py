"""Text that the model writes while it learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.train.console import Console
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.optimizer import Params
from mixtral_jax.train.phases import Phase, Phases


class SampleConfig(FrozenConfig):
    """Text that the model writes while it learns."""

    every: int | None = Field(None, gt=0, description="steps between samples; null: none")
    prompts: tuple[str, ...] = Field((), description="beginnings to continue; an empty one starts from BOS")
    max_new_tokens: int = Field(64, gt=0, description="length of each sample in tokens")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token")


class Sample:
    """Continues the prompts; writes samples/<step>.jsonl and shows the beginnings."""

    def __init__(
        self, config: SampleConfig, generate: Callable[[Params, list[Any]], list[str]], chat: bool, directory: Path,
        console: Console, phases: Phases | None = None,
    ):  # fmt: skip
        """`generate` makes texts of parameters and prompts; with `chat` each prompt is a user's message."""
        self._config, self._generate, self._directory, self._console = config, generate, directory, console
        self._phases = phases or Phases()
        self._asked = [[{"role": "user", "content": p}] if chat else p for p in config.prompts]

    def due(self, step: int, last: bool) -> bool:
        every = self._config.every
        return every is not None and (last or step % every == 0)

    def run(self, moment: Moment) -> None:
        try:
            with self._phases.during(Phase.SAMPLING):
                texts = self._generate(moment.state.params, self._asked)
        except FloatingPointError as error:  # on all processes alike; whether training goes on, its step says
            return self._console.say(f"  no samples: {error}")
        pairs = list(zip(self._config.prompts, texts, strict=True))
        for prompt, text in pairs:
            self._console.say(f"  {prompt}⟶{' '.join(text.split())[:160]}")
        if jax.process_index() == 0:
            self._directory.mkdir(exist_ok=True)
            lines = [json.dumps({"step": moment.step, "prompt": p, "text": t}, ensure_ascii=False) for p, t in pairs]
            (self._directory / f"{moment.step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
