"""LoRA adapters on disk: adapter.json (which base, which LoraConfig) and params/ (the adapter leaves, format 1).

A step of a LoRA run, whose state holds adapters only (and the router, if it was trained), reads the same. The tensors
of an adapter are slots of the one table (convert/table.py), so that it streams like a model.
"""

import json
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint import FORMAT
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import PathLike
from mixtral_jax.convert.hf import one_line
from mixtral_jax.convert.orbax import (
    PARAMS,
    OrbaxArrays,
    OrbaxSink,
    is_training_checkpoint,
    newest_step,
    run_config,
    run_notes,
)
from mixtral_jax.convert.pipeline import write
from mixtral_jax.convert.stream import Source
from mixtral_jax.convert.table import ROUTER, slots
from mixtral_jax.lora import LoraConfig

ADAPTER = "adapter.json"
WHOLE = {"embed.weight": "embed_tokens", "head.weight": "lm_head", ROUTER: "gate"}  # leaf -> PEFT's name of it


class AdapterSource(Source):
    """An adapter of any format; its slots are A and B of what it changes, and matrices of WHOLE that it replaces."""

    lora: LoraConfig
    base: str | None  # where the base was, if anybody noted it
    base_noted: dict[str, Any] | None = None  # which weights it was, if a run noted them

    @property
    def longer(self) -> bool:
        """Whether it brings embedding or head, which may have more rows than the base's."""
        return any(slot.leaf.path in WHOLE and slot.leaf.path != ROUTER for slot in self.slots)

    def side_files(self) -> None:
        """None: the tokenizer belongs to the base."""


class NativeAdapter(AdapterSource, OrbaxArrays):
    """An adapter directory of ours, or a step of a LoRA run (a run's directory stands for its newest step).

    A router that the run trained too is one of its slots, layer by layer; so are embedding and head.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: no adapter, incomplete, or not what its configuration says.
    """

    def __init__(self, path: PathLike) -> None:
        root = newest_step(Path(path))
        self.config, self.lora, self.base = _read_note(root)
        super().__init__(root)
        self.base_noted = run_notes(root).get("base") if self.training else None
        self.has_router = ROUTER in self.names
        whole = [slot for slot in slots(self.config) if slot.leaf.path in WHOLE and slot.leaf.path in self.names]
        ask = f"its LoRA settings (rank {self.lora.rank}) ask for {{}}"
        self.hold([*slots(self.config, self.lora), *whole], "its LoRA settings", ask, at_once=4)


def _read_note(root: Path) -> tuple[MixtralConfig, LoraConfig, str | None]:
    """The base, what was adapted, and where the base was: by adapter.json, or by a step of a LoRA run."""
    training = is_training_checkpoint(root)
    where = root / ("meta" if training else ADAPTER)
    note = run_config(root) if training else {}
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if training and not note.get("lora"):
        raise ValueError(f"{root} is a step of a run without LoRA: it holds no adapter")
    if not where.exists():
        raise ValueError(f"{root} is no adapter: neither {ADAPTER} and {PARAMS}/ nor a step of a LoRA run")
    try:
        note = note or json.loads(where.read_text())
        model, lora = MixtralConfig(**note["model"]), LoraConfig(**note["lora"])
        return model, lora, note.get("init_from") if training else note["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} does not say what the adapter is: {one_line(error)}") from None


def check_same_model(config: MixtralConfig, adapter: AdapterSource, where: str) -> None:
    """Raises: ValueError naming what the base of the adapter and the model of shape `config` do not share."""
    different = config.differences(adapter.config)
    if not adapter.longer:
        different.pop("tie_word_embeddings", None)  # it sees no head
    if different:
        told = "; ".join(f"{key} is {b} for the adapter, {a} in {where}" for key, (a, b) in different.items())
        raise ValueError(f"the adapter belongs to another base: {told}")


def write_adapter(source: AdapterSource, dst: PathLike, *, force: bool, progress: bool) -> None:
    """Any adapter as a directory of ours."""
    shapes = {key: value.model_dump(mode="json") for key, value in (("lora", source.lora), ("model", source.config))}
    note = {"format": FORMAT, "base": source.base, **shapes}
    write(source, dst, OrbaxSink, source.dtype, ADAPTER, note, force=force, progress=progress)
