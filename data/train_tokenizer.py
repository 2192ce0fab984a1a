"""`data train-tokenizer`: a SentencePiece BPE model from files of text."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece as spm

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.prepare import write_atomically
from mixtral_jax.data.progress import meter
from mixtral_jax.data.records import Census, read_lumps, source_files, text_size_estimate
from mixtral_jax.data.text import SentencePieceTokenizer

_MAX_BYTES = 200_000_000  # of text


def train_tokenizer(
    inputs: Sequence[str], vocab_size: int, out: str | Path, *, text_key: str = "text", force: bool = False
) -> SentencePieceTokenizer:
    """Trains on files, directories or globs of any format that sources may have, and writes `out`.

    With a directory as `out`, or a name without extension, the file is `out/tokenizer.model`. The same text in the
    same order gives the same file. At most 200 MB of text are used, an equal share of each input.

    Raises:
        ValueError: no input, a bad record, text too small for `vocab_size`, or `out` exists without `force`.
    """
    path = Path(out)
    path = path if path.suffix else path / "tokenizer.model"
    if path.exists() and not force:
        raise ValueError(f"{path} exists already: choose another name, or --force")
    if not inputs:
        raise ValueError("no input: name the files to train the tokenizer on")
    model = train_sentencepiece(_texts(inputs, text_key, _MAX_BYTES // len(inputs)), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model)
    return SentencePieceTokenizer(path)


def _texts(inputs: Sequence[str], key: str, share: int) -> Iterator[str]:
    """The first `share` bytes of text of each input."""
    sources = [SourceConfig(name=f"input{i}", path=path, text_key=key) for i, path in enumerate(inputs)]
    files = [source_files(source) for source in sources]
    census = Census(skip=False)
    with meter("Reading", sum(map(text_size_estimate, files))) as advance:
        for source, names in zip(sources, files, strict=True):
            left = share
            for lump in (lump for file in names for lump in read_lumps(source, file, (key,), census)):
                if left <= 0:
                    break
                for number, record in lump.parse(census):
                    text = record.get(key)
                    if not isinstance(text, str):
                        raise ValueError(f"{lump.where(number)}: no text under {key!r}")
                    left -= len(text)
                    yield text
                advance(lump.size, "")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, *, max_bytes: int = _MAX_BYTES) -> bytes:
    """A BPE model with the settings of Mixtral's: byte fallback, single digits, no normalisation, unk 0, bos 1, eos 2.

    Reads the first `max_bytes` of text. The same text gives the same bytes.

    Raises:
        ValueError: the text is empty or too small for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.9999,
            max_sentence_length=1 << 16,
            num_threads=4,  # stored in the model: not the number of cores here
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer with vocab_size {vocab_size}: {error}") from None
    return model.getvalue()


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                max_bytes -= len(line)
                yield line
        if max_bytes <= 0:
            return
