"""Chat encoding: the borders, the mask, and the sentences with which bad conversations are refused."""

import random
from importlib import resources

import pytest
import tokenizers

from mixtral_jax.data.text.chat import encode_begun, encode_chat, encode_prompt
from mixtral_jax.data.text.template import BUILT_IN, load_template
from mixtral_jax.data.text.tokenizer import load_tokenizer

BOS, EOS = 1, 2


class CharTokenizer:
    """One id per character, so that every border is visible; control tokens by name."""

    bos_id, eos_id, chat_template, spaced = BOS, EOS, None, "never"

    def __init__(self, *controls):
        self.controls = {piece: 3 + i for i, piece in enumerate(controls)}

    def reserve(self, pieces):
        pass

    def encode(self, text, place="start"):
        return [100 + ord(c) for c in text]

    def id_of(self, piece):
        return self.controls.get(piece)

    def piece_of(self, id_):
        names = {BOS: "<s>", EOS: "</s>", **{id_: piece for piece, id_ in self.controls.items()}}
        return names.get(id_) or chr(id_ - 100)

    def show(self, ids):
        return "".join(map(self.piece_of, ids))


V3_CONTROLS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
V3_CONTROLS += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
CONTROLS = {"v1": (), "v3": V3_CONTROLS, "chatml": ("<|im_start|>", "<|im_end|>")}


def setup(name):
    tokenizer = CharTokenizer(*CONTROLS[name])
    return tokenizer, load_template(name, tokenizer)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CHAT = [
    turn("system", "Be kind."),
    turn("user", " hi"),
    turn("assistant", "Hello. "),
    turn("user", "[INST] 2+2?\n"),
    turn("assistant", "4"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "v1",
            "<s>[INST] Be kind.\n\n hi [/INST]{Hello. </s>}[INST] [INST] 2+2?\n [/INST]{4</s>}",
        ),
        (
            "v3",
            "<s>[INST] hi[/INST]{Hello.</s>}[INST]Be kind.\n\n[INST] 2+2?\n[/INST]{4</s>}",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n hi<|im_end|>\n"
            "<|im_start|>assistant\n{Hello. <|im_end|>}\n"
            "<|im_start|>user\n[INST] 2+2?\n<|im_end|>\n<|im_start|>assistant\n{4<|im_end|>}\n",
        ),
    ],
)
def test_layout_and_mask(name, expected):
    tokenizer, template = setup(name)
    ids, trainable = encode_chat(CHAT, template)
    shown, inside = "", False
    for id_, learned in zip(ids, trainable, strict=True):
        shown += ("{" if learned and not inside else "") + ("}" if inside and not learned else "")
        shown += tokenizer.show([id_])
        inside = learned
    assert shown + ("}" if inside else "") == expected


def test_control_tokens_never_come_from_content():
    _, template = setup("v3")
    ids, _ = encode_chat([turn("user", "[/INST]"), turn("assistant", "[INST] </s>")], template)
    assert [i for i in ids if i < 100] == [BOS, 3, 4, EOS]


@pytest.mark.parametrize("name", ["v1", "v3", "chatml"])
def test_train_on_last_learns_the_last_answer_only(name):
    tokenizer, template = setup(name)
    ids, every = encode_chat(CHAT, template)
    same, last = encode_chat(CHAT, template, train_on="last")
    end = {"v1": "</s>", "v3": "</s>", "chatml": "<|im_end|>"}[name]
    assert ids == same
    assert tokenizer.show([i for i, t in zip(ids, last, strict=True) if t]) == "4" + end
    assert sum(every) > sum(last)


def test_weight_zero_leaves_an_answer_out():
    tokenizer, template = setup("v1")
    chat = [dict(m) for m in CHAT]
    chat[2]["weight"] = 0
    ids, trainable = encode_chat(chat, template)
    assert tokenizer.show([i for i, t in zip(ids, trainable, strict=True) if t]) == "4</s>"
    chat[2]["weight"] = 0.5
    with pytest.raises(ValueError, match=r"messages\[2\]: weight of an answer must be 0 or 1, got 0.5"):
        encode_chat(chat, template)


@pytest.mark.parametrize("name", ["v1", "v3", "chatml"])
def test_prompt_is_what_stands_before_the_last_answer(name):
    _, template = setup(name)
    ids, trainable = encode_chat(CHAT, template, train_on="last")
    assert encode_prompt(CHAT[:-1], template) == ids[: trainable.index(True)]
    answer = [token for token, learned in zip(ids, trainable, strict=True) if learned]
    begun = answer[: -len(template.answer_end)]
    assert encode_begun(CHAT, template) == encode_prompt(CHAT[:-1], template) + begun


def test_tool_round_in_v3():
    tokenizer, template = setup("v3")
    tools = [{"type": "function", "function": {"name": "now", "strict": True}}]
    calls = [{"id": "abcdefgh1", "function": {"name": "now", "arguments": '{"zone":"é"}'}}]
    chat = [
        turn("user", "time?"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        turn("tool", '{"t": 3}', tool_call_id="abcdefgh1"),
        turn("assistant", "Three."),
    ]
    ids, trainable = encode_chat(chat, template, tools=tools)
    call = '[TOOL_CALLS][{"name": "now", "arguments": {"zone": "é"}, "id": "abcdefgh1"}]</s>'
    assert tokenizer.show(ids) == (
        '<s>[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}]'
        f"[/AVAILABLE_TOOLS][INST]time?[/INST]{call}"
        '[TOOL_RESULTS]{"content": {"t": 3}, "call_id": "abcdefgh1"}[/TOOL_RESULTS]Three.</s>'
    )
    assert tokenizer.show([i for i, t in zip(ids, trainable, strict=True) if t]) == call + "Three.</s>"
    assert encode_prompt(chat[:3], template, tools=tools) == ids[: -len("Three.") - 1]


U, A = turn("user", "q"), turn("assistant", "a")
CALL = {"role": "assistant", "tool_calls": [{"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = turn("tool", "1", tool_call_id="abcdefgh1")
REFUSED = [
    ([], "conversation is empty"),
    ([turn("system", "s")], "no user turn"),
    ([U, U, A], r"messages\[1\]: two user turns in a row \(messages 0 and 1\)"),
    ([U, A, A], r"messages\[2\]: two assistant turns in a row"),
    ([U, A, U], r"messages\[2\]: the conversation ends with role 'user'"),
    ([A], r"messages\[0\]: the conversation must start with the user"),
    ([U, turn("asistant", "a")], r"messages\[1\]: unknown role 'asistant': did you mean 'assistant'\?"),
    ([U, turn("qqq", "a")], "unknown role 'qqq': the roles are system, user, assistant, tool"),
    ([U, turn("assistant", "")], r"messages\[1\]: the assistant's answer is empty"),
    ([U, turn("assistant", " \n")], r"messages\[1\]: the assistant's answer is empty"),
    ([U, turn("assistant", None)], "content of role 'assistant' must be a string, got None"),
    ([turn("user", ["x"]), A], r"messages\[0\]: the content of role 'user' must be a string"),
    ([U, A, turn("system", "s"), U, A], "a system prompt must stand before the first user turn"),
    ([U, A, RESULT, A], "a tool result that answers no tool call"),
    ([U, CALL, A], r"1 tool call\(s\) have no result yet, but role 'assistant' follows"),
    ([U, {**CALL, "content": "and"}], "holds either content or tool_calls"),
    ([U, CALL, {**RESULT, "tool_call_id": "x"}, A], "tool_call_id 'x' is of none of the calls that wait"),
    ([{"content": "q"}, A], r"messages\[0\]: a message is an object with role and content"),
    ([U, turn("assistant", "a\ud800")], r"messages\[1\]: the content holds half of a surrogate pair"),
    ([U, CALL, {**RESULT, "content": "\ud800"}, A], r"messages\[2\]: the content holds half of a surrogate pair"),
    ([U, {**CALL, "tool_calls": [{"function": {"name": "\ud800"}}]}], "JSON of a tool holds half of a surrogate pair"),
    ([{**U, "tool_calls": CALL["tool_calls"]}, A], r"messages\[0\]: tool_calls in a message of role 'user'"),
    (["q"], r"messages\[0\]: a message is an object with role and content"),
]


@pytest.mark.parametrize(("chat", "sentence"), REFUSED)
def test_refusals_are_one_sentence_with_the_place(chat, sentence):
    _, template = setup("v3")
    with pytest.raises(ValueError, match=sentence) as error:
        encode_chat(chat, template)
    assert "\n" not in str(error.value)


def test_results_without_an_id_go_by_the_name_of_their_function():
    tokenizer, template = setup("v3")
    calls = {"role": "assistant", "tool_calls": [{"id": id_ * 9, "function": {"name": id_}} for id_ in "fgh"]}
    results = [turn("tool", f"of {name}", name=name) for name in "hgf"]
    shown = tokenizer.show(encode_chat([U, calls, *results, A], template).tokens)
    assert all(f'"of {name}", "call_id": "{name * 9}"' in shown for name in "fgh")
    results[0]["name"] = "k"
    with pytest.raises(ValueError, match=r"messages\[2\]: name 'k' is of none of the calls that wait for a result"):
        encode_chat([U, calls, *results, A], template)
    assert encode_chat([U, CALL, turn("tool", "1", name="k"), A], template) == encode_chat(
        [U, CALL, RESULT, A], template
    )


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_text_or_refused(number):
    tokenizer, template = setup("v3")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"x": {number}}}'}}]}
    parsed = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": float(number)}}}]}
    for chat in ([U, call], [U, parsed]):
        with pytest.raises(ValueError, match="a tool holds what JSON cannot: Out of range float"):
            encode_chat(chat, template)
    shown = tokenizer.show(encode_chat([U, CALL, turn("tool", number), A], template).tokens)
    assert f'{{"content": "{number}", "call_id"' in shown


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000])
def test_a_result_that_only_looks_like_json_is_text(text):
    tokenizer, template = setup("v3")
    shown = tokenizer.show(encode_chat([U, CALL, turn("tool", text), A], template).tokens)
    assert f'{{"content": "{text}", "call_id"' in shown


def test_templates_whose_calls_are_text_have_tool_turns():
    tokenizer, template = setup("chatml")
    results = [turn("tool", "r"), turn("tool", "s")]
    shown = tokenizer.show(encode_chat([U, turn("assistant", "<tool_call>f"), *results, A], template).tokens)
    assert "<|im_start|>tool\nr<|im_end|>\n<|im_start|>tool\ns<|im_end|>\n<|im_start|>assistant" in shown
    with pytest.raises(ValueError, match="a tool result that answers no tool call"):
        encode_chat([U, A, RESULT, A], setup("v1")[1])


def test_v1_refuses_tools_and_prompt_refuses_an_answer():
    _, template = setup("v1")
    with pytest.raises(ValueError, match=r"messages\[1\]: template v1 has no tool calls"):
        encode_chat([U, CALL, RESULT, A], template)
    with pytest.raises(ValueError, match="template v1 cannot tell the model of tools"):
        encode_prompt([U], template, tools=[{"function": {"name": "f"}}])
    with pytest.raises(ValueError, match=r"messages\[1\]: a prompt must end with the user"):
        encode_prompt([U, A], template)


@pytest.mark.parametrize("piece", V3_CONTROLS)
def test_v3_needs_every_control_token(piece):
    tokenizer = CharTokenizer(*(c for c in V3_CONTROLS if c != piece))
    with pytest.raises(ValueError) as error:
        load_template("v3", tokenizer)
    assert f"template v3 does not fit the tokenizer: it needs the token {piece}" in str(error.value)


def test_v1_refuses_a_tokenizer_with_control_tokens():
    with pytest.raises(ValueError, match=r"control token 3: use template v3"):
        load_template("v1", CharTokenizer(*V3_CONTROLS))


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ("v9", "template 'v9' is unknown: use one of v1, v3, chatml"),
        ({"name": "x"}, "template.user: Field required"),
        ({"name": "chatml", "usr": {}}, "template.usr: Extra inputs are not permitted"),
        ({"name": "chatml", "user": {"text": "no place"}}, "template.user: text must hold {content} exactly once"),
        ({"user": {}, "assistant": {}}, "template: assistant.close is empty"),
        ({"user": {}, "assistant": {"close": "<e>"}, "special": ["<e>"]}, "it needs the token <e>"),
    ],
)
def test_wrong_descriptions(description, sentence):
    with pytest.raises(ValueError) as error:
        load_template(description, CharTokenizer(*CONTROLS["chatml"]))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_description_overrides_a_built_in_and_can_stand_alone():
    tokenizer = CharTokenizer("<a>")
    plain = {"user": {"text": "Q: {content}\n"}, "assistant": {"open": "A: ", "close": "{eos}<a>", "after": "\n"}}
    ids, trainable = encode_chat([U, A], load_template({**plain, "special": ["<a>"]}, tokenizer))
    assert tokenizer.show(ids) == "<s>Q: q\nA: a</s><a>\n"
    assert trainable == [False] * 9 + [True] * 3 + [False]
    with pytest.raises(ValueError, match="template custom has no place for a system prompt"):
        encode_chat([turn("system", "s"), U, A], load_template(plain | {"special": ["<a>"]}, tokenizer))
    tokenizer = CharTokenizer(*CONTROLS["chatml"])
    assert encode_chat([U, A], load_template({"name": "chatml", "bos": True}, tokenizer))[0][0] == BOS


# Ids of the released tokenizers, as mistral-common gives them.
E1 = [1, 733, 16289, 28793, 22557, 28725, 910, 460, 368, 28804, 733, 28748, 16289, 28793, 315, 28742, 28719, 4433]
E1 += [28723, 2, 733, 16289, 28793, 28705, 28750, 28806, 28750, 28804, 733, 28748, 16289, 28793]
E2 = [1, 3, 23325, 29493, 1678, 1228, 1136, 29572, 4, 1083, 29510, 29487, 5201, 29491, 2]
E2 += [3, 29473, 29518, 29574, 29518, 29572, 4]
MODEL_FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


@pytest.mark.parametrize(("name", "expected"), [("v1", E1), ("v3", E2)])
def test_ids_of_the_released_formats(name, expected):
    data = pytest.importorskip("mistral_common", reason="needs the released tokenizers (extra: parity)")
    tokenizer = load_tokenizer(str(resources.files(data) / "data" / MODEL_FILES[name]))
    template = load_template(name, tokenizer)
    chat = [turn("user", "Hello, how are you?"), turn("assistant", "I'm fine."), turn("user", "2+2?")]
    assert encode_prompt(chat, template) == expected
    ids, trainable = encode_chat(chat[:2], template)
    cut = expected.index(2) + 1
    answer = expected[:cut].index(4 if name == "v3" else 28793, 4 if name == "v3" else 5) + 1
    assert ids == expected[:cut]
    assert trainable == [False] * answer + [True] * (cut - answer)


def test_chatml_equals_the_rendered_chat(tmp_path):
    """Rendered to a string and tokenised with its special tokens, as other libraries do it, on a byte-level BPE."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the user asks the assistant, the assistant answers"] * 9, trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    template = load_template("chatml", tokenizer)
    rng = random.Random(0)

    def text():
        return "x" + "".join(rng.choices(["the user", " asks", "\n\n", "é ü 漢", "answers  "], k=4))

    for _ in range(50):
        chat = [turn("system", text())]
        for _ in range(rng.randint(1, 3)):
            chat += [turn("user", text()), turn("assistant", text())]
        rendered = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
        assert encode_chat(chat, template)[0] == inner.encode(rendered).ids
        prompt = rendered[: rendered.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")]
        assert encode_prompt(chat[:-1], template) == inner.encode(prompt).ids
    forged = [turn("user", "<|im_end|>"), turn("assistant", "<|im_start|>")]
    ids, _ = encode_chat(forged, template)
    assert sum(i in (1, 2) for i in ids) == 4  # those of the template, none from the content


def test_built_in_templates_survive_yaml():
    tokenizer = CharTokenizer(*V3_CONTROLS, *CONTROLS["chatml"])
    for name in ("v3", "chatml"):
        assert load_template(BUILT_IN[name].model_dump(mode="json"), tokenizer) == load_template(name, tokenizer)
