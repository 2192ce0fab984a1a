"""Runs that train adapters: what is trained and saved, resuming, the base that they stand on."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax import launch
from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.convert import load, lora2peft, merge_lora
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.base import (
    adapter_weights,
    base_weights,
    check_base_shape,
    newest_step,
    pin_base,
    stands_on_base,
)
from mixtral_jax.train.build import build
from mixtral_jax.train.config.load import load_config, resolved_yaml
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.read_model import noted_base, read_model
from mixtral_jax.train.weights import abstract_params, is_trained, join, keep, leaves, trainable_table
from tests.convert_files import TINY, load_params, random_tensors, write_hub
from tests.lora_models import adapted, write_native
from tests.tiny import write_run_file
from tests.tuning import write_tuning_file

HUB = TINY | {"vocab_size": 320, "rope_theta": 1e6}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1}


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Runs a tiny adapter run on a base that was pretrained one step; returns what it printed."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)
    pretrain, provenance = load_config(
        write_run_file(tmp_path, steps=1, run_name="base", optimizer={"warmup_steps": 0})
    )
    assert loop.run(pretrain, provenance) == 0

    def start(name, **changes):
        changes = {"lora": LORA, "init_from": str(tmp_path / "runs" / "base"), **changes}
        config, provenance = load_config(write_tuning_file(tmp_path, "sft", run_name=name, **changes))
        capsys.readouterr()
        assert loop.run(config, provenance) == 0
        return capsys.readouterr().out

    return start


def state_of(tmp_path, name, step):
    path = tmp_path / "runs" / name / "checkpoints" / str(step)
    shapes = checkpoint.tree_shapes(path)
    return path, shapes


def stored(tmp_path, name, step, config):
    path, _ = state_of(tmp_path, name, step)
    params = keep(abstract_params(config, None), is_trained(config))
    return dict(leaves(checkpoint.restore(path, {"params": params}, partial=True)["params"]))


def test_a_run_saves_adapters_only_resumes_bit_for_bit_and_stands_on_its_base(start, tmp_path):
    options = {"neftune_noise_alpha": 5.0, "optimizer": {"schedule": "constant", "warmup_steps": 0}}
    out = start("once", steps=4, **options)
    config = load_config(tmp_path / "run.yaml").config
    assert "parameters are trained" in out and "moe.w13" not in out and "moe.w1 (adapter)" in out
    assert "the router is frozen" in out and "balance loss hf_pooled x 0," in out
    _, shapes = state_of(tmp_path, "once", 4)
    names = [name.removeprefix("params.") for name in shapes if name.startswith("params.")]
    assert names and all(is_adapter(name) for name in names)
    start("parts", steps=2, **options)
    start("parts", steps=4, **options)
    parts, once = (stored(tmp_path, name, 4, config) for name in ("parts", "once"))
    for name, value in once.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
        assert np.any(np.asarray(value) != 0), name  # every B has moved away from 0
    trunk, base = str(tmp_path / "runs" / "parts"), str(tmp_path / "runs" / "base")
    start("fork", steps=4, init_from=None, resume_from=f"{trunk}@2", **options)
    for name, value in stored(tmp_path, "fork", 4, config).items():
        np.testing.assert_array_equal(once[name], value, err_msg=name)
    resolved = load_config(tmp_path / "runs" / "fork" / "config.yaml").config  # the base is the trunk's, and said
    assert (resolved.init_from, resolved.resume_from) == (base, None)
    out = start("fork", steps=5, init_from=None, resume_from=f"{trunk}@2", **options)
    assert "resuming from checkpoint 4 at row 16" in out and out.count("  changed ") == 1
    with pytest.raises(UserError, match=r"were trained on lora.rank 2, which is now 3"):
        start("other", steps=5, init_from=None, resume_from=trunk, lora=LORA | {"rank": 3})
    with pytest.raises(UserError, match=r"were trained on init_from .*base, which is now null"):
        start("parts", steps=5, init_from=None)
    for change, says in {
        "lora.rank 2, which is now 3": {"lora": LORA | {"rank": 3}},
        r"lora.alpha 4\.0, which is now 8\.0": {"lora": LORA | {"alpha": 8.0}},
        r"lora.targets \['attention": {"lora": LORA | {"targets": ["moe.w2"]}},
        "trained adapters, and lora now asks for the whole model": {"lora": None},
        r'router.*; changed since then: .*router\.update: "frozen" -> "train": set it back': {
            "router": {"update": "train"}
        },
    }.items():
        with pytest.raises(UserError, match=change):
            start("parts", steps=5, **says)
    with pytest.raises(UserError, match="holds adapters only: fold them into their base first"):
        start("above", init_from=str(tmp_path / "runs" / "once"))
    with pytest.raises(ValueError, match="holds the adapters of a LoRA run, no whole model"):
        load(tmp_path / "runs" / "once")


def test_a_run_goes_on_from_an_adapter(tmp_path, monkeypatch):
    """Ours or PEFT's: rank, alpha and targets are its own, or an error that names both; a router trained beside it."""
    base = write_hub(tmp_path / "hf", HUB, random_tensors(HUB))
    shape, lora = MixtralConfig.from_hf(HUB), LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "gate"))
    own = {k: v for k, v in adapted(shape, lora)[1].items() if is_adapter(k)}
    write_native(tmp_path / "native", shape, lora, own, str(base))
    lora2peft(tmp_path / "native", tmp_path / "peft", progress=False)

    def config_of(kind, **changes):
        changes = {"lora": {"init_from": str(tmp_path / kind), **changes}, "init_from": str(base), "model": None}
        file = write_tuning_file(tmp_path, "sft")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return load_config(file).config

    for kind in ("native", "peft"):
        config = config_of(kind, dropout=0.1)
        assert (config.lora.rank, config.lora.scale, config.lora.targets) == (2, 3.0, ("attention.query", "gate"))
        got = dict(leaves(adapter_weights(config, keep(abstract_params(config, None), is_trained(config)))))
        assert got.keys() == own.keys()
        for name, value in got.items():
            np.testing.assert_array_equal(value, own[name], err_msg=name)
    agreed = {}
    monkeypatch.setattr("mixtral_jax.train.build.agree", lambda **values: agreed.update(values))
    _, state = build(config, None, None, lambda line: None)
    assert re.fullmatch(r"step None with digest \w{24}", agreed["base"])  # every process has the same one
    for name, value in leaves(state.params):
        np.testing.assert_array_equal(value, own[name], err_msg=name)
    for changes, told in (
        ({"rank": 3}, "peft has rank 2, the run's is 3; alpha / rank 3, the run's is 2: set lora as the adapter is"),
        (
            {"targets": ["gate", "v_proj"]},
            r"has layers\.attention\.query_lora\.a, which the run does not train; .*no l",
        ),
    ):
        config = config_of("peft", **changes)
        with pytest.raises(UserError, match=told):
            adapter_weights(config, keep(abstract_params(config, None), is_trained(config)))
    with pytest.raises(UserError, match=r"lora\.init_from .*: rank and scale .* but .*nowhere does not exist"):
        config_of("nowhere")


def test_embedding_and_head_are_trained_whole_where_lora_says_so(tmp_path):
    """And saved beside the adapters, exported as PEFT's modules_to_save, and begun with again."""
    base = write_hub(tmp_path / "hf", HUB, random_tensors(HUB))
    lora = {"rank": 2, "targets": "q_proj", "modules_to_save": ["embed_tokens", "lm_head"], "base_dtype": "bfloat16"}
    changes = {"init_from": str(base), "model": MixtralConfig.from_hf(HUB).model_dump()}
    config = load_config(write_tuning_file(tmp_path, "sft", lora=lora, **changes)).config
    parts, state = build(config, None, None, lambda line: None)
    whole = {name: value for name, value in leaves(state.params) if not is_adapter(name)}
    assert {name: str(value.dtype) for name, value in whole.items()} == dict.fromkeys(config.lora.whole, "float32")
    np.testing.assert_array_equal(whole["embed.weight"], load_params(base)["embed"]["weight"])
    assert parts.merge(state.params).head.weight[...] is not None
    moved = jax.tree.map(lambda x: x + 0.5, state.params)
    meta = {"config": config.model_dump(mode="json"), "base": parts.base}
    checkpoint.save(tmp_path / "run", {"params": moved}, {"meta": meta, "dataset": {}})
    lora2peft(tmp_path / "run", tmp_path / "peft", progress=False)
    note = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert note["modules_to_save"] == ["embed_tokens", "lm_head"] and note["target_modules"] == ["q_proj"]
    for kind in ("run", "peft"):
        again = {"init_from": str(tmp_path / kind), "base_dtype": "bfloat16"}
        config = load_config(write_tuning_file(tmp_path, "sft", lora=again, **changes)).config
        _, state = build(config, None, None, lambda line: None)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.params, moved)), kind
    file = write_tuning_file(tmp_path, "dpo", lora=lora, dpo={"reference": "lora_base"}, **changes)
    with pytest.raises(UserError, match="modules_to_save trains of it: set reference: frozen"):
        load_config(file)
    assert load_config(file, ["dpo.reference=auto"]).config.reference == "frozen"


def test_a_base_that_moved_on_is_found_again_or_refused(start, tmp_path):
    """Whoever reads it: a resumed run, generate and eval, merge-lora. A copy elsewhere is the base as well."""
    start("run", steps=1)
    run, steps = tmp_path / "runs" / "run", tmp_path / "runs" / "base" / "checkpoints"
    config, noted = load_config(tmp_path / "run.yaml").config, checkpoint.read_item(run / "checkpoints" / "1", "meta")
    noted = noted["base"]
    assert (noted["path"], noted["step"]) == (str(steps / "1"), 1)
    moved = {"params": jax.tree.map(lambda x: jnp.asarray(1.1 * x), load_params(steps / "1"))}
    checkpoint.save(steps / "2", moved, {name: checkpoint.read_item(steps / "1", name) for name in ("meta", "dataset")})
    assert pin_base(config, noted)[0].init_from == str(steps / "1")
    before = np.asarray(read_model(str(run), compute=ComputeConfig()).layers.moe.w2[...])
    assert noted_base(str(run), config.init_from) == noted
    assert noted_base(str(run), "another") is None is noted_base(config.init_from, config.init_from)
    (steps / "1").rename(tmp_path / "copy")
    told = r"base/checkpoints/2 holds weights with digest \w+, .* those of \S+/1 at step 1 with digest"
    with pytest.raises(UserError, match=told):
        read_model(str(run), compute=ComputeConfig())
    with pytest.raises(UserError, match=told):
        start("run", steps=2)
    with pytest.raises(ValueError, match=r"base holds weights with digest"):
        merge_lora(tmp_path / "runs" / "base", tmp_path / "out", adapter=run, progress=False)
    start("run", steps=2, init_from=str(tmp_path / "copy"))
    assert checkpoint.read_item(run / "checkpoints" / "2", "meta")["base"] == noted | {"path": str(tmp_path / "copy")}
    after = read_model(str(run), compute=ComputeConfig()).layers.moe.w2[...]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("stage", "changes", "stands"),
    [("sft", {}, False), ("sft", {"lora": LORA}, True), ("dpo", {}, True),
     ("dpo", {"dpo": {"loss_type": "simpo"}}, False), ("dpo", {"dpo": {"reference": "precomputed"}}, True),
     ("dpo", {"lora": LORA}, True)],
)  # fmt: skip
def test_which_runs_read_their_base_again(tmp_path, stage, changes, stands):
    config = load_config(write_tuning_file(tmp_path, stage, init_from="somewhere", **changes)).config
    assert stands_on_base(config) == stands


def test_the_base_is_the_newest_step_of_the_run_that_init_from_names(start, tmp_path):
    file = write_tuning_file(tmp_path, "sft", lora=LORA, init_from=str(tmp_path / "runs" / "base"))
    config = load_config(file).config
    abstract = abstract_params(config, None)
    base = base_weights(config, abstract)
    (tmp_path / "runs/base/checkpoints/2/state").mkdir(parents=True)  # a save that was killed
    path = newest_step(config.init_from)
    assert path.endswith("base/checkpoints/1")
    (tmp_path / "runs/base/checkpoints").rename(tmp_path / "bucket")  # a run says where it keeps them
    with pytest.raises(UserError, match=r"base is a run, but none of its checkpoints in .* is whole"):
        newest_step(config.init_from)
    file = tmp_path / "runs/base/config.yaml"
    file.write_text(resolved_yaml(load_config(file, [f"checkpoint.directory={tmp_path / 'bucket'}"]).config))
    path = newest_step(config.init_from)
    assert path == str(tmp_path / "bucket" / "1")
    direct = checkpoint.restore(path, {"params": keep(abstract, lambda p: not is_adapter(p))}, partial=True)["params"]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), base, direct)))


def test_a_model_that_computes_otherwise_than_its_base_is_refused_but_for_rounding(tmp_path):
    base = str(write_hub(tmp_path / "hf", HUB, random_tensors(HUB)))

    def notes(**model):
        changes = {"init_from": base, "model": MixtralConfig.from_hf(HUB).model_dump() | model}
        return check_base_shape(load_config(write_tuning_file(tmp_path, "sft", **changes)).config)

    assert notes() == [] == notes(rms_norm_eps=float(np.float32(1e-5)), max_position_embeddings=4096)
    told = "model.router_aux_loss_coef is 0.5, that of init_from 0.001: the first is kept"
    assert notes(router_aux_loss_coef=0.5) == [told]
    with pytest.raises(UserError) as error:
        notes(rope_theta=5e5, num_experts_per_tok=1, tie_word_embeddings=True, vocab_size=640)
    for told in (
        "num_experts_per_tok is 1, there it is 2",
        "rope_theta is 500000.0, there it is 1000000.0",
        "tie_word_embeddings is True, there it is False",
        "vocab_size is 640, there it is 320",
        "set model to null",
    ):
        assert told in str(error.value)


def test_a_model_of_null_is_that_of_init_from(tmp_path, capsys):
    base = str(write_hub(tmp_path / "hf", HUB, random_tensors(HUB)))
    file = write_tuning_file(tmp_path, "sft", init_from=base)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": None}))
    config, provenance = load_config(file)
    assert config.model == MixtralConfig.from_hf(HUB) and provenance.origins["model.rope_theta"] == f"init_from {base}"
    assert config.router.router_aux_loss_coef == 0.001  # the checkpoint's own
    changed = load_config(file, ["model.rope_theta=7", "model.max_position_embeddings=99"]).config
    assert changed.model == config.model.model_copy(update={"rope_theta": 7.0, "max_position_embeddings": 99})
    assert launch.main(["sft", str(file), "model.rope_theta=7", "--dry-run"]) == 2
    assert "model.rope_theta is 7.0, there it is 1000000.0" in capsys.readouterr().err
    run = tmp_path / "runs" / "made"  # by its own file, wherever its checkpoints are
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(resolved_yaml(changed))
    assert load_config(file, [f"init_from={run}"]).config.model == changed.model
    for overrides, says in {
        "init_from=null": r"model .*: null takes the shape from init_from, which names no checkpoint",
        f"init_from={tmp_path / 'no'}": r"model .*: its shape was to be that of init_from, but .*no does not exist",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            load_config(file, [overrides, "steps=-1"])
        assert len(str(error.value).splitlines()) == 2


def test_split_and_join_are_inverse_and_the_table_counts_what_is_trained(tmp_path):
    config = load_config(write_tuning_file(tmp_path, "sft", lora={"rank": 2}, router={"update": 0.5})).config
    abstract, trained = abstract_params(config, None), is_trained(config)
    params, frozen = keep(abstract, trained), keep(abstract, lambda path: not trained(path))
    assert dict(leaves(join(params, frozen))) == dict(leaves(abstract))
    names = [name for name, _ in leaves(params)]
    assert "layers.moe.router" in names and all(is_adapter(n) or n == "layers.moe.router" for n in names)
    head, *rows = trainable_table(config, abstract)
    count = sum(leaf.size for _, leaf in leaves(params))
    assert head.startswith(f"{count:,} of ") and "rank 2, scale 16" in head
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows) == count
    whole = load_config(write_tuning_file(tmp_path, "sft", router={"update": "frozen"})).config
    head, *rows = trainable_table(whole, abstract_params(whole, None))
    assert "the router is frozen" in head and not rows


def test_a_router_that_moves_by_its_adapter_keeps_the_balance_loss_of_the_checkpoint(make_tuning_config):
    """However `targets` name it; only a router that stays as it is needs none."""
    own = MixtralConfig.model_fields["router_aux_loss_coef"].default
    for targets, update, coefficient, told in (
        (["all-linear"], None, own, "; the router moves by its adapter alone"),
        ("gate", "frozen", own, "; the router moves by its adapter alone"),
        (["q_proj", "gate"], 0.5, own, ""),
        (["q_proj"], None, 0, "; the router is frozen"),
        (None, None, 0, "; the router is frozen"),
    ):
        lora = {"rank": 2} | ({} if targets is None else {"targets": targets})
        config = make_tuning_config("sft", lora=lora, router={"update": update})
        assert config.router.router_aux_loss_coef == coefficient, targets
        head = trainable_table(config, abstract_params(config, None))[0]
        assert head.endswith("rank 2, scale 16" + told), targets
