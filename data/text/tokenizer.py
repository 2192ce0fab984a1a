"""Text to token ids and back: SentencePiece models and Hugging Face tokenizer.json behind one interface.

A control token (BOS, `<|im_end|>`, `[INST]`) is never made from text: whoever types its name gets the letters.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import sentencepiece as spm

from mixtral_jax.data.records import is_remote
from mixtral_jax.data.text.side_files import (
    added_tokens,
    chat_template_of,
    check_files,
    ends_of,
    from_address,
    named,
    named_id,
    sentencepiece_file,
    side_files,
)

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "<|eot_id|>")
# Added tokens that count as control tokens whatever their files call them; `<think>` and the like are words.
_CONTROL = re.compile(r"<\|[^|]+\|>|</?s>|<(?:bos|eos|pad|unk)>|\[/?[A-Z_]+\]")
_MARK = "\U0010fffd"  # stands for an id without a piece while others are decoded; no text holds it
_CONTROL_TYPE, _USER_TYPE = 3, 4  # of a SentencePiece model's pieces

# Where a text stands: it begins a sequence, or follows a control token, or other text. Many tokenizers put a space in
# front of a text: of the first alone (transformers 5), or of each that follows a control token (SentencePiece).
Place = Literal["start", "control", "text"]


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. `encode` adds neither BOS nor EOS."""

    vocab_size: int
    bos_id: int
    eos_id: int
    ends: tuple[int, ...]  # further ids that end a text, from generation_config.json
    chat_template: str | None  # of its directory, in jinja
    notes: tuple[str, ...]  # what people should know of how it was read
    files: dict[str, bytes]  # what it was read from, by the usual names

    def encode(self, text: str, place: Place = "start") -> list[int]: ...
    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and for each the place in the text behind its last character."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; one that has no piece is shown as ⟨id⟩."""
        ...

    def id_of(self, piece: str) -> int | None:
        """Id of a piece of the vocabulary, None where there is none."""
        ...

    def piece_of(self, id_: int) -> str: ...

    @property
    def controls(self) -> frozenset[str]:
        """The pieces that are never made from text."""
        ...

    @property
    def spaced(self) -> Literal["never", "start", "always"]:
        """Of which texts it puts a space in front: of none, of the start of a sequence, after control tokens, too."""
        ...

    def reserve(self, pieces: Sequence[str]) -> None:
        """From now on these are control tokens."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that changes the ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model file, as the released Mistral and Mixtral checkpoints have.

    Args:
        side: a directory whose files name tokens beyond those of the model (`added_tokens.json`,
            `tokenizer_config.json`), or other BOS and EOS. Text on both sides of such a token is encoded by itself.
    """

    ends: tuple[int, ...] = ()
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, side: Path | None = None):
        self.model = path.read_bytes()
        self.files = {"tokenizer.model": self.model}
        try:
            self.processor = spm.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error})") from None
        size = self.processor.vocab_size()
        self._added = {} if side is None else added_tokens(side, size)
        self.vocab_size = max([size - 1, *self._added.values()]) + 1
        self._pieces = {id_: piece for piece, id_ in self._added.items()}
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if side is not None:
            self.bos_id = named_id(side, "bos_token", self.id_of, self.bos_id)
            self.eos_id = named_id(side, "eos_token", self.id_of, self.eos_id)
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} lacks a BOS or EOS piece: documents cannot be told apart")
        ask: Any = self.processor
        pieces, control = ask.id_to_piece(list(range(size))), ask.is_control(list(range(size)))
        added = filter(_CONTROL.fullmatch, self._added)
        self.controls: frozenset[str] = frozenset([*itertools.compress(pieces, control), *added])
        self.reserve([piece for piece in pieces if _CONTROL.fullmatch(piece)])

    @property
    def words(self) -> dict[str, int]:
        """Tokens beyond those of the model, in the order of their ids."""
        return dict(sorted(self._added.items(), key=lambda item: item[1]))

    @property
    def spaced(self) -> Literal["never", "start", "always"]:
        return "always" if self.processor.encode("a") != self._inside.encode("a") else "never"

    @cached_property
    def _inside(self) -> spm.SentencePieceProcessor:
        """For text that follows other text: no space is put in front."""
        return _changed(self.processor, lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False))

    def encode(self, text: str, place: Place = "start") -> list[int]:
        ids: list[int] = []
        for part, word in self._split(text):
            first = self._inside if place == "text" and not ids else self.processor
            ids += first.encode(part) if word is None else [word]
        return ids

    def _split(self, text: str) -> list[tuple[str, int | None]]:
        """At the words that the files beside the model add; these with their ids."""
        words = sorted(self._added.keys() - self.controls, key=len, reverse=True)
        if not words:
            return [(text, None)]
        parts = re.split("(" + "|".join(map(re.escape, words)) + ")", text)
        return [(part, self._added[part] if i % 2 else None) for i, part in enumerate(parts)]

    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        ends: list[int] = []
        at = 0
        for part, word in self._split(text):
            more, places = self._encode_ends(part) if word is None else ([word], [len(part)])
            ids, ends, at = ids + more, ends + [at + place for place in places], at + len(part)
        return ids, ends

    def _encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        found = self.processor.encode(text, return_type="offset_mapping")
        ends = [len(text)]
        for first, end in reversed(found["offsets"]):  # of the bytes of a character, only the last has its place
            ends.append(end if end > first else ends[-1])
        return found["ids"], ends[:0:-1]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._added.keys() - self.controls:
            return [self.encode(text) for text in texts]
        # One thread: prepare() already runs one process a core.
        return self.processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return _decode(self.processor.decode, self._inside.encode, ids, self.processor.vocab_size(), self._pieces)

    def id_of(self, piece: str) -> int | None:
        if piece in self._added:
            return self._added[piece]
        found = self.processor.piece_to_id(piece)
        return found if self.processor.id_to_piece(found) == piece else None

    def piece_of(self, id_: int) -> str:
        return self._pieces[id_] if id_ in self._pieces else self.processor.id_to_piece(id_)

    def reserve(self, pieces: Sequence[str]) -> None:
        new = {piece for piece in pieces if piece not in self.controls and self.id_of(piece) is not None}
        self.controls |= new
        if new - self._added.keys():

            def change(proto: Any) -> None:
                for piece in proto.pieces:
                    if piece.piece in new and piece.type == _USER_TYPE:
                        piece.type = _CONTROL_TYPE

            self.processor = _changed(self.processor, change)
            self.__dict__.pop("_inside", None)

    def fingerprint(self) -> str:
        changed = f"{self._added} {self.bos_id} {self.eos_id}".encode() if self._added else b""
        return hashlib.sha256(self.model + changed).hexdigest()


def control_words(text: str) -> list[str]:
    """What in a text looks like a control token."""
    return _CONTROL.findall(text)


def _changed(processor: spm.SentencePieceProcessor, change: Callable[[Any], None]) -> spm.SentencePieceProcessor:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made at run time
    proto = messages.ModelProto.FromString(processor.serialized_model_proto())
    change(proto)
    return spm.SentencePieceProcessor(model_proto=proto.SerializeToString())


class HuggingFaceTokenizer:
    """A tokenizer.json. BOS and EOS come from the files beside it, else from their usual names."""

    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path):
        # The library starts one thread a core for a batch; prepare() already runs one process a core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._model, self._content = path.read_bytes(), {}
        self.files = {"tokenizer.json": self._model, **side_files(path.parent)}
        try:
            self._content = json.loads(self._model)
            added = self._content.get("added_tokens") or ()
            ends = {name for key in ("bos_token", "eos_token") for name in named(path.parent, key)}
            self._reserved = sorted(
                t["content"]
                for t in added
                if not t["special"] and (_CONTROL.fullmatch(t["content"]) or t["content"] in ends)
            )
            for token in added:
                token["special"] = token["special"] or token["content"] in self._reserved
            self.controls: frozenset[str] = frozenset(token["content"] for token in added if token["special"])
            self._tokenizer = _tokenizer(self._content)
        except Exception as error:  # the library raises bare Exception for any unreadable file
            raise ValueError(f"{path} is not a tokenizer.json ({error})") from None
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._special(path, "bos_token", _BOS_NAMES)
        self.eos_id = self._special(path, "eos_token", _EOS_NAMES)
        self.chat_template = chat_template_of(path.parent)

    def _special(self, path: Path, key: str, usual: tuple[str, ...]) -> int:
        told = named(path.parent, key)
        for token in told or usual:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is not None:
                return token_id
        tried = ", ".join(told or usual)
        raise ValueError(f"{path} has no {key} (looked for {tried}): name it in tokenizer_config.json beside it")

    @cached_property
    def spaced(self) -> Literal["never", "start", "always"]:
        if _encode(self._tokenizer, "a") == _encode(self._inside, "a"):
            return "never"
        return "start" if '"prepend_scheme": "first"' in json.dumps(self._content["pre_tokenizer"]) else "always"

    @cached_property
    def _inside(self) -> Any:
        """For text that follows other text: no space is put in front."""
        return _tokenizer(_without_prefix(self._content))

    def encode(self, text: str, place: Place = "start") -> list[int]:
        inside = place == "text" or (place == "control" and self.spaced == "start")
        return _encode(self._inside if inside else self._tokenizer, text)

    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, [end for _, end in found.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return _decode(self._tokenizer.decode, lambda text: _encode(self._inside, text), ids, self.vocab_size, {})

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def piece_of(self, id_: int) -> str:
        return self._tokenizer.id_to_token(id_)

    def reserve(self, pieces: Sequence[str]) -> None:
        new = {piece for piece in pieces if piece not in self.controls and self.id_of(piece) is not None}
        if not new:
            return
        self.controls |= new
        for token in self._content.get("added_tokens") or ():
            token["special"] = token["special"] or token["content"] in new
        self._tokenizer = _tokenizer(self._content)
        self.__dict__.pop("_inside", None)

    def fingerprint(self) -> str:
        changed = f"{self.bos_id} {self.eos_id}" + f" {self._reserved}" * bool(self._reserved)
        return hashlib.sha256(self._model + changed.encode()).hexdigest()


def _tokenizer(content: Mapping[str, Any]) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True  # "</s>" inside a document is text, not the end of it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # adds tokens that we never ask for, and cuts spaces off places in the text
    return tokenizer


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _without_prefix(step: Any) -> Any:
    """The same tokenizer.json, or a part of it, that puts no space in front of a text."""
    if isinstance(step, list):
        return [_without_prefix(s) for s in step if not (isinstance(s, dict) and s.get("type") == "Prepend")]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    out = dict(step)
    if out.get("type") == "Metaspace":
        out |= {"prepend_scheme": "never"} if "prepend_scheme" in out else {"add_prefix_space": False}
    elif out.get("type") == "ByteLevel":
        out["add_prefix_space"] = False
    for key in ("pre_tokenizer", "normalizer", "pretokenizers", "normalizers"):
        if key in out:
            out[key] = _without_prefix(out[key])
    return out


def _decode(
    decode: Callable[[list[int]], str], encode: Callable[[str], list[int]], ids: Sequence[int], size: int,
    pieces: Mapping[int, str],
) -> str:  # fmt: skip
    """Ids from `size` on, which `decode` does not know, are shown: words in `pieces` by name, control tokens not."""
    ids = [int(i) for i in ids]
    unknown = [i for i in ids if not 0 <= i < size]
    if not unknown:
        return decode(ids)
    mark = encode(_MARK)
    shown = (("" if _CONTROL.fullmatch(p) else p) if (p := pieces.get(i)) else f"⟨{i}⟩" for i in unknown)
    text = decode([t for i in ids for t in (mark if not 0 <= i < size else [i])])
    return re.sub(_MARK, lambda _: next(shown, ""), text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a SentencePiece model, a tokenizer.json, or a directory, here or behind an address.

    Of a directory that holds both, SentencePiece is taken, which is faster, unless the other files name more pieces
    or another BOS or EOS; a note says so.

    Raises:
        ValueError: no such file, no tokenizer in the directory, or a file that is not one.
        OSError: the address does not answer.
    """
    if is_remote(str(path)):
        return from_address(str(path), load_tokenizer)
    path = Path(path)
    check_files(path)
    if path.is_dir():
        return _from_directory(path)
    if not path.is_file():
        raise ValueError(f"tokenizer {path} does not exist")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _from_directory(path: Path) -> Tokenizer:
    model, rich = sentencepiece_file(path), path / "tokenizer.json"
    if model is None and not rich.is_file():
        raise ValueError(f"{path} holds neither tokenizer.model nor tokenizer.json")
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    if model is None:
        tokenizer = HuggingFaceTokenizer(rich)
    else:
        plain = tokenizer = SentencePieceTokenizer(model)
        other = HuggingFaceTokenizer(rich) if rich.is_file() else SentencePieceTokenizer(model, side=path)
        facts = [
            f"{t.vocab_size} pieces, BOS {t.piece_of(t.bos_id)}, EOS {t.piece_of(t.eos_id)}" for t in (other, plain)
        ]
        if facts[0] != facts[1] and other.vocab_size >= plain.vocab_size:
            files = "tokenizer.json" if rich.is_file() else f"{model.name} with the files beside it"
            tokenizer = other
            tokenizer.notes = (f"{path}: {files} ({facts[0]}) is read rather than {model.name} ({facts[1]})",)
        tokenizer.chat_template = chat_template_of(path)
        tokenizer.files |= {"tokenizer.model": plain.model, **side_files(path)}
        tokenizer.files |= {"tokenizer.json": rich.read_bytes()} if rich.is_file() else {}
    tokenizer.ends = ends_of(path)
    if (pad := named(path, "pad_token")) and pad[0] == tokenizer.piece_of(tokenizer.eos_id):
        tokenizer.notes += (f"{path}: pad_token is eos_token {pad[0]}; here padding has no token, and EOS is learned",)
    return tokenizer
