"""Strict tests: eight CPU devices, no silent broadcasting, warnings are errors (pyproject.toml), no network.

The environment is set while pytest loads this file, before anything imports jax; processes that tests start inherit
it. Under pytest-xdist every worker loads this file by itself.
"""

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

os.environ |= {
    "JAX_PLATFORMS": os.environ.get("MIXTRAL_JAX_TEST_PLATFORM", "cpu"),
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Compiling dominates these tests; programs compiled once are shared by workers and later runs.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # torch, an oracle here, would otherwise take every core in every worker.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS)),
}
# Most of the time goes into compiling programs that run for a moment. LLVM's first level takes 0.6 of the usual one's
# time; without its passes five tests of runs and meshes took 150 s of CPU, and 192 at the first level.
for flag in (
    "xla_force_host_platform_device_count=8",
    "xla_backend_optimization_level=0",
    "xla_llvm_disable_expensive_passes=true",
):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}".strip()

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
_MANY_MAPPINGS = 25_000
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "", None, socket.gethostname())


def _refuse_strangers(address: Any) -> None:
    host = address[0] if isinstance(address, tuple) else ""  # a Unix socket's address is a path
    host = host.decode() if isinstance(host, bytes) else host
    if host not in _LOCAL_NAMES and not str(host).startswith("127."):
        raise PermissionError(f"this test tried to reach {host!r}: tests use no network")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    _refuse_strangers(address)
    _connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> int:
    _refuse_strangers(address)
    return _connect_ex(self, address)


def _guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_strangers((host, 0))
    return _getaddrinfo(host, *args, **kwargs)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Any:
    """Only this machine can be reached."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _guarded_connect)
    patch.setattr(socket.socket, "connect_ex", _guarded_connect_ex)
    patch.setattr(socket, "getaddrinfo", _guarded_getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Any:
    """A process may have 65,530 mappings; a program of XLA's on a CPU takes ten or more, and jax keeps them all.

    Without this a worker dies after some thousand tests, in whichever is next.
    """
    yield
    if "jax" in sys.modules and Path("/proc/self/maps").read_bytes().count(b"\n") > _MANY_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def make_config(tmp_path: Path) -> Any:
    """The configuration of a small pretraining run, with changes."""

    def make(**changes: Any) -> Any:
        from mixtral_jax.train.config.load import load_config
        from tests.tiny import write_run_file

        return load_config(write_run_file(tmp_path, **changes)).config

    return make


@pytest.fixture
def make_tuning_config(tmp_path: Path) -> Any:
    """The same of a stage of fine-tuning."""

    def make(stage: str, **changes: Any) -> Any:
        from mixtral_jax.train.config.load import load_config
        from tests.tuning import write_tuning_file

        return load_config(write_tuning_file(tmp_path, stage, **changes)).config

    return make


@pytest.fixture
def small_lumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lumps, units and buckets from little text (in this process: one worker)."""
    from mixtral_jax.data.prepare import documents
    from mixtral_jax.data.records import sources

    monkeypatch.setattr(sources, "LUMP_BYTES", 4000)
    monkeypatch.setattr(sources, "_READ_BYTES", 2000)
    monkeypatch.setattr(sources, "UNIT_BYTES", 12_000)
    monkeypatch.setattr(documents, "BUCKET_BYTES", 40_000)


@pytest.fixture(scope="session")
def browser() -> Any:
    """A headless Chromium (apt-get install chromium); a test that needs it is skipped where there is none."""
    from tests.browser import Browser, chromium

    if chromium() is None:
        pytest.skip("needs the program chromium")
    with Browser() as one:
        yield one
