"""Presets, counts and config.json: exact numbers, and transformers as the second opinion."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from pydantic import ValidationError

from mixtral_jax.config import PRESETS, MixtralConfig
from tests.optional import transformers

# The released config.json of mistralai/Mixtral-8x7B-v0.1, as transformers 4 wrote it (Apache-2.0).
RELEASED_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
# transformers 5 moves rope_theta and renames torch_dtype.
RELEASED_8X7B_V5 = {
    **{k: v for k, v in RELEASED_8X7B.items() if k not in ("rope_theta", "torch_dtype")},
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "head_dim": 128,
}
FIELDS = tuple(f for f in MixtralConfig.model_fields if f != "rope_theta")


def through_transformers(config: dict[str, Any], directory: Path) -> Any:
    (directory / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "overrides", "total", "active"),
    [
        ("mixtral-8x7b", {}, 46_702_792_704, 12_879_925_248),  # A1
        ("mixtral-8x22b", {}, 140_620_634_112, None),
        ("mistral-7b", {}, 7_241_732_096, 7_241_732_096),
    ],
)
def test_parameter_counts(name: str, overrides: dict, total: int, active: int | None) -> None:
    config = MixtralConfig.preset(name, **overrides)
    assert config.num_params() == total
    assert active is None or config.num_active_params() == active


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True, "head_dim": 64, "vocab_size": 517}])
def test_the_closed_form_counts_the_leaves_of_the_model(name: str, overrides: dict) -> None:
    from mixtral_jax.model import abstract_model

    config = MixtralConfig.preset(name, **overrides)
    leaves = jax.tree.leaves(abstract_model(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == config.num_params()


def test_flops_per_token() -> None:
    """A2: 82.9 GFLOP counting full attention, 79.7 counting causal, at sequence length 4096."""
    config = MixtralConfig.preset("mixtral-8x7b")
    assert round(config.flops_per_token(4096, "full") / 1e9, 1) == 82.9
    assert round(config.flops_per_token(4096, "causal") / 1e9, 1) == 79.7


def test_flops_count_matmuls_one_by_one() -> None:
    config = MixtralConfig.preset("tiny", vocab_size=300, num_hidden_layers=3, sliding_window=5)
    seq_len = 12
    d, h, f = config.hidden_size, config.head_dim, config.intermediate_size
    n, k = config.num_attention_heads, config.num_key_value_heads
    per_layer = [(d, n * h), (d, k * h), (d, k * h), (n * h, d), (d, config.num_local_experts)]
    per_layer += [(d, f), (d, f), (f, d)] * config.num_experts_per_tok
    matmuls = 3 * sum(a * b for a, b in per_layer) + d * config.vocab_size
    pairs = sum(min(p + 1, 5) for p in range(seq_len))  # keys that the window lets a query at p see
    attention = 3 * n * h * 2 * pairs / seq_len
    assert config.flops_per_token(seq_len) == pytest.approx(6 * (matmuls + attention), rel=1e-12)
    full = 3 * n * h * 2 * seq_len
    assert config.flops_per_token(seq_len, "full") == pytest.approx(6 * (matmuls + full), rel=1e-12)


@pytest.mark.parametrize("released", [RELEASED_8X7B, RELEASED_8X7B_V5], ids=["transformers4", "transformers5"])
def test_the_preset_is_the_released_model(released: dict[str, Any], tmp_path: Path) -> None:
    ours = MixtralConfig.from_hf(released)
    assert ours == MixtralConfig.preset("mixtral-8x7b")
    theirs = through_transformers(released, tmp_path)
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    for field in FIELDS:
        value = getattr(theirs, field)
        assert value == getattr(ours, field) or (field == "head_dim" and value is None), field


@pytest.mark.parametrize("name", PRESETS)
def test_to_hf_is_read_by_transformers_and_by_us(name: str, tmp_path: Path) -> None:
    ours = MixtralConfig.preset(name, rope_theta=12345.0, tie_word_embeddings=True, sliding_window=77)
    written = ours.to_hf(dtype="float32")
    if name == "mistral-7b":
        assert MixtralConfig.from_hf(written) == ours
    else:
        with pytest.warns(UserWarning, match="sets sliding_window 77 for a Mixtral"):
            assert MixtralConfig.from_hf(written) == ours
    theirs = through_transformers(written, tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 12345.0
    assert type(theirs).__name__ == ("MistralConfig" if ours.is_dense else "MixtralConfig")
    for field in FIELDS:
        if not ours.is_dense or hasattr(theirs, field):
            assert getattr(theirs, field) == getattr(ours, field), field
    # and what transformers writes from it reads back as the same shape
    again = json.loads(theirs.to_json_string(use_diff=False))
    assert MixtralConfig.from_hf({**again, "sliding_window": None}) == MixtralConfig(
        **{**ours.model_dump(), "sliding_window": None}
    )


@pytest.mark.parametrize("kind", ["mixtral", "mistral", "llama"])
def test_keys_left_out_mean_what_transformers_takes_them_to_mean(kind: str, tmp_path: Path) -> None:
    bare = {
        "model_type": kind, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }  # fmt: skip
    ours = MixtralConfig.from_hf(bare, architectures=("mixtral", "mistral", "llama"))
    theirs = through_transformers(bare, tmp_path)
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    for field in FIELDS:
        if hasattr(theirs, field):
            value = getattr(theirs, field)
            assert value == getattr(ours, field) or (field == "head_dim" and value is None), field


DEFAULT = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_rotary_base_is_read_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    """Every spelling, alone and in pairs; what transformers rotates otherwise is refused."""
    plain = {k: v for k, v in RELEASED_8X7B.items() if k != "rope_theta"} | {"model_type": kind, "sliding_window": None}
    parts: list[Any] = [
        None, {}, DEFAULT, {"rope_theta": 9.0}, {"type": "default"}, {"type": "default", "rope_theta": 3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 8.0},
        {"type": "linear", "factor": 2.0},
    ]  # fmt: skip
    for scaling, parameters, theta in itertools.product(parts, parts, [{}, {"rope_theta": 7.0}]):
        written = {**plain, "rope_scaling": scaling, "rope_parameters": parameters, **theta}
        theirs = through_transformers(written, tmp_path).rope_parameters
        if theirs["rope_type"] == "default":
            assert MixtralConfig.from_hf(written).rope_theta == theirs["rope_theta"], written
        else:
            with pytest.raises(ValueError, match=f"rope type '{theirs['rope_type']}' is not supported"):
                MixtralConfig.from_hf(written)
    written = {**plain, "num_experts": 4}  # transformers' other name
    theirs = through_transformers(written, tmp_path)
    assert kind == "mistral" or theirs.num_local_experts == MixtralConfig.from_hf(written).num_local_experts == 4


def test_what_rope_scaling_hides_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"both rope_scaling and rope_parameters.* rope_theta 9\.0 of the second is not"
    ):
        MixtralConfig.from_hf({**RELEASED_8X7B, "rope_scaling": DEFAULT, "rope_parameters": {"rope_theta": 9.0}})
    with pytest.warns(UserWarning, match="rope type 'default' has no factor: ignored"):
        MixtralConfig.from_hf({**RELEASED_8X7B, "rope_scaling": {"factor": 4.0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "rotary settings by the type of layer"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM': a list was expected"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "architecture LlamaForCausalLM: supported are",
        ),
        ({"model_type": None, "architectures": None}, "architecture nothing"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope type 'dynamic'"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\) are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
    ],
)
def test_variants_that_would_compute_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtralConfig.from_hf({**RELEASED_8X7B, **change})


@pytest.mark.parametrize("change", [{"router_jitter_noise": 0.1}, {"sliding_window": 4096}])
def test_suspicious_settings_warn(change: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=next(iter(change))):
        MixtralConfig.from_hf({**RELEASED_8X7B, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 7}, "hidden_size .* is not a multiple|not a multiple of num_key_value_heads"),
        ({"num_key_value_heads": 5}, r"num_attention_heads \(32\) is not a multiple of num_key_value_heads \(5\)"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) is larger than num_local_experts \(8\)"),
        ({"head_dim": 127}, r"head_dim \(127\) is odd"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"hiden_size": 1}, "Extra inputs"),
    ],
)
def test_impossible_shapes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtralConfig.preset("mixtral-8x7b", **change)


def test_head_dim_follows_from_hidden_size_and_heads() -> None:
    shape = {**PRESETS["tiny"], "head_dim": 0}
    assert MixtralConfig(**shape).head_dim == 32
    with pytest.raises(ValueError, match=r"hidden_size \(192\) is not a multiple of num_attention_heads \(5\)"):
        MixtralConfig(**{**shape, "num_attention_heads": 5, "num_key_value_heads": 5})


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown model preset 'mixtral': known are tiny, mistral-7b, mixtral-8x7b"):
        MixtralConfig.preset("mixtral")


def test_configs_are_values() -> None:
    a, b = MixtralConfig.preset("tiny"), MixtralConfig.preset("tiny")
    assert a == b
    assert hash(a) == hash(b)
    with pytest.raises(ValidationError, match="frozen"):
        a.vocab_size = 3  # type: ignore[misc]  # that it cannot be assigned is what is tested
