"""LoRA adapters in PEFT's format, in and out: what adapter_config.json says, and its tensors as slots.

PEFT stores A as (r, in) and B as (out, r) beside the hub's names, one pair for each expert. transformers 5 keeps the
experts fused in memory, and an adapter that was trained or saved there has one pair for all experts of a layer: A is
(E, r, in) flattened, B is (out, r, E) flattened. Its gate_up_proj is w1 over w3; they share an A of rank r, or have
their own halves of rank 2 r and a block-diagonal B (what PEFT makes of adapters that came one for each expert).
"""

import math
import os
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.adapter import WHOLE, AdapterSource, NativeAdapter, write_adapter
from mixtral_jax.convert.atomic import check_destination, check_survives
from mixtral_jax.convert.files import Directory, PathLike, is_remote
from mixtral_jax.convert.hf import check_tied, one_line
from mixtral_jax.convert.models import load_config
from mixtral_jax.convert.safetensors import Tensor, TensorSource, read_tensors
from mixtral_jax.convert.table import PEFT, A, B, Place, Slot, slots
from mixtral_jax.lora import GATE, PEFT_NAMES, ROUTER, TARGETS, LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Each changes what is computed, or what is stored, when it is set.
_REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
)  # fmt: skip
_GATE = (".block_sparse_moe.gate", ".mlp.gate")  # the hub's name of the router, and that of transformers 5
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Settings(BaseModel):
    """The keys of adapter_config.json that fix the numbers, of the kinds that PEFT writes."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    r: int
    lora_alpha: float
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    @cached_property
    def lora(self) -> LoraConfig:
        """Of modules that no pattern names."""
        dropout, targets = self.lora_dropout or 0.0, PEFT_NAMES["all-linear"]
        rank, alpha, rslora = self.r, self.lora_alpha, bool(self.use_rslora)
        return LoraConfig(rank=rank, alpha=alpha, rslora=rslora, dropout=dropout, targets=targets)

    @property
    def whole(self) -> tuple[str, ...]:
        """modules_to_save by their own names, without the modules around them."""
        return tuple(name.rpartition(".")[2] for name in self.modules_to_save or ())

    def of(self, module: str) -> LoraConfig:
        """With rank and alpha of one module; a pattern matches the end of its name, as in PEFT."""

        def matching(patterns: dict[str, Any] | None, default: Any) -> Any:
            found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
            return next(found, default)

        rank, alpha = matching(self.rank_pattern, self.r), matching(self.alpha_pattern, self.lora_alpha)
        return self.lora.model_copy(update={"rank": rank, "alpha": alpha})


def read_settings(directory: Directory) -> Settings:
    """The settings of a PEFT directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: no LoRA, a variant of it that is not supported, or values that make no sense.
    """
    kind, where = "PEFT adapter in safetensors", f"{directory}/{CONFIG}"
    config = directory.read_json(CONFIG, kind)
    if WEIGHTS not in directory.names():
        raise ValueError(f"{directory} has no {WEIGHTS}: it is no {kind}")
    _refuse(config, where)
    try:
        read = Settings.model_validate(config)
        ranks, alphas = read.rank_pattern or {}, read.alpha_pattern or {}
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
    except (ValidationError, re.error) as error:
        raise ValueError(f"{where}: r, lora_alpha or their patterns are no numbers ({one_line(error)})") from None
    rank, alpha, dropout = read.r, read.lora_alpha, read.lora_dropout or 0.0
    if min([rank, *ranks.values()]) < 1 or min([alpha, *alphas.values()]) <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"{where}: r {rank}, lora_alpha {alpha:g} and lora_dropout {dropout:g} "
            "must be positive, positive, and in 0 ... 1"
        )
    if other := sorted({*read.whole} - {*WHOLE.values()}):
        known = ", ".join(WHOLE.values())
        raise ValueError(f"{where}: modules_to_save names {', '.join(other)}, which is not supported: {known} are")
    return read


def _refuse(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}, only LORA is converted")
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(f"{where}: {key} is {config[key]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}: the model has no biases, only 'none' is converted")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_ALTERS_BASE):
        raise ValueError(f"{where}: init_lora_weights {start!r} changes the base too: convert it to plain LoRA in PEFT")


class PeftAdapter(AdapterSource, TensorSource):
    """A PEFT directory for a base of shape `config`. All checks are made here.

    A and B of smaller rank than others end in zeros, which never learn; where scales differ, B takes the ratio. What
    is saved whole takes the base's place; embedding and head may have more rows.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: an unsupported variant, tensors missing or unexpected, or shapes of another base or rank.
    """

    def __init__(self, path: PathLike, config: MixtralConfig) -> None:
        directory = Directory(path)
        self._settings = read_settings(directory)
        self.base, lora = self._settings.base_model_name_or_path, self._settings.lora
        tensors = _without_tied_head(read_tensors(directory, [WEIGHTS]), self._settings, config, directory)
        super().__init__(directory, {}, _with_rows(config, tensors, directory), tensors)
        self._halves: dict[str, bool] = {}
        self._own: dict[str, LoraConfig] = {}  # rank and scale of a slot's module, by the slot's name
        places = {slot.name: self._place(slot) for slot in slots(self.config, lora)}
        of = {slot.name: _target(slot) for slot in slots(self.config, lora)}
        found = {of[name] for name, place in places.items() if place.name in self.tensors}
        own = [self._own[name] for name in places if of[name] in found]
        told = f"rank {own[0].rank}" if len({each.rank for each in own}) == 1 else "the ranks"
        self.lora = _for_all(own, lora)
        self._scaled = any(not math.isclose(each.scale, self.lora.scale) for each in own)
        adapted = {s: places[s.name] for s in slots(self.config, self.lora) if _target(s) in found}
        whole = {slot: self._place_whole(slot) for slot in slots(self.config) if slot.leaf.path in WHOLE}
        kept = {slot.leaf.path for slot, place in whole.items() if place.name in self.tensors}
        kept |= {path for path, name in WHOLE.items() if name in self._settings.whole}
        ask = f"but {told} in {CONFIG} and the base ask for {{}}: the adapter is of another rank or for another base"
        whole = {slot: place for slot, place in whole.items() if slot.leaf.path in kept}
        self.put_in_place(adapted | whole, "the base's attention and experts", ask)
        targets = [target for target in (*TARGETS, ROUTER) if target in found]
        targets = [target for target in targets if not self._filled_in(target)] or targets
        self.slots = [slot for slot in self.slots if _target(slot) in targets or slot in whole]
        named = tuple(GATE if target == ROUTER else target for target in targets)
        saved = tuple(name for path, name in WHOLE.items() if path in kept and name != GATE)
        self.lora = self.lora.model_copy(update={"targets": named, "modules_to_save": saved})

    def _filled_in(self, target: str) -> bool:
        """Whether an expert's matrix has A and B of 0, which never learn: what export writes beside the others."""
        own = (slot for slot in self.slots if _target(slot) == target)
        return target.startswith("moe.") and not any(self.read(slot, 0, slot.rows).any() for slot in own)

    def _place_whole(self, slot: Slot) -> Place:
        names = [PEFT + slot.name, PEFT + slot.name.replace(*_GATE)]
        return Place(next((name for name in names if name in self.tensors), names[0]), slot.shape)

    def _place(self, slot: Slot) -> Place:
        """Among the fused experts of its layer, if those are there; else where the hub's name says."""
        stem, w2 = slot.name.removesuffix(A).removesuffix(B), _target(slot) == "moe.w2"
        E, D, F = self.config.num_local_experts, self.config.hidden_size, self.config.intermediate_size
        inputs, outputs = (F, D) if w2 else (D, 2 * F)
        module = f"model.layers.{slot.layer}.mlp.experts"
        may_be_fused = slot.leaf.path.startswith("layers.moe.w") and not self.config.is_dense
        # Which of the two is the inner one depends on the order in which they were wrapped; no shape fits both.
        for fused in (f"{PEFT}{module}.base_layer", f"{PEFT}{module}") if may_be_fused else ():
            a, b = self.tensors.get(fused + A), self.tensors.get(fused + B)
            if a is None or b is None or (a.shape[-1], b.shape[0]) != (inputs, outputs):
                continue
            own = self._settings.of(f"{module}.{'down_proj' if w2 else 'gate_up_proj'}")
            rank, e, half = own.rank, slot.expert, int(_target(slot) == "moe.w3")
            halves = not w2 and b.shape[-1] == rank * E and self._has_halves(b, rank)
            held = rank // 2 if halves else rank
            self._note(slot, own, held)
            first = half * held if halves else 0  # of the ranks that are this half's
            if slot.name.endswith(A):
                return Place(fused + A, (E * rank, inputs), e * rank + first)
            columns = slice(first * E + e, (first + held) * E, E)
            return Place(fused + B, (outputs, rank * E), half * slot.rows, columns)
        name = slot.name.replace(*_GATE) if slot.name.replace(*_GATE) in self.tensors else slot.name
        module = stem.removeprefix(PEFT)  # but of the router PEFT adapts the parameter
        own = self._settings.of(module.replace(*_GATE) + ".weight" if _target(slot) == ROUTER else module)
        self._note(slot, own, own.rank)
        rank_at = 0 if slot.name.endswith(A) else 1
        return Place(name, tuple(own.rank if axis == rank_at else n for axis, n in enumerate(slot.shape)))

    def _note(self, slot: Slot, own: LoraConfig, rank: int) -> None:
        self._own[slot.name] = own.model_copy(update={"rank": rank, "alpha": own.scale * rank, "rslora": False})

    def dtype(self, slot: Slot) -> np.dtype:
        return np.dtype(np.float32) if self._scaled and slot.name.endswith(B) else super().dtype(slot)

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        own = self._own.get(slot.name)
        if own is None:
            return super().read(slot, start, stop)
        if slot.name.endswith(A):
            there = max(0, min(stop, own.rank) - start)
            part = super().read(slot, start, start + there) if there else np.zeros((0, slot.cols), self.dtype(slot))
            return np.pad(part, ((0, stop - start - there), (0, 0)))
        part = np.pad(super().read(slot, start, stop), ((0, 0), (0, slot.cols - own.rank)))
        return part.astype(np.float32) * np.float32(own.scale / self.lora.scale) if self._scaled else part

    def _has_halves(self, fused_b: Tensor, rank: int) -> bool:
        """Whether w1 and w3 of a layer have ranks of their own in one B: neither uses the other's."""
        known = self._halves.get(fused_b.name)
        if known is None:
            F, ranks = fused_b.shape[0] // 2, rank * self.config.num_local_experts // 2
            apart = (fused_b.rows(0, F)[:, ranks:], fused_b.rows(F, 2 * F)[:, :ranks])
            known = self._halves[fused_b.name] = rank % 2 == 0 and not any(block.any() for block in apart)
        return known


def _for_all(own: list[LoraConfig], lora: LoraConfig) -> LoraConfig:
    """One rank and scale for modules that each have their own: the largest, and the first one's."""
    if all(each.rank == lora.rank and math.isclose(each.scale, lora.scale) for each in own):
        return lora
    rank = max(each.rank for each in own)
    return lora.model_copy(update={"rank": rank, "alpha": own[0].scale * rank, "rslora": False})


def _without_tied_head(
    tensors: Mapping[str, Tensor], settings: Settings, config: MixtralConfig, where: Directory
) -> dict[str, Tensor]:
    """Without the head that PEFT saves a second time beside the embedding of a base that ties the two."""
    kept = dict(tensors)
    if config.tie_word_embeddings and (embedding := kept.get(f"{PEFT}model.embed_tokens.weight")):
        if "embed_tokens" in settings.whole and not settings.ensure_weight_tying:
            raise ValueError(
                f"{where}/{CONFIG}: modules_to_save names embed_tokens without ensure_weight_tying, so the head stays "
                "the base's in PEFT, while here it is the embedding: untie the base, or train it with that set"
            )
        if head := kept.pop(f"{PEFT}lm_head.weight", None):
            check_tied(head, embedding, f"the base of {where}")
    return kept


def _with_rows(config: MixtralConfig, tensors: Mapping[str, Tensor], where: Directory) -> MixtralConfig:
    """With as many tokens as an embedding or head that was saved whole has."""
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not config.tie_word_embeddings)
    rows = [t.shape[0] if (t := tensors.get(PEFT + name)) else config.vocab_size for name in names]
    if len({*rows}) > 1:
        raise ValueError(f"{where}: embedding and head would have {rows[0]} and {rows[1]} rows: save both whole")
    return config.model_copy(update={"vocab_size": rows[0]})


def _target(slot: Slot) -> str:
    """Which of lora.TARGETS a slot of an adapter belongs to."""
    return slot.leaf.path.removeprefix("layers.").rpartition("_lora.")[0]


def open_adapter(path: PathLike, config: MixtralConfig) -> AdapterSource:
    """An adapter of any format for a base of shape `config`; raises as NativeAdapter and PeftAdapter."""
    is_peft = is_remote(path) or CONFIG in Directory(path).names()
    return PeftAdapter(path, config) if is_peft else NativeAdapter(path)


def peft2lora(
    src: PathLike, dst: PathLike, *, base: PathLike | None = None, force: bool = False, progress: bool = True
) -> None:
    """A PEFT directory to an adapter directory of ours; no value is changed.

    Args:
        src: with keys for each expert, or with the fused ones of transformers 5.
        base: the model that it belongs to, of any format (its shape is read); None: where adapter_config.json says.

    Raises:
        ValueError: the adapter is not whole, not supported, or of another base; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force=force, local=True)
    where = read_settings(Directory(src)).base_model_name_or_path if base is None else os.fspath(base)
    if where is None or not Directory(where).exists():
        raise ValueError(
            f"{src}/{CONFIG} names the base {where!r}, which is no directory here: say --base and its directory"
        )
    check_survives(dst, where)
    adapter = PeftAdapter(src, load_config(where))
    adapter.base = where
    write_adapter(adapter, dst, force=force, progress=progress)
