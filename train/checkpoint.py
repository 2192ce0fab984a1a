"""Which step is saved when, and which one is resumed from."""

from pydantic import Field

from mixtral_jax.config import FrozenConfig


class CheckpointConfig(FrozenConfig):
    """When the run is saved and what is kept; the last step is always saved."""

    every: int | None = Field(200, gt=0, description="steps between checkpoints; null: only the last step")
    keep_last: int = Field(2, gt=0, description="how many of the newest checkpoints are kept")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints at multiples of this many steps are kept for ever"
    )
    directory: str | None = Field(
        None, description="where checkpoints go, gs:// too; null: <output_dir>/<run_name>/checkpoints"
    )
    asynchronous: bool = Field(True, description="write in the background while training goes on")
