"""What the first screen says about where the memory lies, and what it warns of."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.plan.placement import (
    SHARES,
    axis_lines,
    human_bytes,
    memory_line,
    passing_line,
    placement_warnings,
    replicated,
    resident,
)
from mixtral_jax.train.weights import abstract_params, leaves
from tests.tiny import write_run_file


def warnings_of(tmp_path, mesh_sizes, **changes):
    config = load_config(write_run_file(tmp_path, **changes)).config
    mesh = make_mesh(MeshConfig(**mesh_sizes), jax.devices()[: 1 if mesh_sizes == {"data": 1} else 8])
    return placement_warnings(config, mesh, leaves(abstract_params(config, mesh)))


def test_each_axis_says_what_it_shards():
    assert list(SHARES) == list(MESH_AXES)
    lines = axis_lines({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "context": 1})
    assert [line.partition(":")[0] for line in lines] == ["fsdp 4", "tensor 2"]
    assert "moments" in lines[0] and "vocabulary" in lines[1]


def test_large_leaves_that_are_whole_everywhere_are_found():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def leaf(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tree = {
        "shared": leaf((2**15, 2**12), P("fsdp")), "large": leaf((2**13, 2**12), P()),
        "small": leaf((64,), P()), "half": leaf((2**13, 2**12), P(), jnp.bfloat16),
        "limit": leaf((2**12, 2**12), P()),  # 64 MiB exactly, and 7 %
    }  # fmt: skip
    assert replicated(tree.items()) == [("large", 2**27), ("half", 2**26), ("limit", 2**26)]
    many = {"shared": leaf((2**19, 2**12), P("fsdp")), "limit": tree["limit"], "above": leaf((2**12 + 1, 2**12), P())}
    assert replicated(many.items()) == [("above", 2**26 + 2**14)]  # less than 1 %, but above 64 MiB


def test_activations_are_those_of_one_devices_tokens(tmp_path):
    config = load_config(write_run_file(tmp_path, compute={"remat": "full"})).config
    sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "context": 2}
    # 8 rows of 32 tokens over 4 devices; a layer's input of 16 numbers is saved for each of 2 layers
    assert f"({2 * 64 * 16 * 4 // 1024} KiB saved for the backward pass)" in passing_line(config, sizes, "cpu")


def test_what_comes_and_goes_is_that_of_the_machine_asked_for_and_of_several_micro_batches(tmp_path):
    config = load_config(write_run_file(tmp_path, compute={"remat": "full"}, micro_batch_size=4)).config
    sizes = dict.fromkeys(MESH_AXES, 1)
    saved = {
        where: float(passing_line(config, sizes, where).split("(")[1].split()[0]) for where in ("cpu", "gpu", "tpu")
    }
    assert saved["cpu"] == 2 * saved["gpu"] == 2 * saved["tpu"]  # auto: fp32 and bf16
    whole = config.model_copy(update={"micro_batch_size": None})
    once, twice = (human_bytes(n * resident(config, sizes)["parameters"]) for n in (1, 2))
    assert f"gradients {twice}" in memory_line(config, sizes) and f"gradients {once}" in memory_line(whole, sizes)


def test_replicas_are_warned_of_and_shards_are_not(tmp_path):
    (line,) = warnings_of(tmp_path, {"data": 8})
    assert "each of the 8 devices holds all of layers.moe.w13" in line and "mesh.fsdp would share them" in line
    assert warnings_of(tmp_path, {"data": 1, "fsdp": 8}) == []
    assert warnings_of(tmp_path, {"data": 1}) == []


def test_a_vocabulary_that_tensor_does_not_divide_is_said(tmp_path):
    (line,) = warnings_of(tmp_path, {"data": 1, "fsdp": 4, "tensor": 2}, model={"vocab_size": 259})
    assert "mesh.tensor (2) does not divide model.vocab_size (259)" in line and "padded to 260 rows" in line


@pytest.mark.parametrize("base", [None, "somewhere"])
def test_adapters_on_random_numbers_are_warned_of(tmp_path, base):
    changes = {"stage": "sft", "lora": {"rank": 2}, "init_from": base, "data": {"examples": "chat"}}
    found = [line for line in warnings_of(tmp_path, {"data": 1}, **changes) if "random numbers" in line]
    assert len(found) == (base is None)
    assert all("set init_from" in line for line in found)
