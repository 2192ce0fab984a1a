"""LoRA adapters of ours to PEFT's format, with a base that transformers can open."""

import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.convert.adapter import WHOLE, AdapterSource, NativeAdapter, check_same_model
from mixtral_jax.convert.atomic import check_destination, check_survives
from mixtral_jax.convert.edits import ResizedSource
from mixtral_jax.convert.files import Directory, PathLike, is_remote
from mixtral_jax.convert.hf import HfSource
from mixtral_jax.convert.identity import check_identity
from mixtral_jax.convert.peft import CONFIG, WEIGHTS
from mixtral_jax.convert.pipeline import open_base, write, write_hf
from mixtral_jax.convert.safetensors import TensorSink
from mixtral_jax.convert.stream import ChangedSource, Source
from mixtral_jax.convert.table import PEFT, Slot, slots

BASE = "base"  # inside an export: a copy of the base, where that is in no format of transformers


def lora2peft(
    src: PathLike, dst: PathLike, *, base: PathLike | None = None, force: bool = False, progress: bool = True
) -> None:
    """An adapter of ours, or a step of a LoRA run, to a directory that PEFT loads, alone or beside a base.

    Args:
        base: the model to name in it, of any format; None: that which the adapter was trained on. A Hugging Face
            directory is named as it is, any other is written beside the adapter in that format.

    Raises:
        ValueError: the adapter is not whole, the run trained the router too, or the base is not the adapter's; nothing
            is left at `dst`, and a base that lies there is not replaced.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force=force)
    adapter = NativeAdapter(src)
    if adapter.has_router:
        raise ValueError(f"{src} holds a trained router too, which is no adapter: use merge-lora, then orbax2hf")
    named, copied = _base(adapter, None if base is None else os.fspath(base), dst)
    if named is None and progress:
        print(f"{dst}: its base {adapter.base} is not here: name one with --base", file=sys.stderr)
    exported = ExportedAdapter(adapter)
    config = peft_config(adapter, exported.slots, named or adapter.base)
    sink = partial(TensorSink, single=WEIGHTS)

    def beside(work: Directory) -> None:
        if copied is not None:
            write_hf(copied, work.path(BASE), force=False, progress=progress)

    write(exported, dst, sink, exported.dtype, CONFIG, config, force=force, progress=progress, beside=beside)


def _base(adapter: NativeAdapter, base: str | None, dst: PathLike) -> tuple[str | None, Source | None]:
    """Where transformers will find the base, None if nowhere; and what has to be written there for that."""
    noted = (adapter.base_noted or {}).get("path")
    where = base or next((path for path in (noted, adapter.base) if path and Path(path).exists()), None)
    if where is None or is_remote(where) or is_remote(dst):
        return where, None
    check_survives(dst, where)
    model = open_base(where, adapter.base_noted)
    check_same_model(model.config, adapter, where)
    check_identity(adapter.base_noted, model, where)
    same = not adapter.longer or model.config.vocab_size == adapter.config.vocab_size
    if isinstance(model, HfSource) and same:
        return os.path.abspath(where), None
    return os.path.join(os.path.abspath(dst), BASE), model if same else ResizedSource(model, adapter.config.vocab_size)


class ExportedAdapter(ChangedSource):
    """An adapter under PEFT's names, with zeros for those matrices of experts that PEFT wants beside its own.

    PEFT takes w1 and w3 only together, and places them, without an error, where nothing reads them if w2 is not there.
    """

    def __init__(self, adapter: AdapterSource) -> None:
        config, lora = adapter.config, adapter.lora
        if not config.is_dense and (lora.adapts("moe.w1") or lora.adapts("moe.w3")):
            lora = lora.model_copy(update={"targets": (*lora.targets, "moe.w1", "moe.w3", "moe.w2")})
        held = {slot.leaf.path for slot in adapter.slots} & WHOLE.keys()
        whole = [replace(slot, name=PEFT + slot.name) for slot in slots(config) if slot.leaf.path in held]
        embedding = [slot for slot in whole if slot.leaf.path == "embed.weight" and config.tie_word_embeddings]
        whole += [replace(slot, name=f"{PEFT}lm_head.weight") for slot in embedding]  # PEFT looks for both
        super().__init__(adapter, config, slots(config, lora) + whole)
        self._last = {slot.leaf.path[-1]: slot for slot in adapter.slots}

    def origin(self, slot: Slot) -> Slot:
        """What is filled in is like the last A or B: that of an expert."""
        return self.there.get(slot.meaning, self._last[slot.leaf.path[-1]])

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        if slot.meaning in self.there:
            return super().read(slot, start, stop)
        return np.zeros((stop - start, slot.cols), self.dtype(slot))


def peft_config(adapter: AdapterSource, exported: list[Slot], base: str | None) -> dict[str, Any]:
    """adapter_config.json. rsLoRA becomes plain LoRA of alpha * sqrt(r): the same scale, and PEFT then doubles rank and
    alpha of w1 and w3 as it fuses them, which keeps alpha / r but not alpha / sqrt(r)."""
    lora, whole = adapter.lora, sorted({WHOLE[slot.leaf.path] for slot in exported if slot.leaf.path in WHOLE})
    alpha = lora.alpha * math.sqrt(lora.rank) if lora.rslora else lora.alpha
    experts = any(slot.leaf.path.startswith("layers.moe.") for slot in adapter.slots)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        # PEFT has no dropout on fused experts and refuses an adapter that asks for it.
        "lora_dropout": 0.0 if experts and not adapter.config.is_dense else lora.dropout,
        "target_modules": sorted({s.name.split(".")[-3] for s in exported if s.leaf.path not in WHOLE}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": whole or None,
        # Without it, PEFT leaves the head what the base's embedding is.
        "ensure_weight_tying": adapter.config.tie_word_embeddings and "embed_tokens" in whole,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
