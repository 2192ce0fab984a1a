"""Mixtral in JAX: the model, its parallelism, its kernels, its checkpoints; and the front door of all the rooms."""

import glob
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
    from mixtral_jax.convert import load, save_hf
    from mixtral_jax.data.text import tokenizer_facts, tokenizer_files
    from mixtral_jax.model import Mixtral, abstract_model
    from mixtral_jax.train.config import read_config as load_config
    from mixtral_jax.train.read_model import read_tokenizer as load_tokenizer
    from mixtral_jax.train.text import generate
    from mixtral_jax.train.trainer import Trainer

# Where each public name lives. Imported when first asked for: mixtral_jax.data must load without jax, and this table is
# the one place where this room names others.
_PLACES = {
    "ComputeConfig": "config:ComputeConfig",
    "Mixtral": "model:Mixtral",
    "MixtralConfig": "config:MixtralConfig",
    "MoeConfig": "config:MoeConfig",
    "Trainer": "train.trainer:Trainer",
    "abstract_model": "model:abstract_model",
    "generate": "train.text:generate",
    "load": "convert:load",
    "load_config": "train.config:read_config",
    "load_tokenizer": "train.read_model:read_tokenizer",
    "save_hf": "convert:save_hf",
    "tokenizer_facts": "data.text:tokenizer_facts",
    "tokenizer_files": "data.text:tokenizer_files",
}
__all__ = [
    "ComputeConfig", "Mixtral", "MixtralConfig", "MoeConfig", "Trainer", "abstract_model", "generate", "load",
    "load_config", "load_tokenizer", "save_hf", "tokenizer_facts", "tokenizer_files",
]  # fmt: skip

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "train")):
    raise ImportError(
        "mixtral_jax/train is no folder, as in a zip unpacked without symbolic links: git clone -c core.symlinks=true "
        "brings them; or copy train, data, configs and launch.py of the top level over their namesakes in mixtral_jax"
    )

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
_compilers = any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
if "jax" not in sys.modules and _compilers and not any(map(glob.glob, _ACCELERATORS)):
    # libtpu and the CUDA plugin, there for `plan`, would look for a TPU and a GPU, in vain and aloud
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "jax" not in sys.modules and "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # jax refuses both names
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU, as plans count; jax's own share is 0.75


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, inner = _PLACES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), inner)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
