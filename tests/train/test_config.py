"""The run configuration: presets, cross-field rules, round trip, provenance, JSON Schema."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.config import MixtralConfig
from mixtral_jax.train.config.load import (
    STAGES,
    SYNONYMS,
    check_vocabulary,
    json_schema,
    known_paths,
    load_config,
    resolved_yaml,
)
from mixtral_jax.train.config.tree import tree_from_text
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.optimizer import OptimizerConfig

TEXT = """\
stage: pretrain
run_name: small
steps: 100
seq_len: 64
global_batch_size: 16
model: {preset: tiny, vocab_size: 512}
optimizer: {learning_rate: 1e-3, warmup_steps: 10}
data:
  tokenizer: some/tokenizer.model
  train: [{name: en, path: data/en.jsonl.gz}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def problems(file: Path, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides, **options)
    return str(caught.value).splitlines()


def test_a_preset_is_expanded_and_can_be_changed(file: Path) -> None:
    config, provenance = load_config(file, ["model.rms_norm_eps=1e-6"])
    assert config.model == MixtralConfig.preset("tiny", vocab_size=512, rms_norm_eps=1e-6)
    assert type(config.model) is MixtralConfig
    assert provenance.origins["model.hidden_size"] == "preset tiny"
    assert provenance.origins["model.vocab_size"] == f"{file}:6"
    assert provenance.origins["model.rms_norm_eps"] == "override"
    assert provenance.origins["optimizer.b1"] == "default"
    assert provenance.text == TEXT


def test_every_field_may_stand_in_place_of_a_preset(file: Path) -> None:
    shape = MixtralConfig.preset("tiny", vocab_size=512).model_dump()
    text = "{" + ", ".join(f"{key}: {'null' if v is None else str(v).lower()}" for key, v in shape.items()) + "}"
    assert load_config(file, [f"model={text}"]).config == load_config(file).config
    assert problems(file, "model={vocab_size: 512}")[0].startswith("model.hidden_size: missing")


def test_the_resolved_file_reads_back_as_the_same_run(file: Path, tmp_path: Path) -> None:
    config, provenance = load_config(file, ["sample.prompts=['', 'Il était', 'no', '12:30']", "optimizer.eps=1e-17"])
    for text in (resolved_yaml(config), resolved_yaml(config, provenance)):
        again = tmp_path / "again.yaml"
        again.write_text(text)
        assert load_config(again).config == config
        assert resolved_yaml(load_config(again).config) == resolved_yaml(config)


def test_every_leaf_has_an_origin(file: Path) -> None:
    config, provenance = load_config(file, ["seed=3"])
    lines = resolved_yaml(config, provenance).splitlines()
    assert any(line.split("#")[1].strip() == "override" and line.startswith("seed: 3") for line in lines if "#" in line)
    assert all("# " in line for line in lines if not line.split("#")[0].rstrip().endswith(":"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["micro_batch_size=5"], "global_batch_size (16) is not a multiple of micro_batch_size (5): 15 would be"),
        (["micro_batch_size=32"], "global_batch_size (16) is not a multiple of micro_batch_size (32): 32 would be"),
        (
            ["mesh.fsdp=4", "mesh.expert=2", "micro_batch_size=4"],
            "micro_batch_size (4) is not a multiple of the 8 batch shards of mesh.data x mesh.fsdp x mesh.expert: "
            "8 would be",
        ),
        (["seq_len=8192"], "seq_len (8192) is larger than model.max_position_embeddings (4096)"),
        (["steps=10"], "optimizer.warmup_steps (10) is not smaller than steps (10)"),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_steps=95"],
            "optimizer.warmup_steps (10) and optimizer.decay_steps (95) are together longer than steps (100)",
        ),
        (["mesh.expert=16"], "mesh.expert (16) does not divide model.num_local_experts (8): 1, 2, 4, 8 would"),
        (["mesh.tensor=3"], "mesh.tensor (3) does not divide model.num_key_value_heads (2): 1, 2 would"),
        (["mesh.tensor=4"], "mesh.tensor (4) does not divide model.num_attention_heads (6): 1, 2, 3, 6 would"),
        (
            ["mesh.tensor=2", "model.intermediate_size=383"],
            "mesh.tensor (2) does not divide model.intermediate_size (383): 1 would",
        ),
        (
            ["mesh.fsdp=5", "mesh.expert=2"],
            "mesh.fsdp x mesh.expert (10) does not divide model.hidden_size (192): 1, 2, 3, 4, 6, 8, 12, 16 would",
        ),
        (
            ["mesh.context=3"],
            "mesh.context (3) cuts each row in 6 pieces, but seq_len (64) is not a multiple of 6: 60 or 66 would be",
        ),
        (
            ["mesh.context=64"],
            "mesh.context (64) cuts each row in 128 pieces, but seq_len (64) is not a multiple of 128: 128 would be",
        ),
        (
            ["mesh.fsdp=4", "eval.batch_size=6"],
            "eval.batch_size (6) is not a multiple of the 4 batch shards of mesh.data x mesh.fsdp x mesh.expert: "
            "8 would be",
        ),
        (["resume=200"], "resume (200) is no step between 0 and steps (100)"),
        (["model.preset=mixtral"], "unknown preset"),
        (["model.num_experts_per_tok=9"], "num_experts_per_tok (9) is larger than num_local_experts (8)"),
        (["model.num_attention_heads=5"], "num_attention_heads (5) is not a multiple of num_key_value_heads (2)"),
        (["steps=0"], "neither steps nor data.epochs says how long the run is: set one"),
        (["data.epochs=2"], "steps (100) and data.epochs (2) both say how long the run is: remove one"),
        (["mesh.data=0"], "mesh.data is 0"),
        (["learning_rate=1"], "unknown key; the nearest key is optimizer.learning_rate"),
        (["model.vocab=1"], "unknown key; the nearest key is model.vocab_size"),
        (["model.preste=tiny"], "unknown key; the nearest key is model.preset"),
        (["max_steps=3"], "unknown key; here that is steps"),
        (["run_name=a/b"], "must match pattern"),
        (["data.train.0.weigth=1"], "unknown key; the nearest key is data.train.0.weight"),
        (["steps=null"], "neither steps nor data.epochs says how long the run is: set one"),
        (["log.profile={start: 101}"], "log.profile.start (101) is past the last step (100): no step would be traced"),
        (["log.profile={}", "steps=8", "optimizer.warmup_steps=0"], "log.profile.start (10) is past the last step (8)"),
        ([f"run_name={'a' * 101}"], "is longer than 100 characters (101)"),
        ([f"run_name={'語' * 80}"], "is longer than 200 bytes"),
        (["run_name=.."], "must not start with a dot"),
    ],
)
def test_what_cannot_be_is_a_sentence_with_numbers_and_keys(file: Path, overrides: list[str], line: str) -> None:
    assert any(line in found for found in problems(file, *overrides))


def test_epochs_in_place_of_steps_as_the_message_says(file: Path) -> None:
    config = load_config(file, ["steps=null", "data.epochs=2"]).config
    assert (config.steps, config.data.epochs) == (0, 2)
    assert load_config(file, ["data.epochs=null"]).config.steps == 100
    assert load_config(file, ["log.profile={start: 100}", f"run_name={'a' * 100}"]).config.log.profile


def test_problems_across_fields_come_together(file: Path) -> None:
    assert len(problems(file, "micro_batch_size=5", "seq_len=8192", "steps=10", "mesh.context=3")) == 4


def test_the_wrong_command_names_the_right_one(file: Path) -> None:
    assert problems(file, command="sft") == [f"{file} is a pretrain file: run `pretrain {file}`, not `sft`"]
    assert "stage 'pretrian' is unknown" in problems(file, "stage=pretrian")[0]
    assert "did you mean pretrain?" in problems(file, "stage=pretrian")[0]
    assert "names no stage: write `stage: pretrain`" in problems(file, "stage=null", command="pretrain")[0]


def test_batch_arithmetic(file: Path) -> None:
    config = load_config(file, ["micro_batch_size=4"]).config
    assert (config.rows_per_micro_batch, config.accumulation, config.tokens_per_step) == (4, 4, 16 * 64)
    assert load_config(file).config.accumulation == 1
    assert config.run_dir == Path("runs/small")


def test_a_tokenizer_must_fit_the_vocabulary(file: Path) -> None:
    config = load_config(file).config
    check_vocabulary(config, 512)
    with pytest.raises(UserError, match=r"has 513 pieces and model\.vocab_size is 512: set model\.vocab_size"):
        check_vocabulary(config, 513)


@pytest.mark.parametrize("stage", STAGES)
def test_the_schema_knows_every_key_and_the_presets(stage: str) -> None:
    schema = json_schema(stage)
    assert schema["properties"].keys() == STAGES[stage].model_fields.keys()
    assert schema["additionalProperties"] is False
    assert "mixtral-8x7b" in schema["properties"]["model"]["anyOf"][0]["properties"]["preset"]["enum"]
    assert [kind["type"] for kind in schema["properties"]["steps"]["anyOf"]] == ["integer", "null"]
    assert "stage" in schema["required"] and "model" not in schema["required"]  # init_from may say the model


@pytest.mark.parametrize("stage", STAGES)
def test_synonyms_are_no_keys_of_ours_and_lead_to_some(stage: str) -> None:
    known = list(known_paths(STAGES[stage]))
    for theirs, ours in SYNONYMS.items():
        assert theirs not in known
        assert ours.split(",")[0].split(":")[0].split(" ")[0] in known


def test_the_text_above_is_yaml_that_tests_may_rely_on() -> None:
    assert tree_from_text(TEXT).values["stage"] == "pretrain"


# ---- from code


def test_a_file_with_changes_from_code(file: Path) -> None:
    config = mj.load_config(file, steps=20, optimizer={"b1": 0.8}, **{"data.train.0.weight": 2, "mesh.fsdp": 2})
    overrides = ["steps=20", "optimizer.b1=0.8", "data.train.0.weight=2", "mesh.fsdp=2"]
    assert config == load_config(file, overrides).config
    assert config.optimizer.warmup_steps == 10  # a dict changes what it names
    again = mj.load_config(config, steps=30, data={"epochs": None})
    assert again == config.model_copy(update={"steps": 30})


def test_a_preset_takes_the_place_of_the_whole_model(file: Path) -> None:
    for model in ({"preset": "tiny"}, MixtralConfig.preset("tiny")):
        assert mj.load_config(file, model=model).model == MixtralConfig.preset("tiny")
    assert mj.load_config(file, model={"num_hidden_layers": 2}).model.vocab_size == 512


def test_a_configuration_from_code_alone(file: Path) -> None:
    data = {"tokenizer": Path("some/tokenizer.model"), "train": ({"name": "en", "path": "data/en.jsonl.gz"},)}
    config = mj.load_config(
        stage="pretrain", run_name="small", steps=np.int64(100), seq_len=64, global_batch_size=16, data=data,
        model=MixtralConfig.preset("tiny", vocab_size=512),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
    )  # fmt: skip
    assert config == load_config(file).config


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"step": 3}, "step = 3 (argument): unknown key; the nearest key is steps"),
        ({"optimizer": {"learning_rat": 1}}, "optimizer.learning_rat = 1 (argument): unknown key; the nearest key is "),
        ({"steps": "10"}, 'steps = "10" (argument): must be a whole number, not text'),
        ({"steps.x": 1}, "steps is 100, which has no parts"),
        ({"stage": "sfd"}, "stage 'sfd' is unknown: known are pretrain, sft, dpo; did you mean sft?"),
        ({"micro_batch_size": 5}, "is not a multiple of micro_batch_size (5): 15 would be ["),
        ({"optimizer.max_grad_norm": math.inf}, "must be a finite number"),
    ],
)
def test_mistakes_in_code_are_said_as_on_the_command_line(file: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        mj.load_config(file, **changes)
    assert line in str(caught.value)


def test_code_without_a_stage() -> None:
    with pytest.raises(UserError, match=r"load_config\(\.\.\.\) names no stage: write `stage: pretrain`"):
        mj.load_config(steps=3)
