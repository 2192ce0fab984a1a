"""The arithmetic that is shown before anything is built."""

import math
from pathlib import Path

import pytest

from mixtral_jax.kernels import choice
from mixtral_jax.lora import is_adapter
from mixtral_jax.parallel import Machine
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.config.schema import RunConfig, check_sizes
from mixtral_jax.train.plan.placement import human_bytes, memory_line, resident
from mixtral_jax.train.run import check, screen
from mixtral_jax.train.run.screen import batch_line, fallback_lines, model_line
from mixtral_jax.train.weights import abstract_params, leaves
from tests.tiny import write_run_file
from tests.tuning import write_tuning_file

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(write_run_file(tmp_path, global_batch_size=16, micro_batch_size=8)).config


def test_batch(config: RunConfig) -> None:
    assert batch_line(config, ONE | {"fsdp": 2, "expert": 2}) == (
        "16 sequences = 2 micro-batches x 4 shards x 2 sequences; 512 tokens a step, 4,096 in 8 steps"
    )
    with pytest.raises(
        ValueError, match=r"micro_batch_size \(8\) is not a multiple of the 3 batch shards .* 9 would be"
    ):
        batch_line(config, ONE | {"data": 3})


def test_memory_is_16_bytes_a_parameter_and_20_with_several_micro_batches(config: RunConfig) -> None:
    for rows, bytes_each in ((16, 16), (8, 20)):
        total = human_bytes(bytes_each * config.model.num_params())
        own = config.model_copy(update={"micro_batch_size": rows})
        assert memory_line(own, ONE | {"data": 8}).startswith(f"{total} a device")  # replicas save nothing


@pytest.mark.parametrize("base", [None, "float32", "nf4"])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_a_device_holds_what_the_shardings_say(tmp_path: Path, base: str | None, sizes: dict[str, int]) -> None:
    lora = base and {"rank": 4, "base_dtype": base, "base_block": 2}
    config = load_config(write_tuning_file(tmp_path, "sft", lora=lora, global_batch_size=8)).config
    mesh = make_mesh(MeshConfig(**(ONE | sizes)))
    trained = frozen = 0
    for path, leaf in leaves(abstract_params(config, mesh)):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if base is None or is_adapter(path):
            trained += size
        else:
            frozen += size * leaf.dtype.itemsize
    held = {"parameters": 4 * trained, "optimizer": 8 * trained, "frozen": frozen, "reference": 0}
    assert resident(config, ONE | sizes) == held
    assert trained and (frozen > 0) == (base is not None)


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({"dpo": {"reference": "frozen"}}, 20),
        ({"dpo": {"reference": "precomputed"}}, 16),
    ],
)
def test_a_reference_of_its_own_is_counted(tmp_path: Path, changes, bytes_each) -> None:
    config = load_config(write_tuning_file(tmp_path, "dpo", **changes)).config
    total = human_bytes(bytes_each * config.model.num_params())
    line = memory_line(config, ONE)
    assert line.startswith(f"{total} a device") and ("reference" in line) == (bytes_each == 20)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4"])
def test_a_reference_beside_adapters_and_a_trained_router_is_held_as_the_base_is(tmp_path: Path, base: str) -> None:
    lora = {"rank": 4, "base_dtype": base}
    file = write_tuning_file(tmp_path, "dpo", lora=lora, router={"update": "train"}, dpo={"reference": "frozen"})
    config = load_config(file).config
    held = sum(x.size * x.dtype.itemsize for p, x in leaves(abstract_params(config, None)) if not is_adapter(p))
    assert f"reference {human_bytes(held)}" in memory_line(config, ONE)


def test_model(config: RunConfig) -> None:
    line = model_line(config.model, 32)
    assert line.startswith(f"{config.model.num_params():,} parameters, {config.model.num_active_params():,} used")


def test_a_kernel_that_falls_back_is_one_line_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "machine", lambda: Machine("gpu", "NVIDIA A100-SXM4-80GB"))
    monkeypatch.setattr(choice, "has_tokamax", lambda: True)
    overrides = {
        "seq_len": 256,
        "compute": {"dtype": "float32"},
        "model": {"max_position_embeddings": 256, "head_dim": 16},
    }
    config = load_config(write_run_file(tmp_path, **overrides)).config
    (line,) = fallback_lines(config, ONE)
    assert line.startswith("note: attention falls back on chunked: cudnn needs an NVIDIA GPU of the Hopper")
    assert line.endswith("triton needs bfloat16 (compute.dtype is float32)")
    half = config.model_copy(update={"compute": config.compute.model_copy(update={"dtype": "bfloat16"})})
    assert fallback_lines(half, ONE) == []


@pytest.mark.parametrize(
    ("native", "breaks", "dtype", "lines"),
    [(True, False, "auto", 1), (False, False, "auto", 0), (True, False, "float32", 0), (True, True, "auto", 0)],
)
def test_products_of_bf16_are_offered_where_the_processor_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, breaks: bool, dtype: str, lines: int
) -> None:
    monkeypatch.setattr(screen, "native_bf16", lambda: native)
    monkeypatch.setattr(screen, "breaks_on_bf16", lambda: breaks)
    config = load_config(write_run_file(tmp_path, compute={"dtype": dtype})).config
    assert sum("compute.dtype=bfloat16" in line for line in fallback_lines(config, ONE)) == lines


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**20, "3 MiB"), (2**30, "1 GiB"), (2.5 * 2**40, "2.5 TiB")]
)
def test_bytes_for_people(size: float, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("changes", "sizes", "problem"),
    [
        ({"eval": {"batch_size": 4}}, {"fsdp": 8}, r"eval\.batch_size \(4\) is not a multiple of the 8 batch shards"),
        ({"seq_len": 36}, {"context": 8}, r"seq_len \(36\) is not a multiple of 16: 32 or 48 would be"),
        ({}, {"tensor": 4}, r"mesh\.tensor \(4\) does not divide model\.num_key_value_heads \(2\): 1, 2 would"),
        ({}, {"expert": 8}, r"mesh\.expert \(8\) does not divide model\.num_local_experts \(4\)"),
    ],
)
def test_the_size_that_the_devices_give_an_axis_is_checked_like_one_in_the_file(tmp_path, changes, sizes, problem):
    axes = {"data": 1} | dict.fromkeys(sizes, -1)
    config = load_config(write_run_file(tmp_path, global_batch_size=16, mesh=axes, **changes)).config
    with pytest.raises(ValueError, match=problem):
        check_sizes(config, ONE | sizes)
