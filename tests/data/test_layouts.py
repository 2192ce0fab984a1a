"""Every layout of chats and pairs becomes the same examples, from every kind of file; what is none is a sentence."""

import copy
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import prepare
from mixtral_jax.data.records.lump import Census
from mixtral_jax.data.records.sources import read_lumps
from mixtral_jax.data.text.chat import encode_chat
from mixtral_jax.data.text.layouts import LAYOUTS, columns, layouts_of, normalise
from mixtral_jax.data.text.template import load_template
from mixtral_jax.data.text.tokenizer import load_tokenizer
from tests.data.test_chat import V3_CONTROLS, CharTokenizer
from tests.tiny import write_byte_tokenizer
from tests.tuning import chat_example, preference_pair

SOURCE = SourceConfig(name="s", path="f")


class Letters(CharTokenizer):
    vocab_size = 1 << 20

    def encode_ends(self, text):
        return self.encode(text), list(range(1, len(text) + 1))


TOKENIZER = Letters(*V3_CONTROLS)
V3 = load_template("v3", TOKENIZER)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


Q, A, B = turn("user", "Hi"), turn("assistant", "Hello"), turn("assistant", "No.")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}
BARE = {"function": {"name": "f"}}
ROUND = [Q, turn("assistant", None, tool_calls=[{"id": "abcdefgh1", **CALL}])]
ROUND += [turn("tool", "ok", tool_call_id="abcdefgh1"), A]


def shape(record, kind="chat", **source):
    return normalise(record, SOURCE.model_copy(update=source), kind)


CHATS = [
    ("messages", {"messages": [Q, A]}, [Q, A]),
    ("messages", {"messages": json.dumps([Q, A])}, [Q, A]),
    ("messages", {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}}, [Q, A]),
    (
        "messages",
        {"messages": [turn("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), A]},
        [Q, A],
    ),
    ("messages", {"messages": [Q, A], "prompt": None, "completion": None}, [Q, A]),
    ("messages", {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [Q, A]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [Q, A]),
    ("sharegpt", {"conversations": [Q, A], "system": "Be kind."}, [turn("system", "Be kind."), Q, A]),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {}})},
                {"from": "observation", "value": "ok"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        [turn("system", "Be kind."), Q, turn("assistant", "", tool_calls=[BARE]), turn("tool", "ok"), A],
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, [Q, A]),
    ("alpaca", {"instruction": "Say", "input": "hi.", "output": "Hello"}, [turn("user", "Say\n\nhi."), A]),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]], "system": ""}, [Q, A, Q, A]),
    ("prompt_completion", {"messages": None, "prompt": [Q], "completion": [A]}, [Q, A]),
    ("prompt_completion", {"messages": [], "prompt": json.dumps([Q]), "completion": A}, [Q, A]),
    ("kto", {"prompt": [Q], "completion": [A], "label": True}, [Q, A]),
]


@pytest.mark.parametrize(("layout", "record", "messages"), CHATS)
def test_each_layout_of_a_chat_is_the_same_example(layout, record, messages):
    assert layouts_of([record], SOURCE, "chat") == (layout,)
    assert chat_example(record, SOURCE, V3) == encode_chat(messages, V3)
    fixed = SOURCE.model_copy(update={"layout": layout})
    assert set(columns(fixed, "chat")) >= {name for name in record if record[name]}
    assert chat_example(record, fixed, V3) == encode_chat(messages, V3)


HUMAN = "\n\nHuman: Hi\n\nAssistant:"
PAIRS = [
    ("preference", {"prompt": [Q], "chosen": [A], "rejected": [B]}),
    ("preference", {"prompt": json.dumps([Q]), "chosen": A, "rejected": B}),
    ("preference", {"conversations": [{"from": "human", "value": "Hi"}], "chosen": A, "rejected": B}),
    ("implicit", {"prompt": None, "chosen": [Q, A], "rejected": [Q, B]}),
    ("implicit", {"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}),
    ("ultrafeedback", {"prompt": "Hi", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 8.0}),
    ("ultrafeedback", {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}),
    ("hh", {"chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} No."}),
    ("hh", {"prompt": HUMAN, "chosen": " Hello", "rejected": " No."}),
    ("hh", {"prompt": HUMAN, "chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} No."}),
]


@pytest.mark.parametrize(("layout", "record"), PAIRS)
def test_each_layout_of_a_pair_is_the_same_example(layout, record):
    expected = (encode_chat([Q, A], V3), encode_chat([Q, B], V3))
    assert layouts_of([record], SOURCE, "preference") == (layout,)
    assert preference_pair(record, SOURCE, V3) == expected
    assert preference_pair(record, SOURCE.model_copy(update={"layout": layout}), V3) == expected


def test_a_prompt_of_text_that_both_answers_repeat_stands_once():
    record = {"prompt": "2+2 ", "chosen": "2+2 is 4", "rejected": "2+2 is 5"}
    assert shape(record, "preference") == ("ultrafeedback", {"prompt": "2+2 ", "chosen": "is 4", "rejected": "is 5"})
    assert shape(record, "preference", layout="preference") == ("preference", record)


def test_a_conversation_that_is_the_beginning_of_the_other_keeps_its_last_answer():
    record = {"chosen": [Q, A], "rejected": [Q, A, Q, B]}
    expected = {"prompt": [Q], "chosen": [A], "rejected": [A, Q, B]}
    assert shape(record, "preference") == ("implicit", expected)


def test_the_first_rows_decide_between_two_readings():
    apart = {"prompt": "I", "chosen": "am.", "rejected": "was."}
    chance = {"prompt": "I", "chosen": "I am.", "rejected": "I was."}
    known = layouts_of([apart, apart, chance], SOURCE, "preference")
    assert known == ("preference",)
    assert normalise(chance, SOURCE, "preference", known) == ("preference", chance)
    known = layouts_of([chance, chance, apart], SOURCE, "preference")
    assert known == ("ultrafeedback",)
    with pytest.raises(ValueError, match="do not begin with 'prompt', as in other rows of the file: set layout: pref"):
        normalise(apart, SOURCE, "preference", known)
    late = {**chance, "chosen": "am."}  # the first rows had no prompt at all: this one is not read without its own
    assert normalise(late, SOURCE, "preference", ("implicit",))[0] == "preference"


def test_rows_of_two_layouts_in_one_file_are_both_read():
    rows = [
        {"messages": [Q, A], "prompt": None, "completion": None},
        {"messages": None, "prompt": "a", "completion": "b"},
    ]
    known = layouts_of(rows, SOURCE, "chat")
    assert known == ("messages", "prompt_completion")
    assert [normalise(row, SOURCE, "chat", known)[0] for row in rows] == list(known)
    assert normalise(rows[1], SOURCE, "chat", ("messages",))[0] == "prompt_completion"


REFUSED = [
    ("chat", {"messages": "Hi"}, {}, "'messages' is not a list of messages"),
    ("chat", {"messages": '[{"role"'}, {}, "'messages' is text, but not JSON"),
    (
        "chat",
        {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]), A]},
        {},
        r"'messages'\[0\]: the content has a part of type 'image_url': only parts of text can be learned",
    ),
    ("chat", {"messages": [turn("user", ["x"]), A]}, {}, "a part of type 'str'"),
    ("chat", {"question": "a", "answer": ""}, {}, r"with 'completion' \(it has 'question', 'answer' \(empty\)\)"),
    ("chat", {"messages": [Q, A]}, {"layout": "sharegpt"}, r"layout sharegpt needs 'conversations' \(it has 'mess"),
    ("chat", {"messages": [Q, A], "tools": "weather"}, {}, "'tools' is text, but not JSON"),
    ("chat", {"messages": [Q, A], "tools": 3}, {}, "'tools' is neither a list of functions nor JSON of one, got 3"),
    ("chat", {"messages": [Q, A], "tools": ["3"]}, {}, r"tools\[0\]: a tool needs a function with a name"),
    ("chat", {"messages": [Q, turn("assistant", "", tool_calls="f")]}, {}, "tool_calls is text, but not JSON"),
    ("chat", {"messages": [Q, turn("assistant", "", tool_calls=[1])]}, {}, "a tool call needs a function with a name"),
    ("chat", {"prompt": "a", "completion": "b", "tools": [TOOL]}, {}, "'tools' have no place in plain text"),
    ("chat", {"prompt": "a", "completion": "b", "label": None}, {"layout": "kto"}, "layout kto needs .* 'label'"),
    ("chat", {"instruction": 1, "output": "b"}, {}, "'instruction' and 'input' must be strings"),
    ("chat", {"instruction": "a", "output": "b", "history": [1]}, {}, "'history' is not a list of"),
    (
        "preference",
        {"prompt": "a", "completion": "b", "label": True},
        {},
        r"\(KTO\) is no pair: learn those with label",
    ),
    ("preference", {"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]}, {}, "set layout: implicit to leave that col"),
    ("preference", {"chosen": "a", "rejected": "b"}, {"layout": "hh"}, "must begin with '.n.nHuman:'"),
    ("preference", {"chosen": 1, "rejected": 2}, {}, "must be strings or lists of messages"),
]


@pytest.mark.parametrize(("kind", "record", "source", "sentence"), REFUSED)
def test_what_is_no_layout_is_one_sentence(kind, record, source, sentence):
    example = {"chat": chat_example, "preference": preference_pair}[kind]
    with pytest.raises(ValueError, match=sentence) as error:
        example(record, SOURCE.model_copy(update=source), V3)
    assert "\n" not in str(error.value)


def test_answers_with_a_label_are_learned_where_it_is_true():
    assert shape({"prompt": "a", "completion": "b", "label": False}) == ("kto", None)
    assert shape({"prompt": "a", "completion": "b", "label": "science"})[0] == "prompt_completion"
    with pytest.raises(ValueError, match=r"layout kto needs .* and 'label' \(it has 'prompt', 'completion'\)"):
        normalise({"prompt": "a", "completion": "b"}, SOURCE, "chat", ("kto",))
    with pytest.raises(ValueError, match="'label' of an answer must be true or false, got 'yes'"):
        normalise({"prompt": "a", "completion": "b", "label": "yes"}, SOURCE, "chat", ("kto",))


TOOLED = [{"messages": ROUND}, {"prompt": [Q], "completion": ROUND[1:]}, {"conversations": ROUND}]


@pytest.mark.parametrize(
    "spelled",
    [[TOOL], TOOL, json.dumps([TOOL]), json.dumps(TOOL), [json.dumps(TOOL)], [TOOL["function"]],
     [{"function": {"name": "f", "parameters": json.dumps(TOOL["function"]["parameters"])}}]],
)  # fmt: skip
@pytest.mark.parametrize("record", TOOLED)
def test_tools_reach_every_chat_however_they_are_spelled(record, spelled):
    assert "city" in TOKENIZER.show(encode_chat(ROUND, V3, tools=[TOOL]).tokens)
    expected = encode_chat(ROUND, V3, tools=[TOOL])
    assert chat_example({**record, "tools": spelled}, SOURCE, V3) == expected
    for nothing in (None, [], "", "[]"):
        assert chat_example({**record, "tools": nothing}, SOURCE, V3) == encode_chat(ROUND, V3)


def test_tools_reach_both_sides_of_a_pair():
    for record in (record for _, record in PAIRS):
        pair = preference_pair({**record, "tools": json.dumps([TOOL])}, SOURCE, V3)
        assert pair == (encode_chat([Q, A], V3, tools=[TOOL]), encode_chat([Q, B], V3, tools=[TOOL]))


@pytest.mark.parametrize(
    "calls",
    [
        json.dumps([{"id": "abcdefgh1", **CALL}]),
        {"id": "abcdefgh1", **CALL},
        [json.dumps({"id": "abcdefgh1", **CALL})],
        [{"id": "abcdefgh1", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}],
        [{"id": "abcdefgh1", "name": "f", "arguments": {"city": "Paris"}}],
    ],
)
def test_tool_calls_are_the_same_however_they_are_spelled(calls):
    messages = [Q, turn("assistant", "", tool_calls=calls), *ROUND[2:]]
    assert chat_example({"messages": messages}, SOURCE, V3) == encode_chat(ROUND, V3)


@pytest.mark.parametrize(("mine", "named"), [("call_AbC123dEf456GhI789", True), (17, True), ("é", True), (None, False)])
def test_ids_of_calls_have_any_form(mine, named):
    calls = [{"id": mine, **CALL}, {"id": mine and f"{mine}0", **CALL}]
    results = [turn("tool", "x", tool_call_id=calls[1]["id"]), turn("tool", "y", tool_call_id=calls[0]["id"])]
    messages = [Q, turn("assistant", "", tool_calls=calls), *results, A]
    shown = TOKENIZER.show(encode_chat(messages, V3).tokens)
    ids = [entry["id"] for entry in json.loads(shown.split("[TOOL_CALLS]")[1].split("</s>")[0])]
    answered = [json.loads(part.split("[/")[0])["call_id"] for part in shown.split("[TOOL_RESULTS]")[1:]]
    assert all(len(id_) == 9 and id_.isalnum() for id_ in ids) and len(set(ids)) == 2
    assert answered == (ids[::-1] if named else ids)
    assert encode_chat(messages, V3) == encode_chat(copy.deepcopy(messages), V3)


# --- files ---

ROWS = [
    {"messages": ROUND, "tools": [TOOL]},
    {"messages": [Q, A], "tools": [{"function": {"name": "add", "parameters": {"required": ["a"]}}}]},
    {"messages": [Q, turn("assistant", None, tool_calls=[{"id": "abcdefgh2", "function": {"name": "add",
        "arguments": {"a": 1, "b": [1, None]}}}]), turn("tool", "3", tool_call_id="abcdefgh2"), A]},
]  # fmt: skip


def _read(path, kind="chat", skip=False):
    census = Census(skip)
    source = SourceConfig(name="s", path=str(path))
    lumps = read_lumps(source, str(path), columns(source, kind), census)
    return [record for lump in lumps for _, record in lump.parse(census)], census


def _arrow(path, rows):
    with pa.ipc.new_stream(str(path), (table := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(table)


class _Chats(tfds.core.GeneratorBasedBuilder):
    """Nested lists need TensorFlow here, so that chats come as JSON; what a row lacks is empty text."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing to download
    rows = ()

    def _info(self):
        features = {name: tfds.features.Text() for name in ("messages", "tools", "prompt")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, row in enumerate(self.rows):
            yield number, {k: json.dumps(row[k]) if k in row else "" for k in ("messages", "tools", "prompt")}


def _tfds(path, rows):
    _Chats.rows = rows
    builder = _Chats(data_dir=path.parent / "made", file_format="array_record")
    builder.download_and_prepare()
    builder.data_path.rename(path)


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "a.arrow": _arrow,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "tfds": _tfds,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_equal_whatever_file_holds_them(tmp_path, name):
    """Arrow gives each struct the keys of all rows, null where a row has them not: those are not learned."""
    WRITERS[name](tmp_path / name, ROWS)
    records, _ = _read(tmp_path / name)
    examples = [chat_example(record, SOURCE, V3) for record in records]
    expected = [chat_example(row, SOURCE, V3) for row in ROWS]
    assert sorted(examples) == sorted(expected) if name == "tfds" else examples == expected  # which shuffles


def test_a_map_column_is_an_object(tmp_path):
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    calls = pa.list_(pa.struct([("function", function)]))
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", calls)])
    call = {"function": {"name": "f", "arguments": [("city", "Paris")]}}
    chats = [[Q, {"role": "assistant", "tool_calls": [call]}]]
    pq.write_table(pa.table({"messages": pa.array(chats, pa.list_(message))}), tmp_path / "a.parquet")
    records, _ = _read(tmp_path / "a.parquet")
    assert chat_example(records[0], SOURCE, V3) == encode_chat([Q, turn("assistant", "", tool_calls=[CALL])], V3)


@pytest.fixture
def data(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer.json")

    def make(*files, kind="chat", **source):
        paths = []
        for i, rows in enumerate(files):
            paths.append(tmp_path / f"{i}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataConfig(
            tokenizer=str(tmp_path / "tokenizer.json"), examples=kind, cache_dir=str(tmp_path / "cache"),
            train=({"name": "s", "path": tuple(map(str, paths)), **source},),
        )  # fmt: skip

    return make


def test_the_layout_of_each_file_is_said_and_can_be_fixed(data):
    chats = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    config = data(chats, [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "</s>"}]}])
    prepared = prepare(config, 64, 0)
    assert prepared.train[0].layouts == {"kto": 3, "sharegpt": 1} and prepared.train[0].documents == 3
    said = "train/s: 3 records are read as kto, 1 as sharegpt"
    warned = "train/s: warning: 1 examples hold words such as <s> or [INST]"
    assert prepared.readings()[0] == said and prepared.readings()[1].startswith(warned)
    assert "1 without an answer to learn" in prepared.summary()
    fixed = prepare(data(chats, layout="prompt_completion"), 64, 0)
    assert fixed.train[0].documents == 3 and fixed.fingerprint != prepare(data(chats), 64, 0).fingerprint
    assert prepare(config, 64, 0).readings() == prepared.readings()  # from the cache


def test_a_file_of_pairs_is_read_as_its_first_rows_show(data):
    rows = [{"prompt": "I", "chosen": f"I am {i}.", "rejected": "I was."} for i in range(3)]
    rows += [{"prompt": "I", "chosen": "am.", "rejected": "was."}]
    with pytest.raises(ValueError, match=r"0.jsonl, line 4: .*do not begin with 'prompt'"):
        prepare(data(rows, kind="preference"), 64, 0)
    assert prepare(data(rows, kind="preference", layout="preference"), 64, 0).train[0].layouts == {"preference": 4}


def test_a_layout_of_another_kind_of_example_is_refused():
    for kind, layout in (("chat", "hh"), ("preference", "sharegpt"), ("text", "messages")):
        with pytest.raises(ValueError, match=f"source 's' has layout {layout}, which is of examples: .*is {kind}"):
            DataConfig(tokenizer="t", examples=kind, train=[{"name": "s", "path": "p", "layout": layout}])
    for kind, table in LAYOUTS.items():
        for layout in table:
            if (kind, layout) != ("preference", "kto"):  # which only says why not
                DataConfig(tokenizer="t", examples=kind, train=[{"name": "s", "path": "p", "layout": layout}])


def test_the_page_has_a_row_for_each_layout():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    for name in {name for table in LAYOUTS.values() for name in table}:
        assert f"\n| `{name}` | `{{" in page, name


# --- nothing that a record holds is more than a bad record ---

ODD = [None, 3, 2.5, True, "", "x", "\ud83d", "[", "[{", [], {}, [None], [3], ["\ud83d"], {"type": "text"}, [[]], b"x"]
WHOLE = [
    ("chat", {"messages": ROUND, "tools": [TOOL]}),
    ("chat", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"}),
    ("chat", {"prompt": "a", "completion": "b", "label": True}),
    ("chat", {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["a", "b"]]}),
    ("preference", {"prompt": "Hi", "chosen": [Q, A], "rejected": [Q, B], "tools": [TOOL]}),
    ("preference", {"chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} No."}),
    ("preference", {"instruction": "a", "history": [["a", "b"]], "system": "s", "chosen": "c", "rejected": "d"}),
    ("preference", {"messages": [Q], "chosen": A, "rejected": B, "label": 0}),
]


def _places(value):
    yield ()
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from ((key, *place) for place in _places(inner))


@pytest.mark.parametrize(("kind", "record"), WHOLE)
def test_odd_values_anywhere_are_bad_records_and_nothing_else(kind, record, tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    templates = [V3, load_template({"name": "v1"}, tokenizer)]
    example = {"chat": chat_example, "preference": preference_pair}[kind]
    for place in _places(record):
        for odd in ODD if place else ():
            changed = copy.deepcopy(record)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = odd
            for template in templates:
                try:
                    layouts_of([changed], SOURCE, kind)
                    example(changed, SOURCE, template)
                except ValueError as error:
                    assert "\n" not in str(error), (place, odd)
