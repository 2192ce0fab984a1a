"""The plan's arithmetic: FLOPs, parameters and memory in closed form, against the model and against compilers."""

from pathlib import Path

import pytest

from mixtral_jax.config import MixtralConfig
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.plan import compile as compile_room
from mixtral_jax.train.plan.chips import CHIPS, parse_topology
from mixtral_jax.train.plan.closed_form import attention_pairs, flops, traffic, useful
from mixtral_jax.train.plan.placement import as_run_on, memory
from mixtral_jax.train.plan.search import candidates, likely_rate

BIG = MixtralConfig.preset("mixtral-8x7b").model_dump()


def test_the_step_of_a_run_by_epochs_is_planned(make_config):
    config = make_config(steps=None, data={"epochs": 2}, optimizer={"warmup_steps": 10})
    assert compile_room._step(config, None).state.params


def test_closed_form_flops_are_those_of_the_model_and_what_is_computed_again(make_config):
    config = make_config(model=BIG, seq_len=4096, mesh={"data": 1, "fsdp": 8}, compute={"remat": "full"})
    sizes = config.mesh.sizes(8)
    full, none = (
        flops(c, sizes)
        for c in (config, config.model_copy(update={"compute": config.compute.model_copy(update={"remat": "none"})}))
    )
    tokens = 8 * 4096 / 8
    causal, every_pair = useful(config, sizes)
    assert causal == config.model.flops_per_token(4096, "causal") * tokens
    assert every_pair == config.model.flops_per_token(4096, "full") * tokens
    # products and experts without recomputation are the model's, and attention that of tiles: 7 + 2 for 6 products
    attention = 12 * 32 * 4096 * tokens
    assert none.dots + none.experts == pytest.approx(causal - attention * 4097 / 2)
    assert none.attention == pytest.approx(attention * attention_pairs(4096, None) * 9 / 6)
    head = 6 * 4096 * 32000 * tokens
    assert full.dots - head == pytest.approx((none.dots - head) * 8 / 6)
    assert full.experts == pytest.approx(none.experts * (6 + 4 / 3) / 6)  # w1 and w3 again, w2 never


def test_a_frozen_base_has_no_gradient_and_no_moments_and_a_reference_is_one_more_forward(make_tuning_config):
    common = {
        "model": BIG, "seq_len": 4096, "global_batch_size": 32, "compute": {"remat": "none"},
        "mesh": {"data": 1, "fsdp": 8},
    }  # fmt: skip
    tuned = make_tuning_config("sft", **common)
    adapted = make_tuning_config("sft", **common, lora={"rank": 1, "targets": ["attention.key"]})
    preferred = make_tuning_config("dpo", **common)
    sizes = tuned.mesh.sizes(8)
    full, lora, dpo = (flops(config, sizes) for config in (tuned, adapted, preferred))
    assert lora.experts == pytest.approx(full.experts * 4 / 6)
    assert lora.dots == pytest.approx(full.dots * 4 / 6, rel=1e-3)  # a rank of 1 is next to nothing
    assert lora.attention == full.attention
    assert dpo.experts == pytest.approx(full.experts * 8 / 6)
    assert useful(preferred, sizes) == pytest.approx([4 / 3 * n for n in useful(tuned, sizes)])
    whole = 46_702_792_704 * 4 / 8
    parts = {name: memory(config, sizes) for name, config in (("lora", adapted), ("dpo", preferred))}
    assert parts["lora"]["frozen"] == pytest.approx(whole, rel=1e-3) and parts["lora"]["optimizer"] < whole / 1000
    assert parts["lora"]["reference"] == 0 and parts["dpo"]["reference"] == pytest.approx(whole, rel=1e-3)


def test_tiles_of_attention():
    assert attention_pairs(512, None) == 512  # one tile, computed whole
    assert attention_pairs(4096, None) == 4096 / 2 + 256
    assert attention_pairs(4096, 512) == pytest.approx((1 + 7 * 2) * 512 / 8)


LONG = ["seq_len=32768", "mesh.fsdp=16", "mesh.context=4"]


@pytest.mark.parametrize(
    ("name", "rows", "changes", "compiled"),  # GB, as tests/plan/test_presets.py compiles them
    [
        ("8x7b-v5p-64", 64, [], 30.9), ("8x7b-v5p-64", 256, [], 44.7), ("8x7b-v5p-64", 768, [], 80.9),
        ("8x7b-v5e-256", 256, [], 8.2), ("8x7b-v5e-256", 512, [], 10.5), ("8x7b-v6e-256", 2048, [], 24.0),
        ("8x7b-v5p-128", 512, [], 33.1), ("8x7b-v5p-128", 512, ["mesh.expert=8"], 57.1),
        ("8x7b-v5p-128", 16, LONG, 54.2), ("8x22b-v5p-256", 512, [], 40.2), ("8x22b-v6e-256", 256, [], 18.2),
    ],
)  # fmt: skip
def test_closed_form_memory_is_near_what_the_compiler_says(name, rows, changes, compiled):
    changes = [*changes, f"global_batch_size={rows}", f"micro_batch_size={rows}"]
    file = Path(__file__).parents[2] / "configs" / "pretrain" / f"mixtral-{name}.yaml"
    config = as_run_on(load_config(file, changes).config, "tpu")
    sizes = config.mesh.sizes(parse_topology(name.split("-", 1)[1]).chips)
    parts = memory(config, sizes)
    assert sum(parts.values()) == pytest.approx(compiled * 1e9, rel=0.07)
    shards = sizes["fsdp"] * sizes["expert"] * sizes["tensor"]
    assert parts["parameters"] == pytest.approx(4 * config.model.num_params() / shards, rel=5e-3)


EXPERT_8 = ["mesh.expert=8", "compute.remat=full"]


@pytest.mark.parametrize(
    ("rows", "changes", "compiled"),  # GB, jax 0.10.2 for h100-64; rows of a micro-batch of 512
    [
        (512, [], 68.2), (512, ["compute.remat=full"], 40.7), (256, [], 47.8), (256, ["compute.remat=full"], 33.2),
        (512, EXPERT_8, 72.1), (256, EXPERT_8, 46.1), (256, [*EXPERT_8, "compute.moe.chunk_tokens=8192"], 33.4),
    ],
)  # fmt: skip
def test_closed_form_memory_of_gpus_is_near_what_the_compiler_says(rows, changes, compiled):
    file = Path(__file__).parents[2] / "configs" / "pretrain" / "mixtral-8x7b-h100-64.yaml"
    config = as_run_on(load_config(file, [*changes, f"micro_batch_size={rows}"]).config, "tpu")
    assert sum(memory(config, config.mesh.sizes(64), "gpu").values()) == pytest.approx(compiled * 1e9, rel=0.07)


def test_closed_form_memory_of_adapters_on_gpus_is_near_what_the_compiler_says():
    """With the flags of compute.xla_flags: auto; without them it was 65.6 GB."""
    file = Path(__file__).parents[2] / "configs" / "sft" / "mixtral-8x7b-lora-h100-8.yaml"
    config = as_run_on(load_config(file, []).config, "tpu")
    assert sum(memory(config, config.mesh.sizes(8), "gpu").values()) == pytest.approx(53.33e9, rel=0.07)


def test_a_search_passes_over_meshes_that_do_not_divide_a_quantised_base(make_tuning_config):
    config = make_tuning_config(
        "sft", model=BIG, seq_len=4096, global_batch_size=256, compute={"dtype": "bfloat16"},
        lora={"rank": 4, "base_dtype": "nf4"}, mesh={"data": 1, "fsdp": 1},
    )  # fmt: skip
    found = candidates(config, parse_topology("v6e-256"))
    assert found and all(c.config.mesh.fsdp * c.config.mesh.expert <= 64 for c in found)


def test_search_prunes_by_arithmetic_and_ranks_what_is_left(make_config):
    config = make_config(
        model=BIG, seq_len=4096, global_batch_size=1024, compute={"dtype": "bfloat16"}, mesh={"data": 1, "fsdp": 1}
    )
    found = candidates(config, parse_topology("v5p-64"))
    assert found and all(c.memory.peak <= CHIPS["v5p"].memory for c in found)
    assert [likely_rate(c) for c in found] == sorted(map(likely_rate, found), reverse=True)
    assert not candidates(config, parse_topology("v5e-4"))


def test_a_routers_adapter_and_what_is_trained_whole_are_counted_as_what_they_are(make_tuning_config):
    common = {
        "model": BIG, "seq_len": 4096, "global_batch_size": 32, "compute": {"remat": "none"},
        "mesh": {"data": 1, "fsdp": 8},
    }  # fmt: skip
    sizes, tokens = make_tuning_config("sft", **common).mesh.sizes(8), 32 * 4096 / 8
    head, router = 32000 * 4096, 32 * 4096 * 8

    def cost(update="frozen", **changes):
        lora = {"rank": 16, "targets": ["q_proj"], **changes}
        config = make_tuning_config("sft", **common, router={"update": update}, lora=lora)
        return flops(config, sizes), useful(config, sizes)[0], traffic(config, sizes)["fsdp"]

    none = cost()
    for changes, products, gradients in (
        ({"modules_to_save": ["lm_head"]}, head, head),
        ({"modules_to_save": ["embed_tokens"]}, 0, head),
        ({"update": "train"}, router, router),
        ({"targets": ["q_proj", "gate"]}, router, 0),  # it is added to the router before that is multiplied
    ):
        got = cost(**changes)
        assert got[0].experts == none[0].experts
        assert got[0].dots - none[0].dots == pytest.approx(2 * tokens * products)
        assert got[1] - none[1] == pytest.approx(2 * tokens * products)
        assert got[2] - none[2] == pytest.approx(2 * gradients * 7 / 8)  # in bf16
