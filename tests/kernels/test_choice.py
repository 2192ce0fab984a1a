"""Which kernel runs where and why: by platform, device, version, dtype and shape."""

import re

import pytest

from mixtral_jax.config import ComputeConfig, MixtralConfig, MoeConfig
from mixtral_jax.kernels import choice
from mixtral_jax.kernels.choice import AttentionShape, choose_attention, choose_kernels, choose_matmul
from mixtral_jax.parallel import Machine

CPU, TPU = Machine("cpu", "cpu"), Machine("tpu", "TPU v5 lite")
A100, H100 = Machine("gpu", "NVIDIA A100-SXM4-80GB"), Machine("gpu", "NVIDIA H100 80GB HBM3")
V100, MI300 = Machine("gpu", "Tesla V100-SXM2-16GB"), Machine("gpu", "AMD Instinct MI300X")
ROW = AttentionShape(4096, 4096, 128, "bfloat16")


@pytest.mark.parametrize(
    ("machine", "shape", "chosen"),
    [
        (TPU, ROW, "splash"),
        (TPU, ROW._replace(ordered=False), "chunked"),
        (TPU, ROW._replace(T=4000, S=4000), "chunked"),
        (TPU, ROW._replace(T=1, ordered=False), "reference"),
        (H100, ROW, "cudnn"),
        (H100, ROW._replace(T=4001, S=4001, H=96), "cudnn"),
        (H100, ROW._replace(part=True), "triton"),
        (H100, ROW._replace(elements=2**31), "triton"),
        (Machine("gpu", "NVIDIA H20"), ROW, "cudnn"),
        (Machine("gpu", "NVIDIA GH200 480GB"), ROW, "cudnn"),
        (Machine("gpu", "NVIDIA B200"), ROW, "cudnn"),
        (Machine("gpu", "NVIDIA GB10"), ROW, "triton"),  # a desktop's
        (Machine("gpu", "NVIDIA RTX PRO 6000 Blackwell"), ROW, "triton"),
        (A100, ROW, "triton"),
        (A100, ROW._replace(T=1024, S=1024), "triton"),
        (CPU, AttentionShape(256, 256, 32), "chunked"),
        (CPU, AttentionShape(64, 64, 32), "reference"),
        (CPU, AttentionShape(1, 2048, 32, ordered=False), "reference"),
    ],
)
def test_auto_takes_the_fastest_that_can(monkeypatch, machine, shape, chosen):
    monkeypatch.setattr(choice.jax, "__version_info__", (0, 12, 0))
    found = choose_attention("auto", machine, shape)
    assert found.kernel == chosen and found.why
    assert found.fallback == (chosen == "chunked" and machine is not CPU)


@pytest.mark.parametrize(
    ("machine", "shape", "why"),
    [
        (H100, ROW._replace(dtype="float32"), "bfloat16 .compute.dtype is float32"),
        (H100, ROW._replace(dtype="float32", T=1024, S=1024), "bfloat16 .compute.dtype is float32"),  # no square, ever
        (A100, ROW._replace(T=4001, S=4001), "multiples of 128.*it is 4001"),
        (A100, ROW._replace(H=96), "head_dim of .*it is 96"),
        (V100, ROW, "Ampere generation or newer .this is Tesla V100"),
        (MI300, ROW, "an NVIDIA GPU .*this is AMD Instinct MI300X"),
        (H100, ROW._replace(ordered=False), "no cache"),
    ],
)
def test_what_falls_back_says_why_and_never_holds_all_scores(machine, shape, why):
    found = choose_attention("auto", machine, shape)
    assert found.kernel == "chunked" and found.fallback
    assert re.search(why, found.why), found.why


def test_cudnn_is_for_jax_0_12_and_newer(monkeypatch):
    monkeypatch.setattr(choice.jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(choice.jax, "__version__", "0.10.2")
    found = choose_attention("auto", H100, ROW)
    assert found.kernel == "triton" and "jax 0.12 or newer (this is 0.10.2" in found.why


@pytest.mark.parametrize("name", ["splash", "cudnn", "triton"])
def test_an_attention_that_cannot_run_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"compute.attention is {name}, which needs .*this is cpu.*: use auto"):
        choose_attention(name, CPU, ROW)


def test_a_gpu_without_tokamax_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(choice, "has_tokamax", lambda: False)
    remedy = r"tokamax.* is not installed: pip install 'mixtral-jax\[cuda\]', or name .*ragged_dot, blocked"
    for machine in (A100, MI300):
        with pytest.raises(ValueError, match=remedy):
            choose_matmul("auto", machine)
    with pytest.raises(ValueError, match=r"tokamax, which needs pip install 'mixtral-jax\[cuda\]'"):
        choose_matmul("tokamax", H100)
    for named in ("ragged_dot", "blocked"):
        assert choose_matmul(named, H100)[::2] == (named, True)


def test_the_grouped_product_of_each_platform(monkeypatch):
    monkeypatch.setattr(choice, "has_tokamax", lambda: True)
    assert [choose_matmul("auto", m).kernel for m in (CPU, TPU, H100)] == ["blocked", "megablox", "tokamax"]
    assert choose_matmul("ragged_dot", CPU) == ("ragged_dot", "named by compute.moe.matmul", False)
    with pytest.raises(ValueError, match=r"megablox, which needs a TPU .this is gpu"):
        choose_matmul("megablox", H100)
    with pytest.raises(ValueError, match=r"tokamax, which needs a GPU .this is cpu"):
        choose_matmul("tokamax", CPU)


def test_the_kernels_of_a_step(monkeypatch):
    monkeypatch.setattr(choice, "has_tokamax", lambda: False)
    model, compute = MixtralConfig.preset("mixtral-8x7b"), ComputeConfig(moe=MoeConfig(matmul="blocked"))
    found = choose_kernels(model, compute, A100, seq_len=4096, dtype="bfloat16", context=4)
    assert {name: one.kernel for name, one in found.items()} == {"attention": "triton", "experts": "blocked"}
    odd = choose_kernels(model, compute, A100, seq_len=4096, dtype="bfloat16", context=32)["attention"]
    assert odd.fallback and "on each device of mesh.context too (it is 64)" in odd.why
    dense = model.model_copy(update={"num_local_experts": 1, "num_experts_per_tok": 1})
    assert choose_kernels(dense, ComputeConfig(), A100, seq_len=4096, dtype="bfloat16")["experts"].kernel == "dense"
