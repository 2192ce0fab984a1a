"""Which weights a run stands on: near or far, moved, swapped, gone, or of another shape."""

import json
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from mixtral_jax import checkpoint
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import load_config as load_shape
from mixtral_jax.convert import newest_step as newest_whole_step
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.parallel import MESH_AXES
from mixtral_jax.train import base as room
from mixtral_jax.train import read_model
from mixtral_jax.train.base import adapter_weights, check_base, check_base_shape, newest_step, pin_base
from mixtral_jax.train.config import load_config, resolved_yaml
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run.check import check, check_place
from mixtral_jax.train.run.resume import check_same_base
from mixtral_jax.train.weights import abstract_params, is_trained, keep
from tests.convert_files import TINY, random_tensors, write_hub
from tests.lora_models import adapted, write_native
from tests.tiny import TINY as TINY_SHAPE
from tests.tiny import write_run_file
from tests.tuning import write_tuning_file

HUB = TINY | {"vocab_size": 320, "rope_theta": 1e6}
LORA = {"rank": 2, "targets": ["q_proj"]}


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A directory that passes for another machine's."""
    there = tmp_path / "far"
    monkeypatch.setattr(room, "is_remote", lambda path: "://" in str(path) or str(path).startswith(str(there)))
    return there


def test_best_is_the_step_that_it_stands_for(tmp_path):
    steps, elsewhere = tmp_path / "checkpoints", tmp_path / "mine"
    for item in ("state", "meta"):
        (steps / "4" / item).mkdir(parents=True)
    (steps / "best").symlink_to("4")
    elsewhere.symlink_to(steps / "4")
    assert newest_step(str(steps / "best")) == newest_step(str(elsewhere)) == str(steps / "4")


def test_the_front_door_finds_a_runs_checkpoints_where_its_file_says(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "kept"
    for place, step in ((run / "checkpoints", 1), (kept, 7)):
        (place / str(step)).mkdir(parents=True)
        (place / str(step) / checkpoint.COMMIT).touch()
    assert newest_whole_step(run) == run / "checkpoints" / "1"
    (run / "config.yaml").write_text(f"checkpoint:\n  directory: {kept}\n")
    assert newest_whole_step(run) == kept / "7"  # not an older one that was left behind
    for text in (f"checkpoint: {kept}", "checkpoint: {directory: [a]}", "- a", "checkpoint: {directory: gone}", "\t:"):
        (run / "config.yaml").write_text(text)  # of others, or a run that was moved
        assert newest_whole_step(run) == run / "checkpoints" / "1"
    (run / "config.json").touch()  # a model directory, with a config.yaml of others
    assert newest_whole_step(run) == run / "checkpoints" / "1"


def tuned(tmp_path, stage="sft", **changes):
    return load_config(write_tuning_file(tmp_path, stage, **({"lora": LORA} | changes))).config


def test_adapters_with_all_defaults_are_adapters_and_those_of_nothing_are_refused(tmp_path):
    empty, named = tuned(tmp_path, "dpo", lora={}), tuned(tmp_path, "dpo", lora={"rank": 16})
    assert (empty.router, empty.reference) == (named.router, named.reference)
    assert empty.reference == "lora_base" and empty.router.update == "frozen"
    for lora, model in (
        ({"targets": []}, {}),
        ({"targets": "gate"}, {"num_local_experts": 1, "num_experts_per_tok": 1}),
    ):
        config = tuned(tmp_path, lora=lora, model={**TINY_SHAPE, **model})
        with pytest.raises(UserError, match=r"lora trains nothing: lora\.targets names no matrix"):
            check(config, dict.fromkeys(MESH_AXES, 1), resumes=False)


def test_what_would_never_happen_is_refused_where_a_run_starts_and_read_behind_it(tmp_path):
    never = {"on_nonfinite": "rollback", "checkpoint": {"every": None}}
    config = load_config(write_run_file(tmp_path, sample={"every": 5}, **never)).config
    with pytest.raises(UserError, match=r"nothing to go back to\nsample\.every is set, but sample\.prompts is empty"):
        check(config, dict.fromkeys(MESH_AXES, 1), resumes=False)
    early = {"early_stopping": {"patience": 3}, "eval": {"every": 2}}
    check(load_config(write_run_file(tmp_path, **never, **early)).config, dict.fromkeys(MESH_AXES, 1), resumes=False)


def save_step(path, model):
    meta = {"config": {"model": model}}
    checkpoint.save(path, {"params": {"x": np.zeros(2)}}, {"meta": meta, "dataset": {}})


def test_a_base_that_is_far_away_is_known_by_its_path(tmp_path, far):
    near = [str(write_hub(tmp_path / name, HUB, random_tensors(HUB))) for name in ("one", "two")]
    for stage, changes in (("sft", {}), ("dpo", {"lora": None})):
        config = tuned(tmp_path, stage, init_from=str(far / "a"), **changes)
        at = lambda path, config=config: config.model_copy(update={"init_from": str(path)})  # noqa: E731 - short
        started, noted = pin_base(config, None)
        assert (started, noted) == (config, {"path": str(far / "a"), "step": None, "digest": None})
        assert pin_base(config, noted) == (config, noted)
        local = pin_base(at(near[0]), None)[1]
        assert pin_base(at(near[1]), local) == (at(near[1]), local | {"path": near[1]})  # a copy, noted where it is
        for before, path in ((noted, far / "b"), (noted, near[0]), (local, far / "a")):
            with pytest.raises(UserError, match=f"init_from: {path} .* not on this machine.* {before['path']}"):
                found = SimpleNamespace(step=1, meta={"config": config.model_dump(mode="json"), "base": before})
                check_same_base(found, at(path))  # it leaves that to what knows the place
                pin_base(at(path), before)


def test_a_reference_of_another_base_is_refused_where_the_run_goes_on(tmp_path):
    before = tuned(tmp_path, "dpo", lora=None, init_from="base", dpo={"reference": "frozen"})
    noted = {"step": None, "digest": "abc", "path": "base"}
    found = SimpleNamespace(name="checkpoint 1", meta={"config": before.model_dump(mode="json"), "base": noted})
    check_same_base(found, before)
    with pytest.raises(UserError, match="the reference of checkpoint 1 is made of init_from base, which is now null"):
        check_same_base(found, before.model_copy(update={"init_from": None}))
    random = before.model_copy(update={"init_from": None, "seed": 3})
    found.meta = {"config": random.model_dump(mode="json"), "base": None}
    with pytest.raises(UserError, match="is made of seed 3, which is now 4"):
        check_same_base(found, random.model_copy(update={"seed": 4}))
    sft = tuned(tmp_path, lora=None, init_from="base")
    found.meta = {"config": sft.model_dump(mode="json"), "base": None}
    check_same_base(found, sft.model_copy(update={"init_from": None}))  # which it began with, and needs no more


def test_a_dpo_run_that_goes_on_from_another_is_evaluated_beside_that_ones_base(tmp_path, monkeypatch):
    config, trunk = tuned(tmp_path, "dpo", lora=None, resume_from="runs/trunk@2"), {"run": "runs/trunk"}
    notes = {
        "runs/fork": {
            "resumed_from": trunk,
            "base": 1,
            "config": {"stage": "dpo", "init_from": "base"},
        },
        "runs/sft": {"resumed_from": trunk, "config": {"stage": "sft", "init_from": None}},
        "runs/far": {"resumed_from": {"run": "runs/elsewhere"}, "config": {"stage": "dpo", "init_from": "another"}},
        "runs/trunk": {"config": {"init_from": "base"}, "base": 1},
        "runs/other": {"config": {"init_from": "another"}},
        "hf": {},
    }
    monkeypatch.setattr(read_model, "newest_step", lambda path: path)
    monkeypatch.setattr(read_model, "_notes", notes.get)
    for place in notes:
        based, noted = read_model.with_base(config, place)
        assert (based.init_from, based.resume_from, noted) == ("base", None, 1)
    plain = tuned(tmp_path, "dpo", lora=None, init_from="base")
    assert read_model.with_base(plain, "runs/fork") == (plain, 1)
    del notes["runs/trunk"]
    monkeypatch.setattr(read_model, "_notes", lambda path: notes.get(path, {}))
    assert read_model.with_base(config, "runs/fork")[0].init_from == "base"
    with pytest.raises(UserError, match="runs/trunk is not there to say which base it stands on"):
        read_model.with_base(config, "hf")


def test_the_step_of_a_run_that_keeps_its_checkpoints_far_away_stays_the_base(tmp_path, far):
    file = write_run_file(tmp_path, run_name="base", checkpoint={"directory": str(far)})
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "runs" / "base" / "config.yaml").write_text(resolved_yaml(load_config(file).config))
    config = tuned(tmp_path, init_from=str(tmp_path / "runs" / "base"))
    save_step(far / "1", config.model.model_dump())
    started, noted = pin_base(config, None)
    assert started.init_from == noted["path"] == str(far / "1") and noted["step"] == 1
    save_step(far / "2", config.model.model_dump())
    assert pin_base(config, noted) == (started, noted)
    (far / "1").rename(far / "copy")
    assert pin_base(tuned(tmp_path, init_from=str(far / "copy")), None)[1]["step"] is None
    with pytest.raises(UserError, match=r"far/2 .* not on this machine"):
        pin_base(config, noted)


def test_a_digest_of_an_earlier_version_is_noted_anew(tmp_path):
    """It was kept for ever, and the base was never compared again."""
    config = tuned(tmp_path, init_from=str(write_hub(tmp_path / "hf", HUB, random_tensors(HUB))))
    noted = pin_base(config, None)[1]
    assert pin_base(config, noted | {"digest": "0123456789abcdef01234567"})[1] == noted


@pytest.mark.parametrize(
    "kind", ["hub far away", "model directory", "model directory far away", "step", "step far away"]
)
def test_the_shape_of_a_base_is_compared_wherever_it_is(tmp_path, far, kind):
    """No weight is read: what it says of itself is enough."""
    shape, place = MixtralConfig.from_hf(HUB), (far if "far" in kind else tmp_path) / "1"
    where = str(place)
    if "step" in kind:
        save_step(place, shape.model_dump())
    elif "far" in kind:
        where = f"memory://base-{tmp_path.name}"
        fsspec.filesystem("memory").pipe(f"{where}/config.json", json.dumps(HUB).encode())
        fsspec.filesystem("memory").pipe(f"{where}/params/x" if "model" in kind else f"{where}/model.safetensors", b"x")
    else:
        (place / "params").mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(HUB))
    assert load_shape(where) == shape
    assert check_base_shape(tuned(tmp_path, init_from=where, model=shape.model_dump())) == []
    with pytest.raises(UserError, match=r"model\.rope_theta is 10000\.0, there it is 1000000\.0"):
        check_base_shape(tuned(tmp_path, init_from=where, model=shape.model_dump() | {"rope_theta": 1e4}))
    file = write_tuning_file(tmp_path, "sft", init_from=where)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": None}))
    assert load_config(file).config.model == shape


def test_an_adapter_with_other_rows_than_the_model_is_refused(tmp_path):
    shape = MixtralConfig.from_hf(HUB)
    lora = LoraConfig(rank=2, targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    longer = shape.model_copy(update={"vocab_size": 330})
    whole = {k: v for k, v in adapted(longer, lora)[1].items() if is_adapter(k) or k in lora.whole}
    write_native(tmp_path / "adapter", longer, lora, whole, "base")
    config = tuned(tmp_path, model=shape.model_dump(), lora={"init_from": str(tmp_path / "adapter")})
    told = r"embed\.weight of shape \(330, 64\), the run's is \(320, 64\)".replace("64", str(shape.hidden_size))
    with pytest.raises(UserError, match=told + ".*resize-vocab"):
        adapter_weights(config, keep(abstract_params(config, None), is_trained(config)))
    with pytest.raises(UserError, match=told):
        check_base(config, resumes=False)
    assert check_base(config, resumes=True) == []  # a run that goes on has its own


def test_a_run_that_goes_on_needs_no_file_that_it_has_read(tmp_path):
    """Neither the base whose shape `model: null` took nor the adapter that gave rank and scale."""
    shape, lora = MixtralConfig.from_hf(HUB), LoraConfig(rank=3, alpha=6.0, targets=("q_proj",))
    base = write_hub(tmp_path / "hf", HUB, random_tensors(HUB))
    own = {k: v for k, v in adapted(shape, lora)[1].items() if is_adapter(k)}
    write_native(tmp_path / "adapter", shape, lora, own, str(base))
    file = write_tuning_file(tmp_path, "sft", init_from=str(base), lora={"init_from": str(tmp_path / "adapter")})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": None}))
    config = load_config(file).config
    for path in ("hf", "adapter"):
        (tmp_path / path).rename(tmp_path / f"gone-{path}")
    with pytest.raises(UserError, match="hf does not exist"):
        load_config(file)
    kept = Path(config.run_dir) / "config.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text(resolved_yaml(config))
    again, provenance = load_config(file)
    assert again == config
    assert provenance.origins["model.rope_theta"] == provenance.origins["lora.rank"] == str(kept)
    for key in ("init_from", "lora.init_from"):  # it began with something else
        with pytest.raises(UserError, match="elsewhere does not exist"):
            load_config(file, [f"{key}={tmp_path / 'elsewhere'}"])


def test_a_bucket_that_tensorflow_reads_needs_no_other_library(monkeypatch):
    """It was refused where gcsfs is not installed, though checkpoints go by TensorFlow where that is."""

    def missing(*args):
        raise ImportError("Please install gcsfs")

    asked = []
    gone = SimpleNamespace(exists=lambda: False)
    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    monkeypatch.setattr(room, "epath", SimpleNamespace(Path=lambda path: asked.append(path) or gone))
    monkeypatch.setattr(room, "find_spec", lambda name: name == "tensorflow" or None, raising=False)
    check_place("checkpoint.directory", "gs://bucket/checkpoints")
    with pytest.raises(UserError, match="init_from: s3://bucket/model does not exist"):
        room.check_base(SimpleNamespace(init_from="s3://bucket/model"), resumes=False)
    with pytest.raises(UserError, match="cannot be read: Please install gcsfs"):
        check_place("checkpoint.directory", "az://bucket/checkpoints")
    assert asked == ["s3://bucket/model"]
