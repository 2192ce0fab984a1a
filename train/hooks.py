"""What happens between steps: log, eval, checkpoint, sample, profile, watchdog; each with an interval."""

from pydantic import Field

from mixtral_jax.config import FrozenConfig


class EvalConfig(FrozenConfig):
    """Loss, perplexity and bits per byte of each validation source; also measured after the last step."""

    every: int | None = Field(100, gt=0, description="steps between evaluations; null: only after the last")
    batches: int | None = Field(None, gt=0, description="batches per source; null: its whole text")
    batch_size: int | None = Field(None, gt=0, description="sequences per batch; null: micro_batch_size")


class SampleConfig(FrozenConfig):
    """Text that the model writes while it learns."""

    every: int | None = Field(None, gt=0, description="steps between samples; null: none")
    prompts: tuple[str, ...] = Field((), description="beginnings to continue; an empty one starts from BOS")
    max_new_tokens: int = Field(64, gt=0, description="length of each sample in tokens")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token")


class WandbConfig(FrozenConfig):
    """Weights & Biases. A tracker that fails never stops the training."""

    project: str = Field("mixtral-jax", description="project name")
    entity: str | None = Field(None, description="user or team; null: your default one")
    mode: str = Field("offline", pattern="^(offline|online)$", description="online needs the network")


class ProfileConfig(FrozenConfig):
    """A jax.profiler trace, written to <run>/profile."""

    start: int = Field(10, gt=0, description="step at which the trace begins")
    steps: int = Field(3, gt=0, description="how many steps it covers")


class LogConfig(FrozenConfig):
    """What is said, where and how often; metrics.jsonl is always written."""

    every: int = Field(10, gt=0, description="steps between log lines")
    progress: bool = Field(True, description="a progress bar where stdout is a terminal")
    tensorboard: bool = Field(False, description="events in <run>/tensorboard")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; null: off")
    profile: ProfileConfig | None = Field(None, description="a profiler trace; null: none")
    watchdog_seconds: float | None = Field(
        None, gt=0, description="exit 124 where one step takes longer than this; null: never"
    )
