"""The files with which transformers' AutoTokenizer gives our ids: tokenizer.json, its settings, the chat template."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.data.text.chat import encode_prompt
from mixtral_jax.data.text.formats import CONTENT, EOS, TOOL_TOKENS, TemplateFormat, TurnFormat
from mixtral_jax.data.text.jinja import CHAT, recognise
from mixtral_jax.data.text.template import load_template, usual_template
from mixtral_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # types of a SentencePiece model's pieces
_BPE = 2  # type of a model
_PRIVATE = 0xF0000  # from here on Unicode has characters for private use


def tokenizer_files(
    tokenizer: Tokenizer | Mapping[str, bytes] | str | Path, template: str | Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """What is put beside weights: the tokenizer's own files, and those of tokenizer.json, tokenizer_config.json,
    special_tokens_map.json, generation_config.json and chat_template.jinja that they lack.

    Args:
        tokenizer: one that is loaded, its files by their usual names, or its path.
        template: of chats; None: only the one that its files hold; auto: that, or the one that its tokens mean.

    Raises:
        ValueError: it is no tokenizer, or the template does not fit it.
    """
    if isinstance(tokenizer, Mapping):
        with tempfile.TemporaryDirectory(prefix="mixtral-jax-tokenizer-") as scratch:
            for name, content in tokenizer.items():
                (Path(scratch) / name).write_bytes(content)
            loaded = load_tokenizer(scratch)
        others = {name: content for name, content in tokenizer.items() if name not in loaded.files}
        return others | tokenizer_files(loaded, template)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    out = dict(tokenizer.files)
    config = json.loads(out.get("tokenizer_config.json", b"{}"))
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.id_of("<unk>")}
    names = {key: tokenizer.piece_of(id_) for key, id_ in special.items() if id_ is not None}
    if "tokenizer.json" not in out and isinstance(tokenizer, SentencePieceTokenizer):
        out["tokenizer.json"] = _dump(as_json(tokenizer), indent=None)
        out.pop("added_tokens.json", None)
        for key in ("added_tokens_decoder", "legacy", "add_prefix_space", "sp_model_kwargs"):
            config.pop(key, None)  # of another way to read tokenizer.model
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    if "bos_token" not in config:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names | config
    ends = [tokenizer.eos_id, *tokenizer.ends]
    if template == "auto":
        template = None if tokenizer.chat_template is not None else usual_template(tokenizer).name
    if template is not None:
        fitted = load_template(template, tokenizer)
        ends += fitted.answer_end if len(fitted.answer_end) == 1 else ()
        theirs = tokenizer.chat_template
        if theirs is None or recognise(theirs, tokenizer) != fitted.format:
            out.pop("chat_template.json", None)
            config.pop("chat_template", None)
            out["chat_template.jinja"] = as_jinja(fitted.format).encode()
    ends = list(dict.fromkeys(ends))
    generation = json.loads(out.get("generation_config.json", b"{}"))
    if not generation or template is not None:
        generation |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    out.setdefault("special_tokens_map.json", _dump(names))
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        if name not in out or json.loads(out[name]) != value:
            out[name] = _dump(value)
    return out


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers puts BOS in front of a text, given the files of `tokenizer_files`."""
    if "tokenizer.json" not in tokenizer.files:
        return True  # see `as_json`
    told = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get("add_bos_token")
    if told is not None:
        return told
    import tokenizers

    return tokenizers.Tokenizer.from_buffer(tokenizer.files["tokenizer.json"]).encode("a").ids[0] == tokenizer.bos_id


def tokenizer_facts(files: Mapping[str, bytes], texts: Sequence[str]) -> dict[str, Any]:
    """What two tokenizers must have in common: the ids of each text behind BOS, EOS, what ends a text, and a chat's ids
    (its template where that is of no known format).

    Raises:
        ValueError: they hold no tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix="mixtral-jax-tokenizer-") as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        tokenizer = load_tokenizer(scratch)
    facts: dict[str, Any] = {text: [tokenizer.bos_id, *tokenizer.encode(text)] for text in texts}
    facts |= {"EOS": tokenizer.eos_id, "what ends a text": sorted({tokenizer.eos_id, *tokenizer.ends})}
    if tokenizer.chat_template is not None:
        try:
            facts["a chat"] = encode_prompt(CHAT, load_template(None, tokenizer))
        except ValueError:
            facts["a chat"] = tokenizer.chat_template
    return facts


def _dump(value: Any, indent: int | None = 2) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


# ---- SentencePiece as tokenizer.json


def as_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The tokenizer.json that gives the same ids, BOS put in front.

    A space goes in front of each text that begins or follows a control token, as SentencePiece puts it in front of a
    text: `Prepend` does that whatever the text begins with, `Metaspace` only where it does not begin with a space.
    A symbol of the model's own (type user-defined) is no added token, behind which there would be another space: a
    private character stands for it, which is the piece's name there.

    Raises:
        ValueError: the model is not BPE, or changes texts before it cuts them.
    """
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made at run time
    proto = messages.ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    rules = proto.normalizer_spec
    plain = not (rules.precompiled_charsmap or rules.remove_extra_whitespaces) and rules.escape_whitespaces
    if proto.trainer_spec.model_type != _BPE or proto.trainer_spec.treat_whitespace_as_suffix or not plain:
        raise ValueError("only SentencePiece models of kind BPE without normalisation can be written as tokenizer.json")
    prefix = [{"type": "Prepend", "prepend": "▁"}] if rules.add_dummy_prefix else []
    symbols = {p.piece: chr(_PRIVATE + i) for i, p in enumerate(proto.pieces) if p.type == _USER}
    longest = sorted(symbols.items(), key=lambda item: len(item[0]), reverse=True)
    changes = [(" ", "▁"), *longest]
    decoders = [_replace(new, old) for old, new in reversed(changes)]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    marked = [(i, p.piece, True) for i, p in enumerate(proto.pieces) if p.type in (_UNKNOWN, _CONTROL)]
    marked += [(i, word, word in tokenizer.controls) for word, i in tokenizer.words.items()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    unknown = next((p.piece for p in proto.pieces if p.type == _UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags, "special": special} for i, piece, special in marked],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, *(_replace(old, new) for old, new in changes)]},
        "pre_tokenizer": None,
        "post_processor": _begin_with(tokenizer.piece_of(tokenizer.bos_id), tokenizer.bos_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {symbols.get(p.piece, p.piece): i for i, p in enumerate(proto.pieces)},
            "merges": _merges(proto.pieces),
        },
    }


def _begin_with(bos: str, id_: int) -> dict[str, Any]:
    """A post-processor that puts BOS in front of each text."""
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    begin = [{"SpecialToken": {"id": bos, "type_id": i}} for i in range(2)]
    return {
        "type": "TemplateProcessing",
        "single": [begin[0], texts[0]],
        "pair": [begin[0], texts[0], begin[1], texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [id_], "tokens": [bos]}},
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _merges(pieces: Any) -> list[list[str]]:
    """Every way to make a piece of two others; SentencePiece makes the piece with the highest score first."""
    scores = {p.piece: p.score for p in pieces if p.type == _NORMAL}
    ways = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [[left, right] for _, left, right in sorted(ways, key=lambda way: way[0])]


# ---- a format as jinja


def as_jinja(fmt: TemplateFormat) -> str:
    """The chat_template with which transformers writes what we encode."""
    host = "ns.host < 0" if fmt.system == "first_user" else "true"
    out = ["{{- bos_token }}"] if fmt.bos else []
    out += [
        '{%- set ns = namespace(system="", host=-1, user=-1, list="") %}',
        "{%- for m in messages %}",
        '{%- if m.role == "system" and m.content %}',
        f'{{%- set ns.system = ns.system + ("\\n\\n" if ns.system else "") + {_content(fmt, "system")} %}}',
        '{%- elif m.role == "user" %}{%- set ns.user = loop.index0 %}',
        f"{{%- if {host} %}}{{%- set ns.host = loop.index0 %}}{{%- endif %}}",
        "{%- endif %}{%- endfor %}",
    ]
    before = '""'
    if fmt.system == "refuse":
        out.append(
            '{%- if ns.system %}{{- raise_exception("this template has no place for a system prompt") }}{%- endif %}'
        )
    elif isinstance(fmt.system, TurnFormat):
        out.append(f"{{%- if ns.system %}}{{{{- {_turn(fmt.system, 'ns.system')} }}}}{{%- endif %}}")
    else:
        before = f'(ns.system + {_quote(fmt.system_separator)} if ns.system and loop.index0 == ns.host else "")'
    out += ["{%- for m in messages %}", '{%- if m.role == "user" %}']
    if fmt.tool_calls == "mistral-v3":
        out += _tools(fmt)
    out += [
        f"{{{{- {_turn(fmt.user, before + ' + ' + _content(fmt, 'user'))} }}}}",
        '{%- elif m.role == "assistant" %}',
    ]
    answer = f"{{{{- {_turn(fmt.assistant, _content(fmt, 'assistant'))} }}}}"
    if fmt.tool_calls == "mistral-v3":
        calls = _turn(fmt.assistant, '"[" + ns.list + "]"', TOOL_TOKENS[0])
        out += ["{%- if m.tool_calls %}", *_calls(), f"{{{{- {calls} }}}}", "{%- else %}", answer, "{%- endif %}"]
    else:
        out.append(answer)
    if fmt.tool is not None:
        content = _content(fmt, "tool")
        if fmt.tool_calls == "mistral-v3":
            content = f"""'{{"content": ' + {content} | tojson + ', "call_id": ' + m.tool_call_id | tojson + '}}'"""
        out += ['{%- elif m.role == "tool" %}', f"{{{{- {_turn(fmt.tool, content)} }}}}"]
    out += [
        '{%- elif m.role != "system" %}{{- raise_exception("unknown role " + m.role) }}',
        "{%- endif %}{%- endfor %}",
    ]
    if fmt.assistant.open:
        out.append(f"{{%- if add_generation_prompt %}}{{{{- {_quote(fmt.assistant.open)} }}}}{{%- endif %}}")
    return "\n".join(out) + "\n"


def _quote(text: str) -> str:
    """A string of a template as an expression."""
    parts = [json.dumps(part, ensure_ascii=False) for part in text.split(EOS)]
    return " + eos_token + ".join(parts)


def _content(fmt: TemplateFormat, role: str) -> str:
    trim = " | trim" if fmt.trim == "all" or (fmt.trim == "answers" and role == "assistant") else ""
    return f"(m.content{trim})" + ('.rstrip(" ")' if fmt.strip_answer and role == "assistant" else "")


def _turn(turn: TurnFormat, content: str, tokens: str = "") -> str:
    before, behind = turn.text.split(CONTENT)
    return f"{_quote(turn.open + tokens + before)} + {content} + {_quote(behind + turn.close + turn.after)}"


def _tools(fmt: TemplateFormat) -> list[str]:
    lead = fmt.user.text.split(CONTENT)[0]
    return [
        "{%- if tools and loop.index0 == ns.user %}{%- set ns.list = [] %}{%- for t in tools %}",
        '{%- set ns.list = ns.list + [{"type": "function", "function": {"name": t.function.name, "description": '
        't.function.description or "", "parameters": t.function.parameters or {}}}] %}{%- endfor %}',
        f"{{{{- {_quote(TOOL_TOKENS[1] + lead)} + ns.list | tojson + {_quote(TOOL_TOKENS[2])} }}}}{{%- endif %}}",
    ]


def _calls() -> list[str]:
    return [
        '{%- set ns.list = "" %}{%- for c in m.tool_calls %}{%- set a = c.function.arguments or {} %}',
        """{%- set ns.list = ns.list + (", " if ns.list else "") + '{"name": ' + c.function.name | tojson + """
        """', "arguments": ' + (a if a is string else a | tojson) + (', "id": ' + c.id | tojson if c.id else "")"""
        """ + '}' %}{%- endfor %}""",
    ]
