"""Runs that train adapters: what is trained and saved, resuming, the base that they stand on."""

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.convert import load
from mixtral_jax.lora import is_adapter
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.base import base_warnings, base_weights, newest_step
from mixtral_jax.train.config.load import load_config, resolved_yaml
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.weights import abstract_params, is_trained, join, keep, leaves, trainable_table
from tests.tiny import TINY, write_run_file
from tests.tuning import write_tuning_file

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
    with pytest.raises(UserError, match=r"were trained on init_from .*base, which is now None"):
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


def test_a_base_that_computes_otherwise_is_named_but_for_rounding(start, tmp_path):
    base = str(tmp_path / "runs" / "base")

    def warned(**model):
        file = write_tuning_file(tmp_path, "sft", init_from=base, model=TINY | model)
        return base_warnings(load_config(file).config)

    assert warned() == [] == warned(rms_norm_eps=float(np.float32(1e-5)), max_position_embeddings=4096)
    found = warned(rope_theta=5e5, num_experts_per_tok=1, tie_word_embeddings=True)
    assert found == [
        "model.num_experts_per_tok is 1, but the weights of init_from were made with 2",
        "model.rope_theta is 500000.0, but the weights of init_from were made with 10000.0",
        "model.tie_word_embeddings is True, but the weights of init_from were made with False",
    ]


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
