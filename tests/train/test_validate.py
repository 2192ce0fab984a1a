"""Every problem of a file at once, each on its line; types stricter than pydantic's."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mixtral_jax.train.config.load import known_paths, origins, validate
from mixtral_jax.train.config.tree import Tree, tree_from_text
from mixtral_jax.train.errors import UserError


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Leaf(Strict):
    size: int = Field(1, gt=0)
    rate: float = 0.5
    on: bool = False
    kind: Literal["cosine", "linear"] = "cosine"


class Run(Strict):
    name: str
    leaf: Leaf = Leaf()
    maybe: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    table: dict[str, Leaf] = {}
    resume: Literal["auto", "never"] | int = "auto"
    path: str | tuple[str, ...] = ""
    checked: Annotated[Leaf, BeforeValidator(lambda v: v)] = Leaf()

    @model_validator(mode="after")
    def _several(self) -> "Run":
        if self.name == "cross":
            raise ValueError("first problem\nsecond problem")
        return self


def check(text: str, **options: Any) -> Run:
    return validate(Run, tree_from_text(text, "f"), **options)


def lines(text: str, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        check(text, **options)
    return str(caught.value).splitlines()


def test_whole_numbers_may_be_written_as_powers_of_ten() -> None:
    run = check("name: a\nleaf: {size: 1e6, rate: 3}\nresume: 1e3")
    assert run.leaf.size == 1_000_000
    assert type(run.leaf.size) is int
    assert run.leaf.rate == 3.0
    assert run.resume == 1000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("leaf: {size: 1.5}", "leaf.size = 1.5 (f:2): must be a whole number, got a number with a fractional part"),
        ("leaf: {size: true}", "leaf.size = true (f:2): must be a whole number"),
        ("leaf: {size: '3'}", 'leaf.size = "3" (f:2): must be a whole number, not text'),
        ("leaf: {size: 0}", "leaf.size = 0 (f:2): must be greater than 0"),
        ("leaf: {size: null}", "leaf.size = null (f:2): must be a whole number"),
        ("leaf: {rate: false}", "leaf.rate = false (f:2): must be a number"),
        ("leaf: {rate: fast}", "leaf.rate = fast (f:2): must be a number, not text"),
        ("leaf: {on: no}", "leaf.on = no (f:2): must be true or false, not text"),
        ("leaf: {on: 1}", "leaf.on = 1 (f:2): must be true or false"),
        ("leaf: {kind: cosin}", "leaf.kind = cosin (f:2): must be 'cosine' or 'linear'; did you mean cosine?"),
        ("leaf: 3", "leaf = 3 (f:2): must be a section of `key: value` lines"),
        ("resume: soon", "resume = soon (f:2): must be 'auto' or 'never' or a whole number"),
        ("resume: true", "resume = true (f:2): must be 'auto' or 'never' or a whole number"),
        ("path: [1]", "path.0 = 1 (f:2): must be text"),
        ("path: 3", "path = 3 (f:2): must be text or a list"),
        ("maybe: {size: true}", "maybe.size = true (f:2): must be a whole number"),
        ("checked: {size: x}", "checked.size = x (f:2): must be a whole number, not text"),
        ("leaves: [{size: 1}, {rate: x}]", "leaves.1.rate = x (f:2): must be a number, not text"),
        ("table: {a: {size: x}}", "table.a.size = x (f:2): must be a whole number, not text"),
        ("leaf: {sizes: 3}", "leaf.sizes = 3 (f:2): unknown key; the nearest key is leaf.size"),
        ("kind: linear", "kind = linear (f:2): unknown key; the nearest key is leaf.kind"),
        ("leaves: [{}, {rat: 1}]", "leaves.1.rat = 1 (f:2): unknown key; the nearest key is leaves.1.rate"),
        ("leaf: {qqq: 3}", "leaf.qqq = 3 (f:2): unknown key; the keys of leaf are size, rate, on, kind"),
        ("lr: 3", "lr = 3 (f:2): unknown key; here that is optimizer.learning_rate"),
        ("presett: 3", "presett = 3 (f:2): unknown key; the nearest key is preset"),
    ],
)
def test_a_problem_is_a_line_with_path_value_and_place(text: str, line: str) -> None:
    assert lines(f"name: a\n{text}", also_known=("preset",)) == [line]


def test_all_problems_come_at_once() -> None:
    found = lines("leaf: {size: x, rat: 1}\nmaybe: {kind: z}\nresume: never\nextra: 1", problems={"before": "is wrong"})
    assert [line.split(" ")[0] for line in found] == [
        "before:",
        "name:",
        "leaf.size",
        "leaf.rat",
        "maybe.kind",
        "extra",
    ]
    assert found[1] == "name: missing: this key has no default"


def test_problems_across_fields_keep_their_own_lines() -> None:
    assert lines("name: cross") == ["first problem", "second problem"]


def test_every_value_that_a_sentence_names_has_its_place() -> None:
    text = "name: cross\nleaf: {size: 3,\n  rate: 2}\n"
    tree = tree_from_text(text, "f")
    tree.set("leaf.on", True, "override")

    class Crossed(Run):
        @model_validator(mode="after")
        def _agree(self) -> "Crossed":
            raise ValueError("leaf.size (3) and leaf.rate (2) and leaf.on and resume do not agree\nnothing named")

        @model_validator(mode="after")
        def _several(self) -> "Crossed":
            return self

    with pytest.raises(UserError) as caught:
        validate(Crossed, tree)
    assert str(caught.value).splitlines() == [
        "leaf.size (3) and leaf.rate (2) and leaf.on and resume do not agree [f:2, f:3, override]",
        "nothing named",
    ]


def test_what_is_missing_has_the_place_of_its_section() -> None:
    class Section(Strict):
        needed: int

    class Holder(Strict):
        section: Section

    with pytest.raises(UserError) as caught:
        validate(Holder, tree_from_text("\nsection: {}", "f"))
    assert str(caught.value) == "section.needed: missing: this key has no default [f:2]"


def test_a_list_of_wrong_elements_is_not_called_too_short() -> None:
    class Batch(Strict):
        items: tuple[Leaf, ...] = Field(min_length=1)

    with pytest.raises(UserError) as caught:
        validate(Batch, tree_from_text("items: [{size: x}]", "f"))
    assert str(caught.value) == "items.0.size = x (f:1): must be a whole number, not text"


def test_known_paths_reach_into_lists_and_optional_sections() -> None:
    paths = set(known_paths(Run))
    assert {"name", "leaf", "leaf.size", "maybe.size", "leaves", "leaves.*.kind", "resume"} <= paths


def test_origins_name_a_line_the_override_or_the_default() -> None:
    tree = tree_from_text("name: a\nleaf:\n  size: 3\nleaves:\n- {rate: 1}\n", "f")
    tree.origins["name"] = "override"
    run = validate(Run, tree)
    found = origins(run, tree)
    assert found["name"] == "override"
    assert found["leaf.size"] == "f:3"
    assert found["leaf.rate"] == found["leaves.0.size"] == found["resume"] == "default"
    assert found["leaves.0.rate"] == "f:5"
    assert validate(Run, Tree(run.model_dump(mode="json"))) == run
