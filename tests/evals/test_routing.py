"""What the routers do with text, beside a count of one token at a time."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mixtral_jax import launch
from mixtral_jax.config import ComputeConfig, MoeConfig
from mixtral_jax.convert import save_hf
from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.parallel import MeshConfig, make_mesh
from mixtral_jax.train.commands import routing as command
from mixtral_jax.train.evals.routing import Options, measure
from mixtral_jax.train.evals.routing.pieces import pieces
from mixtral_jax.train.evals.routing.tally import Spread, meeting
from mixtral_jax.train.evals.routing.together import pairs_ratio
from tests.oracles import routing as twin
from tests.tiny import WORDS, tiny_config, tiny_model, write_byte_tokenizer

SEQ_LEN, ROWS = 16, 8
CASES = {"2 of 4": (4, 2), "1 of 3": (3, 1), "4 of 16": (16, 4)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_byte_tokenizer(path)
    return load_tokenizer(path)


def documents(tokenizer, seed=0):
    """Domains of several documents, one that is not a whole batch; and one that is a single document."""
    rng = np.random.default_rng(seed)

    def document(length):
        text = " ".join(rng.choice(WORDS, length))
        return np.array([tokenizer.bos_id, *tokenizer.encode(text)[:length], tokenizer.eos_id])

    lengths = {"many": (5, 40, 1, 16, 70, 12), "one": (30,)}
    return {name: [document(n) for n in own] for name, own in lengths.items()}


def model_of(case, seed=0):
    experts, top_k = CASES[case]
    return tiny_model(tiny_config(num_local_experts=experts, num_experts_per_tok=top_k), seed)


def measured(models, tokenizer, layers=(0, 1), mesh=None, factor=1.1):
    options = Options(layers, SEQ_LEN, ROWS, factor, "probability")
    names = [f"model {i}" for i in range(len(models))]
    return measure(
        models, documents(tokenizer), tokenizer, options, names=names, asked=1, own_capacity=False, mesh=mesh
    )


@pytest.mark.parametrize("case", CASES)
def test_all_numbers_are_those_of_a_count_by_hand(case, tokenizer):
    experts, top_k = CASES[case]
    models = [model_of(case, seed) for seed in (0, 1)]
    result = json.loads(json.dumps(measured(models, tokenizer).to_json(), allow_nan=False))
    every, every_before = [], []
    for found, own in zip(result["domains"], documents(tokenizer).values(), strict=True):
        now, before = (twin.pieces(own, SEQ_LEN, model) for model in models)
        check_domain(found, now, before, experts)
        shift = every[-1].document + 1 if every else 0
        every += [p._replace(document=p.document + shift) for p in now]
        every_before += before
    del result["all"]["dropped"]  # batches are of one domain
    check_domain(result["all"], every, every_before, experts)
    together, paths = twin.pairs_and_paths(every, 2, experts)
    assert result["together"] == together.tolist() and result["paths"] == paths.tolist()
    expected = paths.sum(2, keepdims=True) * paths.sum(1, keepdims=True) / paths[0].sum()
    np.testing.assert_allclose(np.nan_to_num(np.array(result["paths_ratio"], float)) * expected, paths, rtol=1e-5)
    for layer in range(2):
        wanted = twin.likings(every, layer, experts)
        for e, likings in enumerate(result["likings"][layer]):
            own = sorted((lift for (expert, _), (*_, lift) in wanted.items() if expert == e), reverse=True)[:12]
            np.testing.assert_allclose([each["lift"] for each in likings], own, rtol=1e-5)
            for each in likings:
                assert wanted[e, each["id"]][:2] == (each["count"], each["total"])
    assert result["chance_first"] == pytest.approx(1 / experts, abs=1e-6)
    assert result["chance_any"] == pytest.approx(twin.meets(experts, top_k), abs=1e-6)


def check_domain(found, now, before, experts):
    assert found["tokens"] == sum(len(p.ids) for p in now)
    assert found["documents"] == now[-1].document + 1
    for layer in range(2):
        wanted = twin.domain(now, layer, experts)
        if "dropped" in found:
            wanted["dropped"] = twin.dropped(now, layer, experts, 1.1, SEQ_LEN * ROWS, "probability")
        for name, value in wanted.items():
            own = np.array(found[name][layer], float)  # null is NaN
            np.testing.assert_allclose(own, value, rtol=1e-4, atol=2e-6, err_msg=name)
        for name, value in twin.changed(now, before, layer, experts).items():
            np.testing.assert_allclose(found["changed"][name][layer], value, rtol=1e-4, atol=1e-6)


def test_a_mesh_counts_the_same(tokenizer):
    alone = measured([model_of("2 of 4")], tokenizer)
    mesh = make_mesh(MeshConfig(data=2, expert=2, context=2))
    with jax.set_mesh(mesh):
        spread = measured([model_of("2 of 4")], tokenizer, mesh=mesh)
    for name in ("together_LEE", "paths_LEE"):
        np.testing.assert_array_equal(getattr(spread, name), getattr(alone, name))
    for name in ("share_LCE", "repeat_any_L", "dropped_L"):
        np.testing.assert_array_equal(getattr(spread.all, name), getattr(alone.all, name))
    np.testing.assert_allclose(spread.all.entropy_L, alone.all.entropy_L, rtol=1e-5)


def test_a_mesh_of_another_machine_gives_way_to_this_one_unless_it_is_named(capsys):
    config = SimpleNamespace(mesh=MeshConfig(fsdp=16))
    assert command._mesh(config, named=False).shape["data"] == 8
    assert "note: the run's mesh: 8 devices are not a multiple of 16" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a multiple of 16"):
        command._mesh(config, named=True)


def test_some_layers_alone(tokenizer):
    model = model_of("2 of 4")
    whole, some = measured([model], tokenizer), measured([model], tokenizer, (1,))
    np.testing.assert_array_equal(some.all.share_LCE, whole.all.share_LCE[1:])
    assert some.layers == (1,) and some.likings == whole.likings[1:]
    assert some.paths_LEE.shape == (0, 4, 4) and some.texts[0].expert_LNC.shape[0] == 1


def test_pairs_are_compared_with_what_loads_alone_give():
    rng = np.random.default_rng(0)
    loads = np.array([0.9, 0.5, 0.3, 0.2, 0.1, 0.0])
    odds = np.outer(loads, loads) * ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(pairs_ratio(odds[None])[0][:5, :5][~np.eye(5, dtype=bool)], 1, rtol=1e-6)
    assert np.isnan(pairs_ratio(odds[None])[0, 5]).all() and np.isnan(pairs_ratio(odds[None])[0].diagonal()).all()
    observed = rng.integers(1, 50, (6, 6))
    observed = np.triu(observed, 1) + np.triu(observed, 1).T
    expected = observed / pairs_ratio(observed[None])[0]
    np.testing.assert_allclose(np.nansum(expected, axis=1), observed.sum(1), rtol=1e-6)


def test_copies_of_one_expert_are_noted(tokenizer):
    model = model_of("2 of 4")
    assert measured([model], tokenizer).notes == ()
    for name in ("w13", "w2"):
        leaf = getattr(model.layers.moe, name)
        leaf[...] = leaf[...] * 0 + leaf[...][:, :1]
    (note,) = measured([model], tokenizer).notes
    assert note.startswith("The experts of 2 of 2 layers are copies of one another")


def test_pieces_join_to_the_text(root, tokenizer):
    text = "Für 3 €\n\tnaïve 日本語 🙂 </script>\n"
    for each in (tokenizer, load_tokenizer(root / "data" / "samples" / "tokenizer.model")):
        ids = [each.bos_id, *each.encode(text), each.eos_id, *each.encode(text)[:-1]]
        shown, control = pieces(each, ids)
        ends = [i for i, id_ in enumerate(ids) if id_ in (each.bos_id, each.eos_id)]
        assert list(control) == ends and [shown[i] for i in ends] == ["<s>", "</s>"]
        assert "".join(shown[1 : ends[1]]) == text
        assert "\ufffd" not in "".join(shown)


def test_documents_without_anything_to_count_do_not_narrow_a_band():
    counts, sizes = np.array([[3, 7], [4, 2], [0, 0]]), np.array([10, 6, 0])
    np.testing.assert_array_equal(Spread.of(counts, sizes).band(), Spread.of(counts[:2], sizes[:2]).band())
    assert np.isnan(Spread.of(counts[1:], sizes[1:]).band()).all()


def test_a_tokenizer_that_is_named_is_that_of_both(saved, capsys):
    data = ["--data", f"few={saved / 'short.txt'}", "--out", str(saved / "both")]
    tokenizer = ["--tokenizer", str(saved / "model")]
    assert launch.main(["routing", str(saved / "model"), "--against", str(saved / "bare"), *data, *tokenizer]) == 0


def test_sets_of_many_experts_are_not_counted():
    assert np.isnan(meeting(np.zeros((2, 0), int))).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of Hugging Face directories, with tokenizers, and of text."""
    place = tmp_path_factory.mktemp("saved")
    dense = tiny_model(tiny_config(num_local_experts=1, num_experts_per_tok=1))
    narrow = tiny_model(tiny_config(num_local_experts=4, num_experts_per_tok=2, vocab_size=200))
    models = {"model": model_of("2 of 4"), "other": model_of("1 of 3"), "dense": dense, "narrow": narrow}
    for name, model in models.items():
        save_hf(model, place / name)
        write_byte_tokenizer(place / name / "tokenizer.json")
    (place / "model" / "config.yaml").write_text("base_model: another's\n")  # a file of somebody else
    shutil.copytree(place / "model", place / "bare")
    (place / "bare" / "tokenizer.json").unlink()
    shutil.copytree(place / "model", place / "renamed")
    content = json.loads((place / "renamed" / "tokenizer.json").read_text())
    pieces = content["model"]["vocab"]
    pieces["a"], pieces["e"] = pieces["e"], pieces["a"]
    (place / "renamed" / "tokenizer.json").write_text(json.dumps(content))
    lines = [json.dumps({"text": f"the router sends {i} tokens to its experts"}) for i in range(9)]
    (place / "lines.jsonl").write_text("\n".join(lines))
    (place / "short.txt").write_text("a short one")
    (place / "empty.jsonl").write_text("")
    return place


def test_the_command_writes_a_page_and_its_numbers(saved, capsys):
    data = [f"--data=many={saved / 'lines.jsonl'}", f"--data=few={saved / 'short.txt'}"]
    options = ["--tokens", "100", "--seq-len", str(SEQ_LEN), "--against", str(saved / "model")]
    assert launch.main(["routing", str(saved / "model"), *data, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((saved / "model-routing" / "routing.json").read_text())
    assert [(d["name"], d["tokens"]) for d in result["domains"]] == [("many", 100), ("few", 13)]
    assert result["notes"] == ["few has 13 tokens, fewer than the 100 that were asked for."]
    assert result["all"]["changed"] == {"first": [0, 0], "any": [0, 0], "gate": [0, 0]}
    assert (saved / "model-routing" / "routing.html").read_text().startswith("<!doctype html>")


def test_kernels_of_the_machine_that_trained_are_not_asked_for(saved, monkeypatch):
    flags = ("--xla_tpu_enable_latency_hiding_scheduler=true",)  # which no CPU knows
    compute = ComputeConfig(attention="splash", moe=MoeConfig(matmul="megablox"), xla_flags=flags)
    run = SimpleNamespace(compute=compute, mesh=MeshConfig(), seq_len=SEQ_LEN)
    monkeypatch.setattr("mixtral_jax.train.commands.routing.run_config", lambda checkpoint: run)
    data = ["--data", f"many={saved / 'lines.jsonl'}", "--tokens", "100", "--out", str(saved / "elsewhere")]
    assert launch.main(["routing", str(saved / "model"), *data]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dense"], "dense is a dense model: it has no routers"),
        (["nothere"], "nothere does not exist"),
        (["bare"], "bare holds no tokenizer: name one with --tokenizer"),
        (["model", "--layers", "0,2"], "--layers 0,2: the model has layers 0 to 1"),
        (["model", "--layers", "all"], "--layers all must be numbers, such as 0,1"),
        (["model", "--seq-len", "65"], "--seq-len 65 must be from 2 to 64, which the model knows"),
        (["model", "--tokens", "39"], "--tokens 39 must be 40 or more"),
        (["model", "--data", "x=nothere.jsonl"], "source 'x': no file matches nothere.jsonl"),
        (["model", "--data", "x=empty.jsonl"], "source 'x': no documents to learn from in empty.jsonl"),
        (["model", "--data", "x=short.txt", "--data", "short.txt"], "--data short.txt is no NAME=PATH"),
        (["model", "--data", "x=short.txt", "--data", "x=lines.jsonl"], "two sources are named 'x'"),
        (["model", "--data", "a b=short.txt"], "--data: String should match pattern"),
        (["model", "--against", "other"], "it has num_local_experts 3, not 4 and num_experts_per_tok 1, not 2"),
        (["model", "--against", "bare"], "bare holds no tokenizer: name one with --tokenizer"),
        (["model", "--against", "narrow"], "the tokenizer has 258 pieces, the model knows 200"),
        (["model", "--against", "renamed"], "renamed has another tokenizer, so that tokens cannot be compared"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, said, saved, capsys, monkeypatch):
    monkeypatch.chdir(saved)
    assert launch.main(["routing", "--out", "no", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1, error
    assert not (saved / "no").exists()
