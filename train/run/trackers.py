"""Opens metrics.jsonl, moe.jsonl and the trackers of a run."""

from collections.abc import Callable

import jax

from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.hooks.sinks import JsonLines, Sink, TensorBoard, Wandb, Writer, warn_tracker
from mixtral_jax.train.run.directory import RunDirectory


class Writers:
    """metrics.jsonl, moe.jsonl and the trackers that were asked for, on process 0; the others write nothing."""

    def __init__(self, config: RunConfig, place: RunDirectory, start: int):
        first = jax.process_index() == 0
        jsonl = JsonLines(place.metrics, start) if first else None
        self.metrics = Writer(jsonl, _open_trackers(config, place, start) if first else [])
        self.moe = JsonLines(place.moe, start) if first and not config.model.is_dense else None

    def close(self) -> None:
        self.metrics.close()
        if self.moe is not None:
            self.moe.close()


def _open_trackers(config: RunConfig, place: RunDirectory, start: int) -> list[Sink]:
    makers: list[tuple[str, Callable[[], Sink]]] = []
    if config.log.tensorboard:
        makers.append(("TensorBoard", lambda: TensorBoard(place.tensorboard, start)))
    if config.log.wandb is not None:
        settings = config.log.wandb.model_dump()
        dump = config.model_dump(mode="json")
        makers.append(("Wandb", lambda: Wandb(place.path, settings, config.run_name, dump)))
    trackers = []
    for name, make in makers:
        try:
            trackers.append(make())
        except Exception as error:
            warn_tracker(name, error)
    return trackers
