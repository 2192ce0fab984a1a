"""Our ids against mistral-common's on random conversations, for both released instruct formats."""

import json
import random
from importlib import resources

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_jax.data.text.chat import encode_chat, encode_prompt
from mixtral_jax.data.text.template import load_template
from mixtral_jax.data.text.tokenizer import load_tokenizer

MODEL_FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
PIECES = [
    "Hello",
    " world",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "Ünïcödé",
    "日本語",
    "🙂",
    "👩‍👩‍👧",
    "\u00a0",
    "[INST]",
    "[/INST]",
]
PIECES += [
    " [INST] ",
    "</s>",
    "<s>",
    "2+2?",
    "def f(x):\n    return x",
    "{content}",
    "[TOOL_CALLS]",
    "<0x0A>",
    "ﬁ",
    ".",
]
ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.fixture(scope="module", params=["v1", "v3"])
def sides(request):
    """(name, mistral-common in the two modes, our template)."""
    path = resources.files("mistral_common") / "data" / MODEL_FILES[request.param]
    tokenizer = load_tokenizer(str(path))
    modes = (ValidationMode.finetuning, ValidationMode.test)
    theirs = [MistralTokenizer.from_file(str(path), mode=mode) for mode in modes]
    return request.param, *theirs, load_template(request.param, tokenizer)


def text(rng, *, empty_allowed=False):
    while True:
        chosen = "".join(rng.choices(PIECES, k=rng.randint(0 if empty_allowed else 1, 6)))
        if empty_allowed or chosen.strip():
            return chosen


def chat(rng):
    """Optional system prompts, then 1 to 4 exchanges."""
    messages = [
        {"role": "system", "content": text(rng, empty_allowed=True)} for _ in range(rng.choice([0, 0, 1, 1, 2]))
    ]
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text(rng, empty_allowed=True)})
        messages.append({"role": "assistant", "content": text(rng)})
    return messages


def ids_of(tokenizer, messages, tools=None):
    return tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages, tools=tools)).tokens


def test_random_conversations(sides):
    _, finetuning, serving, template = sides
    rng = random.Random(5)
    for _ in range(300):
        messages = chat(rng)
        ids, trainable = encode_chat(messages, template)
        assert ids == ids_of(finetuning, messages), messages
        assert encode_prompt(messages[:-1], template) == ids_of(serving, messages[:-1]), messages
        answers = sum(m["role"] == "assistant" for m in messages)
        borders = sum(a != b for a, b in zip([False, *trainable], [*trainable, False], strict=True))
        assert borders == 2 * answers and sum(i == 2 for i in ids) == answers


def arguments(rng):
    value = {text(rng): rng.choice([text(rng), 3, 1.5, None, [True, {"ü": "é"}]]) for _ in range(rng.randint(0, 2))}
    return rng.choice([value, json.dumps(value), json.dumps(value, ensure_ascii=False), "", "no json {"])


def tool_chat(rng):
    """Exchanges in which some answers first call one or two functions."""
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        if rng.random() < 0.7:
            ids = ["".join(rng.choices(ALNUM, k=9)) for _ in range(rng.randint(1, 2))]
            calls = [{"id": i, "function": {"name": f"f_{i}", "arguments": arguments(rng)}} for i in ids]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            for i in ids:
                result = rng.choice([text(rng), "", '{"a":  1}', "[1,2]", "3"])
                messages.append({"role": "tool", "content": result, "tool_call_id": i})
        messages.append({"role": "assistant", "content": text(rng)})
    if rng.random() < 0.3:  # a conversation may end with a call, whose id may be absent
        call = {"function": {"name": "last", "arguments": arguments(rng)}}
        id_ = rng.choice([{}, {"id": "null"}, {"id": "abcdefgh1"}])
        messages += [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [{**call, **id_}]}]
    return messages


def tool_definition(rng):
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}
    return {"type": "function", "function": function | rng.choice([{}, {"description": text(rng)}, {"strict": True}])}


def test_random_tool_use(sides):
    name, finetuning, serving, template = sides
    if name == "v1":
        with pytest.raises(ValueError, match="template v1 has no tool calls"):
            encode_chat(tool_chat(random.Random(1)), template)
        return
    rng = random.Random(6)
    for _ in range(200):
        messages = tool_chat(rng)
        tools = [tool_definition(rng) for _ in range(rng.randint(0, 2))]
        expected = ids_of(finetuning, messages, tools)
        assert encode_chat(messages, template, tools=tools)[0] == expected, messages
        if messages[-1].get("content"):
            prompt = encode_prompt(messages[:-1], template, tools=tools)
            assert prompt == ids_of(serving, messages[:-1], tools), messages
