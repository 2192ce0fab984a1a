"""Are two checkpoints the same model? Tensors bit for bit, then what they compute on the same prompts."""

import contextlib
import importlib.util
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ComputeConfig
from mixtral_jax.convert.files import Directory, PathLike, is_remote
from mixtral_jax.convert.hf import HfSource
from mixtral_jax.convert.models import load
from mixtral_jax.convert.pipeline import exported_files, open_source, write_hf
from mixtral_jax.convert.stream import ChangedSource, ReadRows, Source, copy
from mixtral_jax.convert.table import Slot
from mixtral_jax.parallel import host_memory

# fp32 on both sides, another order of summation: what may differ, relative to the logits' spread (their standard
# deviation over the vocabulary, the mean of all positions). Small models have small logits.
TRANSFORMERS_TOLERANCE = 1e-3
TEXTS = ("The router", "two  spaces", "x\n\ny\tz", "naïve 漢字 🙂", "12345", "a</s>b<s>c", "<|im_end|> [INST]")
_SHOWN = 8
_ROWS, _LENGTH = 4, 64  # of the prompts that nobody gave


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both; `max_abs` is None where they cannot be subtracted."""

    name: str
    max_abs: float | None
    reason: str


@dataclass(frozen=True)
class LogitDifference:
    """Two ways to the logits of the same prompts."""

    a: str
    b: str
    max_abs: float
    kl: float
    top1_agreement: float
    router_agreement: float | None
    spread: float
    allowed: float  # largest max_abs that counts as the same
    same: bool


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    a: str
    b: str
    tensors: int
    different_tensors: list[TensorDifference]
    config: dict[str, tuple[Any, Any]]
    logits: list[LogitDifference]
    tokenizers: list[str]
    notes: list[str]

    @property
    def identical(self) -> bool:
        """Same configuration and tokenizer, every tensor bit-equal, every pair of logits equal within its tolerance."""
        same = not self.different_tensors and not self.config and all(pair.same for pair in self.logits)
        return same and not self.tokenizers

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self) | {"identical": self.identical}

    def lines(self) -> list[str]:
        """The report for people, the worst offenders first."""
        out = [f"A  {self.a}", f"B  {self.b}"]
        out += [f"config {key}: {a!r} in A, {b!r} in B" for key, (a, b) in self.config.items()]
        equal = self.tensors - len(self.different_tensors)
        out.append(f"tensors: {equal} of {self.tensors} bit-equal")
        for d in self.different_tensors[:_SHOWN]:
            size = "" if d.max_abs is None else f", max abs difference {d.max_abs:.3g}"
            out.append(f"  {d.name}: {d.reason}{size}")
        if len(self.different_tensors) > _SHOWN:
            out.append(f"  ... and {len(self.different_tensors) - _SHOWN} more")
        for p in self.logits:
            router = "" if p.router_agreement is None else f", router {p.router_agreement:.2%}"
            figures = f"max abs {p.max_abs:.3g}, KL {p.kl:.3g}, top-1 {p.top1_agreement:.2%}{router}"
            out.append(
                f"logits, {p.a} against {p.b}: {figures}; at most {p.allowed:.3g} for a spread of {p.spread:.3g}"
            )
        return [*out, *self.tokenizers, *self.notes, "identical" if self.identical else "DIFFERENT"]


def verify(a: PathLike, b: PathLike, *, prompts: PathLike | list[list[int]] | None = None) -> Report:
    """Compare two checkpoints of any kind: tensors, then logits by our model, and by transformers if it is there.

    Logits are skipped, and a note says so, where a model would take more than half of the free memory.

    Raises:
        ValueError, FileNotFoundError: one of them cannot be read; the prompts do not fit.
    """
    source_a, source_b = open_source(a), open_source(b)
    differences = compare_tensors(source_a, source_b)
    notes: list[str] = []
    logits: list[LogitDifference] = []
    largest = max(4 * s.config.num_params() for s in (source_a, source_b))
    if largest > host_memory() / 2:
        notes.append(f"logits not compared: the model takes {largest / 1e9:.1f} GB in fp32")
    elif source_a.config.vocab_size != source_b.config.vocab_size:
        notes.append("logits not compared: the vocabularies differ")
    else:
        rows = read_prompts(prompts, source_a.config.vocab_size, source_a.side_files())
        first, second = our_outputs(a, rows), our_outputs(b, rows)
        logits.append(compare_logits("A", "B", first, second, tolerance=0.0))
        sides = {"A": (a, source_a, first), "B": (b, source_b, second)}
        for name in [name for name, (_, source, _) in sides.items() if isinstance(source, HfSource)] or ["A"]:
            path, _, ours = sides[name]
            other, note = transformers_outputs(path, rows)
            notes += [note] if note and note not in notes else []
            if other is not None:
                logits.append(
                    compare_logits(name, f"{name} in transformers", ours, other, tolerance=TRANSFORMERS_TOLERANCE)
                )
    theirs = source_b.config.model_dump()
    config = {key: (ours, theirs[key]) for key, ours in source_a.config.model_dump().items() if ours != theirs[key]}
    tokenizers, more = compare_tokenizers(a, b, exported_files(source_a), exported_files(source_b))
    notes += more
    return Report(os.fspath(a), os.fspath(b), len(source_a.slots), differences, config, logits, tokenizers, notes)


def compare_tokenizers(
    a: PathLike, b: PathLike, files_a: Mapping[str, bytes], files_b: Mapping[str, bytes]
) -> tuple[list[str], list[str]]:
    """What is not the same with the tokenizer of B, or with A's and B's as transformers reads them; notes.

    Of each, the first fact alone: a text's ids, BOS among them, EOS, what ends a text, a chat's ids.
    """
    import mixtral_jax  # its front door: tokenizers belong to another room

    found: dict[str, dict[str, Any]] = {}
    notes = []
    for name, path, files in (("A", a, files_a), ("B", b, files_b)):
        if not any(file in files for file in ("tokenizer.model", "tokenizer.json")):
            continue
        try:
            found[name] = mixtral_jax.tokenizer_facts(files, TEXTS)
            if theirs := _transformers_facts(path):
                found[f"{name} in transformers"] = theirs
        except ValueError as error:
            notes.append(f"tokenizers not compared: {name}: {error}")
    if not found:
        return [], notes
    (first, facts), *others = found.items()
    lacking = [f"tokenizer: {name} has none that can be read" for name in ("A", "B") if name not in found]
    return lacking + [
        f"tokenizer: {key!r} is {facts[key]!r} in {first}, {theirs[key]!r} in {name}"
        for name, theirs in others
        for key in [key for key in facts if key in theirs and facts[key] != theirs[key]][:1]
    ], notes


def _transformers_facts(path: PathLike) -> dict[str, Any]:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")) or is_remote(path):
        return {}
    if "config.json" not in Directory(path).names() or (Directory(path).local / "params").exists():
        return {}
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(os.fspath(path))
    except Exception as error:  # whatever it makes of the files
        raise ValueError(f"transformers cannot read it ({error})") from None
    ids = {text: tokenizer(text, split_special_tokens=True)["input_ids"] for text in TEXTS}
    return ids | {"EOS": tokenizer.eos_token_id}


def compare_tensors(a: Source, b: Source) -> list[TensorDifference]:
    """Tensors that are not bit-equal, or not in both; the largest difference first."""
    in_a, in_b = ({slot.name: slot for slot in source.slots} for source in (a, b))
    found = [TensorDifference(name, None, "only in A") for name in in_a if name not in in_b]
    found += [TensorDifference(name, None, "only in B") for name in in_b if name not in in_a]
    for name in in_a:
        if name in in_b and in_a[name].shape != in_b[name].shape:
            reason = f"shape {list(in_a[name].shape)} in A, {list(in_b[name].shape)} in B"
            found.append(TensorDifference(name, None, reason))
    both = _Both(a, b)
    copy(both, both, a.dtype)
    for slot in both.slots:
        if slot.name in both.worst:
            kinds = a.dtype(slot).name, b.dtype(in_b[slot.name]).name
            reason = "bits differ" if kinds[0] == kinds[1] else f"{kinds[0]} in A, {kinds[1]} in B"
            found.append(TensorDifference(slot.name, both.worst[slot.name], reason))
    return sorted(found, key=lambda d: -(np.inf if d.max_abs is None or np.isnan(d.max_abs) else d.max_abs))


class _Both(ChangedSource):
    """The slots that two sources share, as a source of the first, and as a sink that compares with the second."""

    def __init__(self, a: Source, b: Source) -> None:
        self._b, self._in_b = b, {slot.name: slot for slot in b.slots}
        common = [s for s in a.slots if s.name in self._in_b and s.shape == self._in_b[s.name].shape]
        super().__init__(a, a.config, common)
        self.worst: dict[str, float] = {}  # largest difference of those that are not bit-equal
        self._lock = threading.Lock()

    def band(self, slot: Slot) -> int | None:
        sizes = [n for n in (super().band(slot), self._b.band(self._in_b[slot.name])) if n is not None]
        return max(sizes, default=None)

    def cost(self, slot: Slot) -> int:
        return super().cost(slot) + self._b.cost(self._in_b[slot.name])

    def put(self, slot: Slot, start: int, stop: int, rows: ReadRows) -> None:
        ours, theirs = rows(start, stop), self._b.read(self._in_b[slot.name], start, stop)
        bits = f"u{ours.itemsize}"
        if ours.dtype == theirs.dtype and np.array_equal(ours.view(bits), theirs.view(bits)):
            return
        gap = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()
        with self._lock:
            self.worst[slot.name] = float(np.maximum(self.worst.get(slot.name, 0.0), gap))


class Outputs(NamedTuple):
    """Of all prompts one after another: M positions, L layers, C chosen experts (None for a dense model)."""

    logits_MV: np.ndarray
    experts_LMC: np.ndarray | None


def compare_logits(a: str, b: str, first: Outputs, second: Outputs, *, tolerance: float) -> LogitDifference:
    """Over all positions: max abs difference, mean KL(first || second), share of equal argmax and of shared experts."""
    p, q = _log_softmax(first.logits_MV), _log_softmax(second.logits_MV)
    max_abs = float(np.abs(first.logits_MV - second.logits_MV).max())
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    top1 = float(np.mean(first.logits_MV.argmax(-1) == second.logits_MV.argmax(-1)))
    router = None
    chosen = [each.experts_LMC for each in (first, second) if each.experts_LMC is not None]
    if len(chosen) == 2 and chosen[0].shape[:2] == chosen[1].shape[:2]:  # as many layers
        both = chosen[0][..., :, None] == chosen[1][..., None, :]
        router = float(both.any(-1).mean())
    spread = float(first.logits_MV.std(-1).mean())
    return LogitDifference(a, b, max_abs, kl, top1, router, spread, tolerance * spread, max_abs <= tolerance * spread)


def _log_softmax(logits_MV: np.ndarray) -> np.ndarray:
    shifted = logits_MV.astype(np.float64) - logits_MV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def read_prompts(
    prompts: PathLike | list[list[int]] | None, vocab_size: int, tokenizer: Directory | None
) -> list[list[int]]:
    """Rows of token ids.

    Args:
        prompts: a file with one prompt a line (text, or a JSON list of ids); lists of ids; None: a fixed pseudo-random
            set.
        tokenizer: the directory whose tokenizer turns text into ids.

    Raises:
        ValueError: an empty file, an id outside the vocabulary, or text and no tokenizer.
    """
    if prompts is None:
        return np.random.default_rng(0).integers(0, vocab_size, (_ROWS, _LENGTH)).tolist()
    if isinstance(prompts, list):
        rows = prompts
    else:
        lines = [line for line in Path(prompts).read_text().splitlines() if line.strip()]
        found = [_ids_in(line) for line in lines]
        texts = [line for line, ids in zip(lines, found, strict=True) if ids is None]
        encoded = iter(_encode(texts, tokenizer) if texts else ())
        rows = [next(encoded) if ids is None else ids for ids in found]
    if not rows or not all(rows):
        raise ValueError("no prompts: at least one non-empty line is needed")
    worst = max(max(row) for row in rows)
    if worst >= vocab_size or min(min(row) for row in rows) < 0:
        raise ValueError(f"a prompt holds token id {worst}, the vocabulary has {vocab_size}")
    return rows


def _ids_in(line: str) -> list[int] | None:
    """A JSON list of whole numbers; None: it is text, such as one that begins with [INST]."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, list) and all(type(id_) is int for id_ in row):
            return row
    return None


def _encode(lines: list[str], directory: Directory | None) -> list[list[int]]:
    names = directory.names() if directory is not None else []
    if directory is not None and "tokenizer.json" in names:
        from tokenizers import Tokenizer

        text = Tokenizer.from_str(directory.read_bytes("tokenizer.json").decode())
        return [text.encode(line).ids for line in lines]
    if directory is not None and "tokenizer.model" in names:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_proto=directory.read_bytes("tokenizer.model"))
        return [[pieces.bos_id(), *pieces.encode(line)] for line in lines]
    raise ValueError("the prompts are text, and the checkpoint has neither tokenizer.json nor tokenizer.model")


def our_outputs(path: PathLike, prompts: list[list[int]]) -> Outputs:
    """By this package, in fp32. The prompts are padded to one length; padding is another segment."""
    model = load(path, compute=ComputeConfig(dtype="float32"))
    length = max(map(len, prompts))
    tokens_BT = jnp.array([row + [0] * (length - len(row)) for row in prompts], jnp.int32)
    real_BT = np.array([[i < len(row) for i in range(length)] for row in prompts])
    segments_BT = jnp.asarray(real_BT, jnp.int32)
    logits_BTV = model(tokens_BT, segment_ids=segments_BT)
    if model.config.is_dense:
        return Outputs(np.asarray(logits_BTV)[real_BT], None)
    expert_BTLC = np.asarray(model.routing(tokens_BT, segment_ids=segments_BT).expert_MC)
    return Outputs(np.asarray(logits_BTV)[real_BT], np.moveaxis(expert_BTLC[real_BT], 1, 0))


def transformers_outputs(path: PathLike, prompts: list[list[int]]) -> tuple[Outputs | None, str]:
    """By transformers, in fp32, through files on disk; None and the reason where that cannot be done."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None, "transformers is not installed: logits were compared by this package alone"
    if is_remote(path):
        return None, f"{path} is remote: not read by transformers"
    source = open_source(path)
    if isinstance(source, HfSource):
        return _run_transformers(os.fspath(path), prompts), ""
    with tempfile.TemporaryDirectory(prefix="mixtral-jax-verify-") as scratch:
        exported = f"{scratch}/hf"
        write_hf(source, exported, force=False, progress=False)
        return _run_transformers(exported, prompts), ""


def _run_transformers(path: str, prompts: list[list[int]]) -> Outputs:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    logits, experts = [], []
    for row in prompts:
        extra = {"output_router_logits": True} if top_k else {}
        with torch.no_grad():
            out = model(torch.tensor([row]), **extra)
        logits.append(out.logits[0].float().numpy())
        if top_k:
            experts.append(torch.stack([r.float().topk(top_k).indices for r in out.router_logits]).numpy())
    return Outputs(np.concatenate(logits), np.concatenate(experts, axis=1) if experts else None)
