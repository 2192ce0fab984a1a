"""YAML 1.2 as the specification says, overrides, and writing what was read."""

import math
import os
import random
from pathlib import Path

import pytest

from mixtral_jax.train.config.load import closest
from mixtral_jax.train.config.tree import parse_value, paths, read_tree, split_overrides, to_yaml, tree_from_text
from mixtral_jax.train.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1e6", 1e6), ("1E6", 1e6), ("-2.5e+3", -2500.0), (".5", 0.5), ("1.", 1.0),
        ("3", 3), ("-3", -3), ("+3", 3), ("017", 17), ("0o17", 15), ("0x1f", 31), ("1_000", 1000),
        ("true", True), ("True", True), ("false", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("y", "y"), ("off", "off"),
        ("12:30", "12:30"), ("1:30:00", "1:30:00"), ("2026-11-22", "2026-11-22"),
        ("'1e6'", "1e6"), ('"12"', "12"), ("[1, 2]", [1, 2]), ("[]", []), ("{a: 1e-4}", {"a": 1e-4}),
        (".inf", math.inf), ("-.inf", -math.inf), ("a b", "a b"), ("!!str 12", "12"), ("é", "é"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: a was set in line 1 already"),
        ("x:\n  a: 1\n  a: 2\n", r"line 3: x\.a was set in line 2 already"),
        ("a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` lines"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("a: !python/object:os.system x\n", r"line 1: the tag !python/object:os\.system is not supported"),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", "line 3: a key must be a plain word"),
        ("[1]: 2\n", "line 1: a key must be a plain word"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
        ("a: &a [*a]\n", r"line 1: a\.0.* is nested more than 100 deep: does an alias refer to itself\?"),
        ("a: &a {b: *a}\n", r"line 1: a\.b.* is nested more than 100 deep"),
        ("a: " + "[" * 5000, "nested more than 100 deep"),
        ("a: " + "{a: " * 5000, "nested more than 100 deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(2000)), "nested more than 100 deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9)), "more than 100,000"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{b: *a{i}, c: *a{i}}}\n" for i in range(40)), "aliases"),
        ('a: ["x\\ud800"]\n', r"line 1: a.0 = 'x.ud800' is no Unicode text: half a surrogate pair"),
        (f"a: 0x{'f' * 9000}\n", "line 1: the tag .*int is not supported for '0xf"),
    ],
)
def test_bad_yaml_is_one_sentence_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tree_from_text(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_aliases_that_repeat_a_little_are_fine() -> None:
    tree = tree_from_text("a: &a {x: [1, 2]}\nb: *a\nc: [*a, *a]\n")
    assert tree.values["c"] == [{"x": [1, 2]}] * 2


def test_a_file_that_is_missing_or_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(FileNotFoundError, match=r"quickstrat\.yaml does not exist; did you mean .*quickstart\.yaml\?"):
        read_tree(tmp_path / "quickstrat.yaml")
    with pytest.raises(UserError, match="not UTF-8 text: byte 3 is 0xff"):
        read_tree(tmp_path / "quickstart.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path, tmp_path / "pipe.yaml"):
        with pytest.raises(UserError, match="is no regular file: it is a directory, a pipe or a device"):
            read_tree(path)


def test_three_ways_to_write_an_override() -> None:
    assert split_overrides(["a.b=c", "--a.b=d", "--a.b", "e", "x=", "--n", "-1", "p=a=b"]) == [
        ("a.b", "c"), ("a.b", "d"), ("a.b", "e"), ("x", ""), ("n", "-1"), ("p", "a=b"),
    ]  # fmt: skip


def test_every_bad_override_is_named() -> None:
    with pytest.raises(UserError) as caught:
        split_overrides(["steps", "--force.it", "--x", "1", "a..b=1", "=3"])
    text = str(caught.value)
    assert text.count("\n") == 3
    for part in ("'steps' has no value: write steps=value", "'--force.it' has no value", "'a..b'", "'=3'"):
        assert part in text


def test_overrides_are_typed_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: {b: 1, c: [10, {d: 20}]}\nempty:\n")
    tree = read_tree(file, ["a.b=1e-4", "a.c.1.d=null", "a.c.0=[1, 2]", "empty.new.deep=no", "top={x: 1}"])
    assert tree.values == {
        "a": {"b": 1e-4, "c": [[1, 2], {"d": None}]},
        "empty": {"new": {"deep": "no"}},
        "top": {"x": 1},
    }
    origins = tree.origins
    assert origins["a.b"] == origins["a.c.1.d"] == origins["a.c.0.1"] == origins["top.x"] == "override"
    assert origins["a.c"] == f"{file}:1"
    assert origins["empty"] == f"{file}:2"
    assert "nothing" not in origins


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b.x=1", "a.b is 1, which has no parts"),
        ("a.c.2=1", r"a\.c is a list of 2: its elements are a\.c\.0 to a\.c\.1"),
        ("a.c.x=1", r"a\.c is a list of 2"),
        ("a.b=[1", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: {b: 1, c: [10, 20]}\n")
    with pytest.raises(UserError, match=message):
        read_tree(file, [override])


def test_what_is_written_reads_back_the_same() -> None:
    rng = random.Random(0)
    texts = ["", " ", "no", "null", "1e6", "0x1f", "12:30", "a: b", "# no", "- x", "[", "é ü 漢", "tab\there", "nl\nx"]
    texts += ["'", '"', "\\", "\x07", "\u2028", "\ufeffx", "😀", "a/b.c", "true", "=", "<<", "&a", "*a", "!t", "%", "@"]

    def value(depth: int) -> object:
        kind = rng.randrange(9 if depth else 7)
        match kind:
            case 0:
                return rng.choice(texts)
            case 1:
                return rng.randrange(-(10**12), 10**12)
            case 2:
                return rng.choice([1e-4, 1e6, 1e300, -2.5e-17, 0.0, 1.0, 0.1, math.inf])
            case 3:
                return rng.choice([True, False, None])
            case 4 | 5 | 6:
                return rng.choice([[], {}, "plain words", [1, 2, "x"], ["no", "1"]])
            case 7:
                return [value(depth - 1) for _ in range(rng.randrange(4))]
            case _:
                return mapping(depth - 1)

    def mapping(depth: int) -> dict:
        return {rng.choice(texts[3:]) + str(i): value(depth) for i in range(rng.randrange(1, 5))}

    for _ in range(300):
        tree = mapping(3)
        text = to_yaml(tree, dict.fromkeys(paths(tree), "a note"))
        assert tree_from_text(text).values == tree
        assert to_yaml(tree_from_text(text).values) == to_yaml(tree)


def test_closest_prefers_the_same_last_part_anywhere() -> None:
    known = ["steps", "optimizer.learning_rate", "optimizer.warmup_steps", "log.every", "eval.every"]
    assert closest("learning_rate", known) == "optimizer.learning_rate"
    assert closest("optimizer.learningrate", known) == "optimizer.learning_rate"
    assert closest("step", known) == "steps"
    assert closest("eval.evry", known) == "eval.every"
    assert closest("zzz", known) is None
    assert closest("anything", []) is None
