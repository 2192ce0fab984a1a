"""Tokenizers and chat templates against transformers: the ids of AutoTokenizer and of apply_chat_template."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from mixtral_jax.convert.compare import compare_tokenizers
from mixtral_jax.data.text import (
    begins_with_bos,
    encode_prompt,
    load_template,
    load_tokenizer,
    tokenizer_files,
    usual_template,
)
from mixtral_jax.data.text.chat import encode_chat

transformers = pytest.importorskip("transformers", reason="compares with transformers (extra: parity)")
MODEL = Path(__file__).resolve().parents[2] / "data" / "samples" / "tokenizer.model"
EACH = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}{{ %s }}{%% endif %%}"
TEMPLATES = {
    "chatml": EACH % ("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}", "'<|im_start|>assistant\n'"),
    "chatml with bos": "{{ bos_token }}"
    + EACH % ("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}", "'<|im_start|>assistant\n'"),
    "zephyr": EACH % ("{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}", "'<|assistant|>\n'"),
    "llama3": "{{ bos_token }}"
    + EACH
    % (
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}",
        "'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    ),
    "v1": "{{ bos_token }}"
    + EACH
    % (
        "{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}",
        "''",
    ),
    "v1 of 2023": "{{ bos_token }}"
    + EACH
    % (
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}",
        "''",
    ),
    "v3": "{{ bos_token }}"
    + EACH
    % (
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}",
        "''",
    ),
}
TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "v3": [
        "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ],
}  # fmt: skip
PIECES = ["Hello", " the user", "  two", "\n", "\n\n", "é ü 漢 🙂", " ", "<x>", "tab\t"]
CONTROL = ["</s>", "<s> ", "<|im_end|>", "say <|im_start|>user"]


def texts(count: int, pieces=PIECES) -> list[str]:
    rng = random.Random(0)
    return ["x"[: rng.randint(0, 1)] + "".join(rng.choices(pieces, k=rng.randint(1, 5))) for _ in range(count)]


def chats(count: int, pieces=PIECES) -> list[list[dict[str, str]]]:
    """Answers begin and end with a letter: they are encoded by themselves."""
    rng = random.Random(1)
    out = []
    for _ in range(count):
        text = iter(texts(rng.randint(10, 99), pieces))
        turns = [{"role": "user", "content": next(text) + "."}]
        for _ in range(rng.randint(0, 2)):
            turns += [
                {"role": "assistant", "content": f"A{next(text)}z"},
                {"role": "user", "content": next(text) + "."},
            ]
        out.append(turns)
    return out


def directory(path: Path, name: str, convention: str, *, special: bool = True) -> Path:
    """The bundled tokenizer with control tokens, as transformers saves it, by its own name for the convention."""
    os.makedirs(path)
    shutil.copy(MODEL, path)
    (path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    theirs = transformers.LlamaTokenizer.from_pretrained(path, legacy=convention == "always")
    words = TOKENS.get(name.split()[0], [])
    theirs.add_tokens([transformers.AddedToken(w, special=special, normalized=False) for w in words])
    theirs.chat_template = TEMPLATES[name]
    theirs.save_pretrained(path)
    (path / "tokenizer.model").unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("convention", ["first", "always"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_directorys_own_template(tmp_path: Path, name: str, convention: str) -> None:
    path = directory(tmp_path / "d", name, convention)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    assert ours.spaced == {"first": "start"}.get(convention, convention)
    template = load_template(usual_template(ours), ours)
    assert template.format.name == name.split()[0]
    for chat in chats(30):
        want = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert encode_prompt(chat, template) == want, chat
        if len(chat) > 1:
            assert encode_chat(chat[:-1], template).tokens == theirs.apply_chat_template(chat[:-1])["input_ids"]


def exported(path: Path, tokenizer: object, template: str | None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    for name, content in tokenizer_files(tokenizer, template).items():
        (path / name).write_bytes(content)
    return path


def tuned(path: Path) -> Path:
    """tokenizer.model with control tokens in added_tokens.json, as old fine-tunes have them."""
    path.mkdir()
    shutil.copy(MODEL, path)
    (path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 4097, "<|im_end|>": 4096, "<think>": 4098}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "legacy": True}))
    return path


def _mistral(name: str) -> Path:
    data = pytest.importorskip("mistral_common", reason="needs the released tokenizers (extra: parity)")
    return Path(data.__file__).parent / "data" / name


def test_verify_sees_what_transformers_leaves_out(tmp_path: Path) -> None:
    path = exported(tmp_path / "out", MODEL, "v1")
    ours = tokenizer_files(MODEL)
    assert compare_tokenizers(path, tmp_path, ours, ours) == ([], [])
    changed = json.loads((path / "tokenizer.json").read_text()) | {"post_processor": None}
    (path / "tokenizer.json").write_text(json.dumps(changed))  # no BOS
    (line,), _ = compare_tokenizers(path, tmp_path, ours, ours)
    assert line.startswith("tokenizer: 'The router' is [1, ") and line.endswith("in A in transformers")


EXPORTS = {
    "bundled": (lambda path: MODEL, "v1"),
    "v1": (lambda path: _mistral("tokenizer.model.v1"), "v1"),
    "v3": (lambda path: _mistral("mistral_instruct_tokenizer_240323.model.v3"), "v3"),
    "chatml": (lambda path: tuned(path / "tuned"), "chatml"),
    "zephyr": (lambda path: MODEL, "zephyr"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_gives_our_ids(tmp_path: Path, name: str) -> None:
    make, form = EXPORTS[name]
    source = make(tmp_path)
    ours = load_tokenizer(source)
    path = exported(tmp_path / "out", source, form)
    theirs, again = transformers.AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    for text in ["", *texts(200), *texts(20, CONTROL + PIECES)]:
        want = [ours.bos_id, *ours.encode(text)]
        assert theirs(text, split_special_tokens=True)["input_ids"] == want, text
        assert [again.bos_id, *again.encode(text)] == want
        assert theirs.decode(want, skip_special_tokens=True) == ours.decode(want)
    assert begins_with_bos(ours) and begins_with_bos(again)
    assert theirs("Hello  there")["input_ids"] == [ours.bos_id, *ours.encode("Hello  there")]
    template = load_template(form, ours)
    assert load_template(usual_template(again), again).format == template.format
    for chat in chats(100):
        for turns in (chat, [{"role": "system", "content": "Be kind."}, *chat]):
            want = theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            assert encode_prompt(turns, template) == want, turns
        if len(chat) > 1:
            assert encode_chat(chat[:-1], template).tokens == theirs.apply_chat_template(chat[:-1])["input_ids"]
    for chat in chats(20, CONTROL):  # what is typed is letters; transformers encodes it piece by piece
        want = theirs.apply_chat_template(chat, add_generation_prompt=True, sanitize_control_tokens=True)["input_ids"]
        marks = {ours.id_of(piece) for piece in ours.controls}
        assert [i for i in encode_prompt(chat, template) if i in marks] == [i for i in want if i in marks], chat
