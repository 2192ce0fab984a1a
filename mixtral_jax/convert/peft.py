"""LoRA adapters between our format and PEFT's: `convert peft2lora` and `convert lora2peft`."""

import json
import math
import os
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.adapter import AdapterSource, NativeAdapter, target_of, write_adapter
from mixtral_jax.convert.atomic import check_destination, new_directory
from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.hf import read_config, read_shape
from mixtral_jax.convert.hf_write import Entry
from mixtral_jax.convert.peft_read import PREFIX, A, B, PeftAdapter, read_base
from mixtral_jax.convert.peft_settings import CONFIG, WEIGHTS
from mixtral_jax.convert.pipeline import check_orbax_destination, open_source
from mixtral_jax.convert.progress import progress_bar
from mixtral_jax.convert.safetensors_io import layout
from mixtral_jax.convert.table import Slot, slots

Path_ = str | os.PathLike[str]


def peft2lora(src: Path_, dst: Path_, *, base: Path_ | None = None, force: bool = False, progress: bool = True) -> None:
    """A PEFT directory to an adapter directory of ours; no value is changed.

    Args:
        src: with keys for each expert, or with the fused ones of transformers 5.
        base: the model that it belongs to, of any format (its shape is read); None: where adapter_config.json says.

    Raises:
        ValueError: the adapter is not whole, not supported, or of another base; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_orbax_destination(dst)
    check_destination(dst, src, force)
    where = read_base(src) if base is None else os.fspath(base)
    if where is None or not Directory(where).exists():
        raise ValueError(
            f"{src}/{CONFIG} names the base {where!r}, which is no directory here: say --base and its directory"
        )
    adapter = PeftAdapter(src, _shape(where))
    adapter.base = where
    write_adapter(adapter, dst, force=force, progress=progress)


def lora2peft(src: Path_, dst: Path_, *, force: bool = False, progress: bool = True) -> None:
    """An adapter of ours, or a step of a LoRA run, to a directory that peft.PeftModel.from_pretrained loads.

    Raises:
        ValueError: the adapter is not whole, or the run trained the router too; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force)
    adapter = NativeAdapter(src)
    if adapter.has_router:
        raise ValueError(f"{src} holds a trained router too, which is no adapter: use merge-lora, then orbax2hf")
    write_peft(adapter, dst, force=force, progress=progress)


def write_peft(adapter: AdapterSource, dst: Path_, *, force: bool, progress: bool) -> None:
    """Any adapter as a PEFT directory, one matrix at a time, local or remote."""
    exported, rank = _exported(adapter), adapter.lora.rank
    own = {slot.name for slot in adapter.slots}
    like = next(reversed(adapter.slots))  # of the dtype of what is filled in: an expert's, if there is one
    entries: list[Entry] = []
    for slot in exported:
        stem = PREFIX + slot.name.removesuffix(".weight")
        a_dtype, b_dtype = adapter.dtypes(slot if slot.name in own else like)
        entries += [(stem + A, a_dtype, (rank, slot.cols)), (stem + B, b_dtype, (slot.rows, rank))]
    header, tensors = layout(WEIGHTS, entries)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(dst, needed_bytes=total, force=force) as work:
        with progress_bar(f"writing {dst}", total, show=progress) as advance, work.create(WEIGHTS) as file:
            file.write(header)
            for index, slot in enumerate(exported):
                factors = adapter.factors(slot) if slot.name in own else (None, None)
                pairs = zip(entries[2 * index : 2 * index + 2], factors, strict=True)
                for (_, dtype, shape), matrix in pairs:
                    data = np.zeros(shape, dtype) if matrix is None else np.ascontiguousarray(matrix.T)
                    file.write(data.view(np.uint8).data)
                    advance(data.nbytes)
        work.write_bytes(CONFIG, (json.dumps(peft_config(adapter), indent=2) + "\n").encode())


def peft_config(adapter: AdapterSource) -> dict[str, Any]:
    """adapter_config.json. rsLoRA becomes plain LoRA of alpha * sqrt(r): the same scale, and PEFT then doubles rank and
    alpha of w1 and w3 as it fuses them, which keeps alpha / r but not alpha / sqrt(r)."""
    lora = adapter.lora
    alpha = lora.alpha * math.sqrt(lora.rank) if lora.rslora else lora.alpha
    experts = any(slot.leaf.path.startswith("layers.moe.") for slot in adapter.slots)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        # PEFT has no dropout on fused experts and refuses an adapter that asks for it.
        "lora_dropout": 0.0 if experts and not adapter.config.is_dense else lora.dropout,
        "target_modules": sorted({slot.name.split(".")[-2] for slot in _exported(adapter)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _exported(adapter: AdapterSource) -> list[Slot]:
    """The slots of the adapter, and those of experts that PEFT wants beside them, which are written as 0.

    PEFT takes w1 and w3 only together, and places them, without an error, where nothing reads them if w2 is not there.
    """
    targets = {target_of(slot) for slot in adapter.slots}
    if not adapter.config.is_dense and targets & {"moe.w1", "moe.w3"}:
        targets |= {"moe.w1", "moe.w3", "moe.w2"}
    return [slot for slot in slots(adapter.config) if target_of(slot) is not None and target_of(slot) in targets]


def _shape(base: Path_) -> MixtralConfig:
    """The shape of a model, for which config.json is enough."""
    directory = Directory(base)
    if "config.json" in directory.names():
        return read_shape(read_config(directory), directory)
    return open_source(base).config
