"""Columns beside a chat or a pair, and questions under other names: each is read, or refused by name."""

import json

import pytest

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records.lump import Census, Lump
from mixtral_jax.data.text.chat import encode_chat
from mixtral_jax.data.text.examples import tuning_documents
from mixtral_jax.data.text.layouts import columns, layouts_of, normalise
from tests.data.test_layouts import CALL, HUMAN, ROUND, SOURCE, TOOL, V3, A, B, Q, turn
from tests.tuning import chat_example, preference_pair

S = turn("system", "Be kind.")
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def read(rows, kind="chat", train_on="all", **source):
    """The documents and the census of a file of these rows."""
    source, census = SourceConfig(name="s", path="f", **source), Census(skip=False)
    lump = Lump("f", 1, "".join(json.dumps(row) + "\n" for row in rows).encode())
    layouts = layouts_of(rows, source, kind)
    return tuning_documents(lump, source, kind, V3, train_on, census, layouts), census


# --- a system prompt stands before every conversation ---


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [Q, A]},
        {"conversations": SHAREGPT},
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": [Q], "completion": [A]},
        {"prompt": "Hi", "completion": [A]},
        {"prompt": [Q], "completion": "Hello", "label": True},
        {"messages": [S, Q, A]},  # which repeat it
    ],
)
def test_a_system_column_stands_before_every_chat(name, record):
    assert name in columns(SOURCE, "chat")
    assert chat_example({**record, name: "Be kind."}, SOURCE, V3) == encode_chat([S, Q, A], V3)


ALONE = {"chosen": "Hello", "rejected": "No."}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [Q], **ALONE},
        {"prompt": "Hi", "chosen": [A], "rejected": [B]},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": "Hi", "chosen": [Q, A], "rejected": [Q, B]},
        {"conversations": SHAREGPT[:1], **ALONE},
        {"chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} No."},
        {"question": "Hi", **ALONE},
    ],
)
def test_a_system_column_stands_before_both_answers(record):
    expected = (encode_chat([S, Q, A], V3), encode_chat([S, Q, B], V3))
    assert preference_pair({**record, "system": "Be kind."}, SOURCE, V3) == expected


def test_a_system_column_has_no_place_in_plain_text():
    sentence = "'system' has no place in plain text: write the prompt and "
    with pytest.raises(ValueError, match=sentence + "'completion' as messages"):
        chat_example({"prompt": "a", "completion": "b", "system_prompt": "s"}, SOURCE, V3)
    with pytest.raises(ValueError, match=sentence + "'chosen' as messages"):
        preference_pair({"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"}, SOURCE, V3)
    assert chat_example({"prompt": "a", "completion": "b", "system": ""}, SOURCE, V3)


# --- a question has many names ---


@pytest.mark.parametrize(
    "asked",
    [
        {"question": "Hi"},
        {"problem": "Hi"},
        {"input": "Hi"},
        {"instruction": "Hi", "input": ""},
        {"messages": [Q]},
        {"conversations": SHAREGPT[:1]},
        {"prompt": "", "question": "Hi"},
    ],
)
@pytest.mark.parametrize(("good", "bad"), [("It is 7.", "It is 9."), ([turn("assistant", "Yes")], [B])])
def test_a_question_of_any_name_stands_before_the_answers(asked, good, bad):
    record = {**asked, "chosen": good, "rejected": bad}
    assert set(columns(SOURCE, "preference")) >= set(asked)
    assert layouts_of([record], SOURCE, "preference") == ("preference",)
    assert preference_pair(record, SOURCE, V3) == preference_pair({**record, "prompt": [Q]}, SOURCE, V3)


def test_an_instruction_has_its_input_and_history_as_in_chats():
    record = {"instruction": "Say", "input": "hi.", "history": [["Hi", "Hello"]], **ALONE}
    expected = [Q, A, turn("user", "Say\n\nhi.")]
    assert preference_pair(record, SOURCE, V3)[1] == preference_pair({"prompt": expected, **ALONE}, SOURCE, V3)[1]


@pytest.mark.parametrize(
    ("layout", "record"),
    [
        ("implicit", {"question": "Hi", "chosen": [Q, A], "rejected": [Q, B]}),
        ("implicit", {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}),
        ("implicit", {"prompt": "", "chosen": [Q, A], "rejected": [Q, B]}),
        ("hh", {"question": "?", "chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} No."}),
        ("implicit", {"question": "Hi", "chosen": "Q: Hi A: yes", "rejected": "Q: Hi A: no"}),
    ],
)
def test_answers_that_hold_their_question_need_no_other(layout, record):
    alone = {key: record[key] for key in ("chosen", "rejected")}
    assert layouts_of([record], SOURCE, "preference") == (layout,)
    assert preference_pair(record, SOURCE, V3) == preference_pair(alone, SOURCE, V3)


@pytest.mark.parametrize(
    ("kind", "source", "record"),
    [
        ("preference", {"prompt_key": "quesion"}, {"prompt": "P", "chosen": "It is 7", "rejected": "It is 9"}),
        ("chat", {"messages_key": "quesion"}, {"messages": [Q, A], "prompt": "a", "completion": "b"}),
        ("chat", {"messages_key": "quesion", "layout": "sharegpt"}, {"conversations": SHAREGPT}),
        ("chat", {"completion_key": "quesion"}, {"messages": [Q, A]}),
    ],
)
def test_a_key_that_is_set_must_be_in_the_file(kind, source, record):
    key = next(iter(source))
    with pytest.raises(ValueError, match=rf"source 's' sets {key}: 'quesion', .* first records .* \(they have '"):
        read([record, record], kind, **source)
    source = SourceConfig(name="s", path="f", **source)
    layouts_of([record, {**record, "quesion": None}], source, kind)  # it is there, if empty


def test_messages_key_is_of_sharegpt_too():
    source = SOURCE.model_copy(update={"layout": "sharegpt", "messages_key": "dialogue"})
    assert "dialogue" in columns(source, "chat")
    assert chat_example({"dialogue": SHAREGPT}, source, V3) == encode_chat([Q, A], V3)


# --- an answer that is marked bad is not learned ---

ANSWERED = [
    {"prompt": [Q], "completion": [A]},
    {"messages": [Q, A]},
    {"conversations": SHAREGPT},
    {"instruction": "Hi", "output": "Hello"},
]


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("record", ANSWERED)
@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "0")])
def test_an_answer_that_is_marked_bad_is_not_learned(name, record, good, bad):
    for layout in ("auto", "kto"):
        documents, census = read([{**record, name: good}, {**record, name: bad}], layout=layout)
        assert (documents.tokens.tolist(), census.layouts) == (encode_chat([Q, A], V3).tokens, {"kto": 2})
        assert census.counts["dropped"] == 1


@pytest.mark.parametrize("record", ANSWERED)
def test_a_label_of_classes_is_none_and_a_late_mark_is_seen(record):
    _, census = read([{**record, "label": label} for label in (2, 3, 0, "science")])
    assert census.counts["dropped"] == 0 and "kto" not in census.layouts
    assert read([{**record, "label": "science", "kto_tag": False}])[1].counts["dropped"] == 1
    known = layouts_of([record], SOURCE, "chat")
    assert normalise({**record, "label": False}, SOURCE, "chat", known) == ("kto", None)
    with pytest.raises(ValueError, match=r"layout kto needs a chat and 'label' \(it has"):
        normalise(record, SOURCE, "chat", ("kto",))


# --- what is learned of messages beside a prompt ---


def test_train_on_last_is_of_completions_and_pairs_need_two_answers():
    record = {"prompt": [Q], "completion": [A, Q, B]}
    documents, _ = read([record], train_on="last")
    assert documents.learned.tolist() == encode_chat([Q, A, Q, B], V3, train_on="last").learned
    for side in ("chosen", "rejected"):
        pair = {"prompt": [Q], "chosen": [A], "rejected": [B]}
        documents, census = read([{**pair, side: [{**pair[side][0], "weight": 0}]}], "preference")
        assert not len(documents.tokens) and census.counts["dropped"] == 1


# --- tools as other interfaces write them ---


@pytest.mark.parametrize("call", [CALL["function"], {"name": "f", "arguments": '{"city": "Paris"}'}])
def test_the_former_interface_of_functions_is_read(call):
    messages = [Q, turn("assistant", None, function_call=call), {"role": "function", "name": "f", "content": "ok"}, A]
    record = {"messages": messages, "functions": [TOOL["function"]]}
    assert "functions" in columns(SOURCE, "chat")
    plain = [Q, turn("assistant", None, tool_calls=[CALL]), turn("tool", "ok"), A]
    assert chat_example(record, SOURCE, V3) == encode_chat(plain, V3, tools=[TOOL])
    messages[1]["content"] = "Let me see."
    with pytest.raises(ValueError, match="either content or tool_calls, this has both"):
        chat_example(record, SOURCE, V3)


@pytest.mark.parametrize("name", ["input_schema", "inputSchema", "parameters"])
def test_parameters_of_a_tool_have_other_names(name):
    tool = {"name": "f", name: TOOL["function"]["parameters"]}
    for spelled in (tool, {"type": "function", "function": tool}):
        assert chat_example({"messages": ROUND, "tools": [spelled]}, SOURCE, V3) == encode_chat(ROUND, V3, tools=[TOOL])
    call = {"name": "f", name.replace("_schema", "").replace("Schema", ""): {"city": "Paris"}}
    messages = [Q, turn("assistant", "", tool_calls=[{"id": "abcdefgh1", **call}]), *ROUND[2:]]
    assert chat_example({"messages": messages}, SOURCE, V3) == encode_chat(ROUND, V3)


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_inside_a_message_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"'messages'\[0\]: {name!r} stand in a message: write them beside 'messages'"
    ):
        chat_example({"messages": [{**S, name: [TOOL]}, Q, A]}, SOURCE, V3)
    chat_example({"messages": [{**S, name: []}, Q, A]}, SOURCE, V3)


# --- texts that are something else ---


def test_an_instruction_may_be_in_its_input_alone():
    assert chat_example({"instruction": "", "input": "Hi", "output": "Hello"}, SOURCE, V3) == encode_chat([Q, A], V3)


@pytest.mark.parametrize("written", [str, lambda m: f"array({m}, dtype=object)", lambda m: str(m[0])])
def test_messages_as_python_writes_them_are_refused(written):
    sentence = "holds messages as Python prints them: write them as JSON"
    with pytest.raises(ValueError, match="'chosen' " + sentence):
        preference_pair({"prompt": "Hi", "chosen": written([A]), "rejected": written([B])}, SOURCE, V3)
    with pytest.raises(ValueError, match="'messages' " + sentence):
        chat_example({"messages": written([Q, A])}, SOURCE, V3)
    assert chat_example({"prompt": "a", "completion": "[{'x': 1}]"}, SOURCE, V3)
