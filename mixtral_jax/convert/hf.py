"""Hugging Face directories: config.json in and out, the files that belong to a model, and their two layouts."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory, PathLike
from mixtral_jax.convert.safetensors import INDEX, SINGLE, Tensor, TensorSource, read_tensors
from mixtral_jax.convert.table import ROUTER, Place, Slot, slots

ARCHITECTURES = ("mixtral", "mistral")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old files carry; it follows from rope_theta
_WEIGHT_MAP = TypeAdapter(dict[str, str])
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HfSource(TensorSource):
    """A Hugging Face directory as slots. All checks are made here, before anything is written.

    Raises:
        ValueError: no config.json, another architecture, files missing or truncated, tensors missing, unexpected,
            of a wrong shape or dtype, or two layouts mixed.
    """

    def __init__(self, path: PathLike, architectures: tuple[str, ...] = ARCHITECTURES) -> None:
        directory = Directory(path)
        hf_config = read_config(directory)
        config = read_shape(hf_config, directory, architectures)
        files, index = _weight_files(directory)
        tensors = read_tensors(directory, files)
        for name, file in index.items():
            if name not in tensors:
                raise ValueError(f"{directory}/{INDEX} places {name} in {file}, which does not hold it")
        kept = {name: tensor for name, tensor in tensors.items() if not _IGNORED.fullmatch(name)}
        head = kept.pop("lm_head.weight", None) if config.tie_word_embeddings else None
        super().__init__(directory, hf_config, config, kept)
        fused = self.fused(".mlp.experts.", ".block_sparse_moe.experts.")
        place = self._place_fused if fused else lambda slot: Place(slot.name, slot.shape)
        self.put_in_place({slot: place(slot) for slot in slots(config)})
        if head is not None:
            check_tied(head, kept["model.embed_tokens.weight"], f"config.json of {directory}")

    def _place_fused(self, slot: Slot) -> Place:
        prefix = f"model.layers.{slot.layer}.mlp."
        E, F, D = self.config.num_local_experts, self.config.intermediate_size, self.config.hidden_size
        if slot.leaf.path == "layers.moe.w13":  # w1 of an expert, then its w3
            first = (2 * slot.expert + slot.half) * F
            return Place(prefix + "experts.gate_up_proj", (E, 2 * F, D), first)
        if slot.leaf.path == "layers.moe.w2":
            return Place(prefix + "experts.down_proj", (E, D, F), slot.expert * D)
        return Place(prefix + "gate.weight" if slot.leaf.path == ROUTER else slot.name, slot.shape)


def check_tied(head: Tensor, embedding: Tensor, where: str) -> None:
    """A tied model may carry its head a second time; then it must be the embedding.

    Raises:
        ValueError: it is another matrix.
    """
    same = (head.shape, head.code) == (embedding.shape, embedding.code)
    for start in range(0, head.shape[0], 4096):
        stop = min(start + 4096, head.shape[0])
        same = same and head.rows(start, stop).tobytes() == embedding.rows(start, stop).tobytes()
    if not same:
        raise ValueError(
            f"{where} ties the embeddings, but {head.name} differs from {embedding.name}: set tie_word_embeddings to "
            "false"
        )


def read_config(directory: Directory) -> dict[str, Any]:
    """config.json of a directory; raises as Directory.read_json."""
    return directory.read_json("config.json", "model directory")


def read_shape(
    hf_config: dict[str, Any], where: Directory, architectures: tuple[str, ...] = ARCHITECTURES
) -> MixtralConfig:
    """The shape that a config.json describes.

    Raises:
        ValueError: another architecture, an unsupported variant, or a value that makes no sense; one sentence.
    """
    try:
        return MixtralConfig.from_hf(hf_config, architectures)
    except ValidationError as error:
        raise ValueError(f"config.json of {where} does not describe a model: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def one_line(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
    return f"{type(error).__name__}: {error}"


def has_weights(directory: Directory) -> bool:
    """Whether there is a file of the hub's layout, as whole as it may be; an index alone is none."""
    return any(name == SINGLE or _SHARD.fullmatch(name) for name in directory.names())


def _weight_files(directory: Directory) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a directory, and the index (empty for a single file).

    Raises:
        ValueError: there are none, a shard is missing on disk or in the index, or the weights are pickles.
    """
    names = directory.names()
    shards = [n for n in names if _SHARD.fullmatch(n)]
    if INDEX in names:
        raw = directory.read_bytes(INDEX)
        try:
            index = _WEIGHT_MAP.validate_python(json.loads(raw)["weight_map"], strict=True)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{directory}/{INDEX} does not parse: an object whose weight_map gives tensors their files was expected"
            ) from None
        files = sorted(set(index.values()))
        absent = [f for f in files if f not in names]
        if absent:
            raise ValueError(f"{directory} lacks {', '.join(absent)}, which {INDEX} names")
        if SINGLE in names and SINGLE not in files:
            raise ValueError(
                f"{directory} holds {SINGLE} and {INDEX}, which names other files: one is of an earlier save, "
                "and transformers reads the first; remove what is not meant"
            )
        strays = [s for s in shards if s not in files]
        if strays:
            raise ValueError(f"{directory}/{INDEX} does not name {', '.join(strays)}, which is there")
        return files, index
    if SINGLE in names:
        return [SINGLE], {}
    if shards:
        raise ValueError(f"{directory} has {len(shards)} shards ({shards[0]} ...) but no {INDEX}")
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise ValueError(
            f"{directory} holds pickled weights ({pickles[0]}), which are not read: save it as safetensors"
        )
    raise ValueError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}")


def parse_size(text: str | int) -> int:
    """ "5GB" as bytes; units are decimal as on the hub, KiB, MiB and GiB are binary.

    Raises:
        ValueError: not a positive size.
    """
    # pydantic alone takes what follows a number and a unit for nothing: 1,5GB would be one byte
    whole = re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?)?B?", str(text).strip(), re.IGNORECASE)
    size = TypeAdapter(ByteSize).validate_python(text) if whole else 0
    if size <= 0:
        raise ValueError(f"max_shard_size {text!r} is no size: write it as 5GB, 500MB or a number of bytes")
    return int(size)


def export_config(hf_config: Mapping[str, Any], config: MixtralConfig, dtype: str) -> dict[str, Any]:
    """config.json of an export: what came with the model, its shape and dtype, in words of transformers 4 and 5."""
    shape = config.to_hf(dtype)
    fixed = {
        k: shape[k] for k in ("architectures", "model_type", "dtype", "torch_dtype", "rope_theta", "rope_parameters")
    }
    fixed |= {k: getattr(config, k) for k in MixtralConfig.model_fields if k in shape}
    return {k: v for k, v in {**shape, **hf_config, **fixed}.items() if k != "rope_scaling"}  # it is in rope_parameters
