"""Chat templates in jinja: which of ours one is, and ours written as jinja."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.data.text import encode_prompt, load_template, load_tokenizer, tokenizer_files, usual_template
from mixtral_jax.data.text.export import as_jinja
from mixtral_jax.data.text.formats import BUILT_IN
from mixtral_jax.data.text.jinja import recognise

MODEL = Path(__file__).resolve().parents[2] / "data" / "samples" / "tokenizer.model"
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{'<|'+m['role']+'|>\n'+m['content']+'</s>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|assistant|>\n'}}{% endif %}"
)
V1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("name", BUILT_IN)
def test_ours_as_jinja_is_recognised(name: str) -> None:
    found = recognise(as_jinja(BUILT_IN[name]), load_tokenizer(MODEL))
    assert found == BUILT_IN[name].model_copy(update={"spaces": False})


@pytest.mark.parametrize(
    ("jinja", "name", "changed"),
    [
        (CHATML, "chatml", {}),
        ("{{ bos_token }}" + CHATML, "chatml", {"bos": True}),
        (ZEPHYR, "zephyr", {}),
        (ZEPHYR.replace("m['content']", "m['content'] | trim"), "zephyr", {"trim": "all"}),
        (V1, "v1", {"system": "refuse", "spaces": False}),
    ],
)
def test_variants_are_recognised(jinja: str, name: str, changed: dict[str, Any]) -> None:
    assert recognise(jinja, load_tokenizer(MODEL)) == BUILT_IN[name].model_copy(update=changed)


@pytest.mark.parametrize(
    "jinja",
    [
        CHATML.replace("user", "human").replace("<|im_start|>", "<|turn|>"),
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML,
        "{{ nothing.here }}",
        "{% for",
        "",
    ],
)
def test_others_are_not(jinja: str, tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(jinja)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="of no known format: name one of v1, v3, chatml, zephyr, llama3"):
        usual_template(tokenizer)
    assert load_template("v1", tokenizer).format.name == "v1"  # named by a person


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' * 99999999999 }}",
    ],
)
def test_a_template_without_end_is_of_no_known_format(jinja: str) -> None:
    assert recognise(jinja, load_tokenizer(MODEL)) is None


def test_the_template_of_a_directory_is_used_wherever_it_lies(tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path)
    for file, content in {
        "chat_template.jinja": ZEPHYR,
        "tokenizer_config.json": json.dumps({"chat_template": ZEPHYR}),
        "chat_template.json": json.dumps({"chat_template": [{"name": "default", "template": ZEPHYR}]}),
    }.items():
        (tmp_path / file).write_text(content)
        assert load_template(None, load_tokenizer(tmp_path)).format.name == "zephyr"
        (tmp_path / file).unlink()


def test_what_belongs_to_a_tokenizer_is_made_or_kept(tmp_path: Path) -> None:
    files = tokenizer_files(MODEL, "zephyr")
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} < set(files)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 2
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    old = {"tokenizer.model": MODEL.read_bytes(), "chat_template.json": b'{"chat_template": "other"}', "note.txt": b""}
    assert tokenizer_files(old, "zephyr") == files | {"note.txt": b""}  # two templates would contradict each other
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == load_tokenizer(MODEL).fingerprint()
    assert usual_template(again).name == "zephyr"
    assert tokenizer_files(tmp_path, "zephyr") == files  # and a second time: as they are
    chat = [{"role": "user", "content": "hi"}]
    want = [*again.encode("<|user|>\nhi"), 2, *again.encode("\n<|assistant|>\n")]
    assert encode_prompt(chat, load_template("zephyr", again)) == want
