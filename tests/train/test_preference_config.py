"""The settings of stage dpo: what is refused, and what is resolved."""

import pytest
from pydantic import ValidationError

from mixtral_jax.train.build import reference_line
from mixtral_jax.train.preference.config import DpoConfig

REFUSED_CONFIGS = [
    ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
    ({"loss_type": "robust", "label_smoothing": 0.6}, "robust needs label_smoothing"),
    ({"loss_type": ["sigmoid", "aot"], "f_divergence": "js"}, "not for aot"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1, but nothing reads it"),
    ({"gamma": 1.0}, "gamma is 1.0, but nothing reads it with loss_type sigmoid"),
    ({"f_alpha": 0.3}, "f_alpha is 0.3, but nothing reads it"),
    ({"loss_type": "simpo", "reference": "frozen"}, "reference is frozen, but loss_type simpo reads none"),
    ({"reference": "none", "f_divergence": "js"}, "distance to a reference, which is none"),
    ({"beta": 0}, "greater than 0"),
    ({"ld_alpha": 1.5}, "less than or equal to 1"),
    ({"loss_type": []}, "at least 1 item"),
    ({"loss_type": "sigmoid", "loss_weights": [1, 2]}, "loss_weights has 2 numbers for 1 loss types"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED_CONFIGS)
def test_refused_configurations(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        DpoConfig(**fields)


def test_configuration_survives_a_round_trip_and_resolves_the_reference():
    config = DpoConfig(loss_type=["exo_pair", "sft"], label_smoothing=1e-3, loss_weights=[1, 0.2])
    assert DpoConfig(**config.model_dump(mode="json")) == config
    assert config.resolve_reference(lora=False) == "frozen"
    assert config.resolve_reference(lora=True) == "lora_base"
    assert DpoConfig(loss_type="orpo").resolve_reference(lora=True) == "none"
    assert DpoConfig(reference="precomputed").resolve_reference(lora=False) == "precomputed"
    with pytest.raises(ValueError, match="reference is lora_base, but the run has no LoRA"):
        DpoConfig(reference="lora_base").resolve_reference(lora=False)


def test_schema_takes_one_loss_type_or_a_list():
    kinds = [option.get("type") for option in DpoConfig.model_json_schema()["properties"]["loss_type"]["anyOf"]]
    assert kinds == ["string", "array"]


def test_aot_refuses_accumulation_unless_asked():
    with pytest.raises(ValueError, match="aot_unpaired sorts the whole batch, but a step has 2 micro-batches"):
        DpoConfig(loss_type="aot_unpaired").check_accumulation(2)
    DpoConfig(loss_type="aot").check_accumulation(1)
    DpoConfig(loss_type="aot", aot_per_micro_batch=True).check_accumulation(2)
    DpoConfig().check_accumulation(8)


def test_a_reference_that_the_policy_does_not_begin_as_is_said(make_tuning_config):
    lora = {"rank": 2, "alpha": 4.0, "rslora": False, "targets": ["q_proj"], "modules_to_save": []}
    for begun, dpo, told in (
        (None, {}, "lora_base"),
        ("adapter", {}, "lora_base: without the adapter adapter, so the policy differs from it at step 0"),
        ("adapter", {"reference": "frozen"}, "frozen: without the adapter adapter, so the policy differs from it at "),
        ("adapter", {"loss_type": "simpo"}, "none"),
    ):
        line = reference_line(make_tuning_config("dpo", lora=lora | {"init_from": begun}, dpo=dpo))
        assert line.startswith(told) and (":" in line) == (":" in told)
