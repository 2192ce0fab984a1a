"""`data train-tokenizer`: a SentencePiece BPE model from files of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.prepare.cache import write_atomically
from mixtral_jax.data.progress import meter
from mixtral_jax.data.records.lump import Census
from mixtral_jax.data.records.sources import read_lumps, source_files, text_size_estimate
from mixtral_jax.data.text.tokenizer import SentencePieceTokenizer, train_sentencepiece


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    out: str | Path,
    *,
    text_key: str = "text",
    max_bytes: int = 200_000_000,
    force: bool = False,
    progress: bool = True,
) -> SentencePieceTokenizer:
    """Trains on files, directories or globs of any format that sources may have, and writes `out`.

    With a directory as `out`, or a name without extension, the file is `out/tokenizer.model`. The same text in the
    same order gives the same file. At most `max_bytes` of text are used, an equal share of each input.

    Raises:
        ValueError: no input, a bad record, text too small for `vocab_size`, or `out` exists without `force`.
    """
    path = Path(out)
    path = path if path.suffix else path / "tokenizer.model"
    if path.exists() and not force:
        raise ValueError(f"{path} exists already: choose another name, or force")
    if not inputs:
        raise ValueError("no input: name the files to train the tokenizer on")
    model = train_sentencepiece(
        _texts(inputs, text_key, max_bytes // len(inputs), progress), vocab_size, max_bytes=max_bytes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model)
    return SentencePieceTokenizer(path)


def _texts(inputs: Sequence[str], key: str, share: int, progress: bool) -> Iterator[str]:
    """The first `share` bytes of text of each input."""
    sources = [SourceConfig(name=f"input{i}", path=path, text_key=key) for i, path in enumerate(inputs)]
    files = [source_files(source) for source in sources]
    census = Census(skip=False)
    with meter("Reading", sum(map(text_size_estimate, files)), show=progress) as advance:
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
