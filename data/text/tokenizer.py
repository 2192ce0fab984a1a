"""Text to token ids and back: SentencePiece models and Hugging Face tokenizer.json behind one interface."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece as spm

from mixtral_jax.data.records import check_file

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "<|eot_id|>")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. `encode` adds neither BOS nor EOS."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and for each the place in the text behind its last character."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def id_of(self, piece: str) -> int | None:
        """Id of a piece of the vocabulary, None where there is none."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that changes the ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model file, as the released Mistral and Mixtral checkpoints have."""

    def __init__(self, path: Path):
        self._model = path.read_bytes()
        try:
            self.processor = spm.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error})") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} lacks a BOS or EOS piece: documents cannot be told apart")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        found = self.processor.encode(text, return_type="offset_mapping")
        ends = [len(text)]
        for first, end in reversed(found["offsets"]):  # of the bytes of a character, only the last has its place
            ends.append(end if end > first else ends[-1])
        return found["ids"], ends[:0:-1]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: prepare() already runs one process a core.
        return self.processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def id_of(self, piece: str) -> int | None:
        found = self.processor.piece_to_id(piece)
        return found if self.processor.id_to_piece(found) == piece else None

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()


class HuggingFaceTokenizer:
    """A tokenizer.json. BOS and EOS come from the files beside it, else from their usual names."""

    def __init__(self, path: Path):
        # The library starts one thread a core for a batch; prepare() already runs one process a core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self._model = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._model)
        except Exception as error:  # the library raises bare Exception for any unreadable file
            raise ValueError(f"{path} is not a tokenizer.json ({error})") from None
        self._tokenizer.encode_special_tokens = True  # "</s>" inside a document is text, not the end of it
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = (
            None  # adds tokens that we never ask for, and cuts spaces off places in the text
        )
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special(path, "bos_token", _BOS_NAMES)
        self.eos_id = self._special(path, "eos_token", _EOS_NAMES)

    def _special(self, path: Path, key: str, usual: tuple[str, ...]) -> int:
        named: list[str] = []
        for file in (path.parent / name for name in _SIDE_FILES):
            value: Any = json.loads(file.read_bytes()).get(key) if file.exists() else None
            value = value.get("content") if isinstance(value, dict) else value
            if value:
                named.append(value)
        for token in named or usual:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is not None:
                return token_id
        tried = ", ".join(named or usual)
        raise ValueError(f"{path} has no {key} (looked for {tried}): name it in tokenizer_config.json beside it")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, [end for _, end in found.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model + f"{self.bos_id} {self.eos_id}".encode()).hexdigest()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a SentencePiece model, a tokenizer.json, or a directory (SentencePiece first: it is faster).

    Raises:
        ValueError: no such file, no tokenizer in the directory, or a file that is not one.
    """
    path = Path(path)
    _check_files(path)
    if path.is_dir():
        candidates = [path / "tokenizer.model", *sorted(path.glob("*.model*")), path / "tokenizer.json"]
        found = next((p for p in candidates if p.is_file()), None)
        if found is None:
            raise ValueError(f"{path} holds neither tokenizer.model nor tokenizer.json")
        path = found
    if not path.is_file():
        raise ValueError(f"tokenizer {path} does not exist")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _check_files(path: Path) -> None:
    """Of a tokenizer and beside it nothing may be a pipe, which never ends, or a Git LFS pointer: see check_file."""
    beside = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*")
    directory, patterns = (path, ("*.model*", "tokenizer.json", *beside)) if path.is_dir() else (path.parent, beside)
    for file in [path, *sorted(file for pattern in patterns for file in directory.glob(pattern))]:
        if os.path.lexists(file) and not file.is_dir():
            check_file(str(file))
