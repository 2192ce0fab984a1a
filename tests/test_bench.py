"""The benchmark's own parts: shapes with changes, our steps at a tiny shape, the document."""

import pytest

from tests.bench import ours, tuning_ours
from tests.bench.run import write_section
from tests.bench.shapes import SHAPES, parse


def test_a_shape_with_changes():
    assert parse("S") == SHAPES["S"]
    assert parse("S:experts=16,batch=4") == SHAPES["S"]._replace(experts=16, batch=4)
    with pytest.raises(KeyError):
        parse("Z")


def test_the_pretraining_step():
    run = ours.measure(parse("XS"), steps=1, capacity=None)
    assert run["seconds"] > 0 and run["flops"] > 0 and 5 < run["loss"] < 7.5  # about log 512


@pytest.mark.parametrize("kind", ["sft", "lora", "dpo"])
def test_the_steps_of_fine_tuning(kind):
    run = tuning_ours.measure(parse("XS"), steps=1, kind=kind, prompt=0.5)
    # DPO on random pairs starts at log 2, plus the balance loss
    assert (0.5 < run["loss"] < 1.2) if kind == "dpo" else (5 < run["loss"] < 7.5)


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("# Benchmarks\n\nkept\n")
    write_section(document, "step", "first")
    write_section(document, "tuning", "other")
    write_section(document, "step", "second")
    text = document.read_text()
    assert "kept" in text and "other" in text and "second" in text and "first" not in text
    assert text.count("## The training step") == 1
