"""A base that is held in few bits: read in that form from anywhere, trained on, resumed, and spoken with."""

import json
import shutil

import jax
import numpy as np
import pytest

from mixtral_jax import launch
from mixtral_jax.convert import load, save_hf
from mixtral_jax.lora import is_adapter
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.quantize import quantize
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.base import base_weights
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan.placement import memory_line
from mixtral_jax.train.weights import abstract_params, keep, leaves
from tests.tiny import metrics_of, write_run_file
from tests.tuning import write_tuning_file

# path -> the contracted axis of the weights
MATRICES = {"layers.attention.query": 1, "layers.attention.output": 2, "layers.moe.w13": 2, "layers.moe.w2": 2}


def lora(kind):
    return {"rank": 2, "alpha": 4.0, "base_dtype": kind, "base_block": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a base: a run of one step in runs/base, and the same in the Hugging Face format in hf."""
    place = tmp_path_factory.mktemp("held")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: None)
        config, provenance = load_config(write_run_file(place, steps=1, run_name="base", optimizer={"warmup_steps": 0}))
        assert loop.run(config, provenance) == 0
    save_hf(load(place / "runs" / "base" / "checkpoints" / "1"), place / "hf")
    return place


def config_of(place, kind, base="runs/base", **changes):
    return load_config(write_tuning_file(place, "sft", lora=lora(kind), init_from=str(place / base), **changes))


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2), dict(expert=2, tensor=2)], ids=["one", "fsdp", "experts"])
@pytest.mark.parametrize("base", ["runs/base", "hf"])
def test_a_base_is_read_in_the_form_in_which_it_is_held(place, base, sizes):
    wide = dict(leaves(base_weights(plain := config_of(place, "float32", base).config, abstract_params(plain, None))))
    mesh = None if sizes is None else make_mesh(MeshConfig(**{"data": -1, **sizes}))
    for kind in ("nf4", "int8"):
        config = config_of(place, kind, base).config
        abstract = keep(abstract_params(config, mesh), lambda path: not is_adapter(path))
        held, wanted = dict(leaves(base_weights(config, abstract))), dict(leaves(abstract))
        assert held.keys() == wanted.keys()
        for name, value in held.items():
            assert (value.shape, value.dtype, value.sharding) == (
                wanted[name].shape, wanted[name].dtype, wanted[name].sharding,
            ), name  # fmt: skip
        for path, axis in MATRICES.items():
            codes, scales = jax.jit(quantize, static_argnums=(1, 2, 3))(wide[path], axis, 4, kind)
            np.testing.assert_array_equal(np.asarray(held[f"{path}.codes"]), codes, err_msg=path)
            np.testing.assert_array_equal(np.asarray(held[f"{path}.scales"]), scales, err_msg=path)
        np.testing.assert_array_equal(held["layers.moe.router"], wide["layers.moe.router"])
        np.testing.assert_array_equal(held["embed.weight"], np.asarray(wide["embed.weight"]).astype("bfloat16"))


def test_bfloat16_is_a_cast(place):
    wide = dict(leaves(base_weights(plain := config_of(place, "float32").config, abstract_params(plain, None))))
    for base in ("runs/base", "hf"):
        config = config_of(place, "bfloat16", base).config
        for name, value in leaves(base_weights(config, abstract_params(config, None))):
            kind = "float32" if "norm" in name or "router" in name else "bfloat16"
            assert value.dtype == kind, name
            np.testing.assert_array_equal(np.asarray(value), np.asarray(wide[name]).astype(kind), err_msg=name)


@pytest.fixture
def start(monkeypatch, place, capsys):
    """Runs a tiny adapter run on the base; returns its training losses."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)

    def start(name, kind, **changes):
        options = {"log": {"every": 1}, "optimizer": {"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.01}}
        config, provenance = config_of(place, kind, run_name=name, **(options | changes))
        capsys.readouterr()
        assert loop.run(config, provenance) == 0
        return [line["train/loss"] for line in metrics_of(config.run_dir) if "train/loss" in line]

    return start


def test_a_run_learns_on_a_held_base_close_to_a_wide_one_and_resumes(start):
    wide = start("wide", "float32", steps=6)
    for kind, near in (("int8", 3e-3), ("nf4", 5e-2)):
        held = start(kind, kind, steps=6)
        assert held[-1] < held[0]
        np.testing.assert_allclose(held, wide, rtol=near)
        assert held != wide
    start("parts", "nf4", steps=3)
    assert start("parts", "nf4", steps=6) == held
    with pytest.raises(UserError, match=r"were trained on lora\.base_dtype nf4, which is now int8"):
        start("parts", "int8", steps=7)


def test_the_first_screen_counts_what_is_held(place):
    one = dict.fromkeys(("data", "fsdp", "expert", "tensor", "context"), 1)
    lines = {kind: memory_line(config_of(place, kind).config, one) for kind in ("float32", "bfloat16", "int8", "nf4")}
    config = config_of(place, "nf4").config
    abstract = dict(leaves(abstract_params(config, None)))
    frozen = sum(leaf.size * leaf.dtype.itemsize for name, leaf in abstract.items() if not is_adapter(name))
    adapters = sum(leaf.size for name, leaf in abstract.items() if is_adapter(name))
    assert f"frozen base (nf4) {frozen / 1024:.3g} KiB" in lines["nf4"]
    assert f"optimizer {8 * adapters / 1024:.3g} KiB" in lines["nf4"]
    assert len(set(lines.values())) == 4


def test_adapters_speak_through_their_base(start, place, capsys):
    start("chat", "nf4", steps=2)
    run = place / "runs" / "chat"
    options = ["--prompt", "the router", "--max-new-tokens", "4", "--temperature", "0", "--chat"]
    capsys.readouterr()
    assert launch.main(["generate", str(run), *options]) == 0
    said = capsys.readouterr().out
    assert launch.main(["generate", str(run / "checkpoints" / "2"), *options]) == 0
    assert capsys.readouterr().out == said
    file = write_tuning_file(place, "sft", eval={"batch_size": 8})
    assert launch.main(["eval", str(run), str(file), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["eval/loss"]
    logged = [line["eval/loss"] for line in metrics_of(run) if "eval/loss" in line][-1]
    assert measured == pytest.approx(logged, rel=1e-5)


def test_a_base_that_is_gone_is_one_sentence(start, place, capsys):
    shutil.copytree(place / "runs" / "base", place / "runs" / "other")
    options = {"init_from": str(place / "runs" / "other")}
    config, provenance = load_config(
        write_tuning_file(place, "sft", run_name="orphan", steps=1, lora=lora("float32"), **options)
    )
    assert loop.run(config, provenance) == 0
    shutil.rmtree(place / "runs" / "other")
    capsys.readouterr()
    assert launch.main(["generate", str(place / "runs" / "orphan"), "--prompt", "the"]) == 2
    assert "and their base, init_from" in (error := capsys.readouterr().err) and "is not there" in error
