"""SFT on the step: packing changes nothing, masks are what the data say, runs learn answers."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.data.loader import Loader
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.objective import RouterConfig, next_token, token_sums
from mixtral_jax.train.objectives import OBJECTIVES
from mixtral_jax.train.optimizer import OptimizerConfig, make_optimizer
from mixtral_jax.train.run.masks import mask_lines
from mixtral_jax.train.state import create_state
from mixtral_jax.train.step import loss_and_gradients, make_train_step
from tests.tiny import metrics_of, split, tiny_config, tiny_model
from tests.tuning import write_tuning_file

ROOT = Path(__file__).resolve().parents[2]
OFF = RouterConfig(router_aux_loss_coef=0, router_z_loss_coef=0)


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Runs a tiny SFT run; returns its metrics and what it printed."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)

    def start(**changes):
        config, provenance = load_config(write_tuning_file(tmp_path, "sft", log={"every": 1}, **changes))
        capsys.readouterr()
        assert loop.run(config, provenance) == 0
        return metrics_of(config.run_dir), capsys.readouterr().out

    return start


def test_the_packed_loss_is_the_sum_of_the_unpacked_losses(tmp_path):
    data = load_config(write_tuning_file(tmp_path, "sft")).config.data
    loader = Loader(prepare(data, 64, 0), global_batch_size=4)
    rows = Batch(*(x[0] for x in next(loader)))
    loader.close()
    assert rows.segment_ids.max() > 1
    measure = jax.jit(lambda rows: token_sums(tiny_model(tiny_config()), rows)[0].nll)
    alone = []
    for b, segment in sorted({(b, s) for (b, _), s in np.ndenumerate(rows.segment_ids) if s}):
        own = np.flatnonzero(rows.segment_ids[b] == segment)
        fields = [np.zeros((4, 64), x.dtype) for x in rows]
        for field, x in zip(fields, rows, strict=True):
            field[0, : len(own)] = x[b, own]
        alone.append(float(measure(Batch(*fields)._replace(segment_ids=np.minimum(fields[3], 1)))))
    assert float(measure(rows)) == pytest.approx(sum(alone), rel=1e-5)


def test_only_answers_and_their_eos_have_a_weight(tmp_path):
    data = load_config(write_tuning_file(tmp_path, "sft")).config.data
    records = [json.loads(line) for line in (tmp_path / "sft-train.jsonl").read_text().splitlines()]
    prepared = prepare(data, 64, 0)
    loader = Loader(prepared, global_batch_size=4)
    total = sum(source.rows for source in prepared.train)
    batches = [next(loader) for _ in range(-(-total // 4))]
    loader.close()
    learned = sum(int((b.weights > 0).sum()) for b in batches)
    rows = sum(b.tokens.shape[1] for b in batches)
    answers = sum(len(r["completion"]) + 1 for r in records)  # a byte is a token; EOS is one more
    assert learned >= answers and (rows > total or learned == answers)


def test_noise_differs_from_step_to_step_and_not_from_run_to_run():
    config = tiny_config()
    params, merge = split(tiny_model(config))
    objective, rng = next_token(OFF, config, neftune=5.0), np.random.default_rng(0)
    tokens = rng.integers(0, 320, (2, 2, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = Batch(
        tokens, tokens, ones.astype(np.float32), ones, np.broadcast_to(np.arange(16, dtype=np.int32), ones.shape)
    )
    measure = jax.jit(lambda key: loss_and_gradients(objective, merge, params, None, batch, key)[0])
    first, again, other = (float(measure(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again != other
    assert first != float(jax.jit(lambda: loss_and_gradients(objective, merge, params, None, batch)[0])())


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_the_router_takes_its_own_share_of_the_learning_rate(factor):
    config = tiny_config()
    batch = Batch(*(np.ones((1, 2, 8), t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    moved = []
    for own in (1.0, factor):
        params, merge = split(tiny_model(config))
        optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 5, own)
        before = np.array(params["layers"]["moe"]["router"])
        step = make_train_step(next_token(RouterConfig(), config), optimizer, merge)
        state, _ = step(create_state(params, optimizer), None, batch)
        moved.append(np.array(state.params["layers"]["moe"]["router"]) - before)
    np.testing.assert_allclose(moved[1], factor * moved[0], rtol=2e-2, atol=1e-6)
    assert np.abs(moved[0]).max() > 1e-5


def test_a_run_learns_answers_and_says_what_is_learned(start):
    lines, out = start(steps=12, optimizer={"learning_rate": 0.01, "warmup_steps": 0})
    training = [line for line in lines if "train/loss" in line]
    assert training[-1]["train/ce_loss"] < training[0]["train/ce_loss"]
    assert 0 < training[-1]["train/entropy"] < training[0]["train/entropy"] < np.log(320)
    assert 0 < training[0]["train/learned_tokens"] < training[0]["train/tokens"]
    share = training[-1]["perf/trainable_tokens_per_second"] / training[-1]["perf/tokens_per_second"]
    assert 0 < share < 1
    evals = [line for line in lines if "eval/loss" in line]
    assert {"eval/answers/loss", "eval/answers/accuracy"} <= evals[-1].keys()
    assert not any("bits_per_byte" in key for key in evals[-1])  # of answers only: no text that it would be of
    assert "tokens are learned; the end of an answer is learned" in out
    assert "balance loss hf_pooled x 0.02" in out  # the checkpoint's own


def test_the_router_is_frozen_under_adapters_unless_asked(tmp_path):
    def router(**changes):
        return load_config(write_tuning_file(tmp_path, "sft", **changes)).config.router

    assert (router().update, router().router_aux_loss_coef) == ("train", 0.02)
    assert router(model={"router_aux_loss_coef": 0.001}).router_aux_loss_coef == 0.001
    assert (router(lora={"rank": 2}).update, router(lora={"rank": 2}).router_aux_loss_coef) == ("frozen", 0.0)
    assert router(lora={"rank": 2}, router={"update": 0.5}).factor == 0.5
    assert router(router={"router_aux_loss_coef": 0.3}).router_aux_loss_coef == 0.3


def test_everything_learned_is_refused_unless_asked_for(start, tmp_path):
    write_tuning_file(tmp_path, "sft")
    path = tmp_path / "all.jsonl"
    path.write_text('{"prompt": "", "completion": "the router"}\n' * 8)
    data = {"train": [{"name": "all", "path": str(path)}], "validation": []}
    with pytest.raises(UserError, match=r"source 'all': .* \(100 %\) are learned"):
        start(data=data)
    start(data=data, allow_any_mask=True, steps=1)


def test_chats_are_written_as_the_tokenizer_says_unless_the_file_says_otherwise(tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    shutil.copy(ROOT / "data" / "samples" / "tokenizer.model", directory)
    turns = "{{'<|' + m.role + '|>\n' + m.content + '</s>\n'}}"
    ask = "{% if add_generation_prompt %}{{'<|assistant|>\n'}}{% endif %}"
    (directory / "chat_template.jinja").write_text("{% for m in messages %}" + turns + "{% endfor %}" + ask)

    def said(path, template):
        data = {"tokenizer": str(path), "template": template}
        config = load_config(write_tuning_file(tmp_path, "sft", data=data)).config
        return next(mask_lines(config, (), load_tokenizer(path)))

    assert said(directory, None) == "chats are written as zephyr"
    assert said(directory, "v1") == "chats are written as v1; the tokenizer's own chat_template is zephyr"
    assert said(directory / "tokenizer.model", None) == "chats are written as v1"
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert said(directory, "v1").endswith("own chat_template is none that is known")
    with pytest.raises(ValueError, match="of no known format: name one of v1"):
        said(directory, None)


def test_documents_are_no_chats(tmp_path):
    with pytest.raises(UserError, match="stage sft reads chat"):
        load_config(write_tuning_file(tmp_path, "sft", data={"examples": "text"}))
    with pytest.raises(UserError, match="a factor must be above 0"):
        load_config(write_tuning_file(tmp_path, "sft", router={"update": -1.0}))
    assert set(OBJECTIVES) == {"pretrain", "sft", "dpo"}
