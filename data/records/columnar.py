"""Readers of formats that hold records rather than lines: Parquet, ArrayRecord, TFDS, Hugging Face data sets."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records.files import (
    cannot_read,
    exists,
    is_directory,
    join,
    local_copy,
    local_directory,
    open_file,
)
from mixtral_jax.data.records.lump import Census, Lump, Place, Unit

_BATCH = 256
Records = Iterator[dict[str, Any] | None]  # None: a bad one, which was reported and has its number


def lumps(file: str, records: Iterable[Any], lump_bytes: int, before: int = 0) -> Iterator[Lump]:
    """Groups records into lumps of about `lump_bytes`; `before` stand in front of them in the file."""
    held: list[Any] = []
    size, first = 0, before + 1
    for record in records:
        held.append(record)
        size += 64 + sum(len(v) if isinstance(v, (str, bytes)) else 256 for v in (record or {}).values())
        if size >= lump_bytes:
            yield Lump(file, first, records=tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield Lump(file, first, records=tuple(held))


def _present(file: str, names: Iterable[str], columns: tuple[str, ...]) -> list[str]:
    names = list(names)
    found = [name for name in columns or names if name in names]
    if columns and not found:
        raise ValueError(f"{file} has no column {' or '.join(columns)}: it has {', '.join(names)}")
    return found


def parquet(source: SourceConfig, unit: Unit, columns: tuple[str, ...], census: Census) -> Records:
    """Records of the row groups of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = unit.file
    try:
        with open_file(file) as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
            wanted = _present(file, table.schema_arrow.names, columns)
            groups = list(range(table.num_row_groups))[unit.start : unit.stop]
            batches = table.iter_batches(_BATCH, row_groups=groups, columns=wanted, use_threads=False)
            yield from _rows(batches, file, census, unit.first)
    except (pa.ArrowException, OSError) as error:
        raise cannot_read(file, error, " as Parquet") from None


def row_groups(file: str) -> list[tuple[int, int]]:
    """(records, bytes before compression) of each row group of a Parquet file."""
    import pyarrow.parquet as pq

    with open_file(file) as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
        groups = map(table.metadata.row_group, range(table.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def hugging_face(source: SourceConfig, unit: Unit, columns: tuple[str, ...], census: Census) -> Records:
    """Records of a directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or of one arrow file."""
    for file in arrow_files(unit.file, source.split) if is_directory(unit.file) else [unit.file]:
        yield from _arrow(file, columns, census)


def arrow_files(directory: str, split: str | None) -> list[str]:
    """The files of a data set that was saved in a directory; ValueError where they are not there."""
    splits_file = join(directory, "dataset_dict.json")
    if has_splits := exists(splits_file):
        splits = noted(splits_file, lambda it: [str(name) for name in it["splits"]])
        if split not in splits:
            raise ValueError(f"{directory} has the splits {', '.join(splits)}: set split to one of them")
        directory = join(directory, str(split))
    state_file = join(directory, "state.json")
    if not exists(state_file):
        raise ValueError(f"{directory} has no state.json: it is no data set saved on disk")
    names, own = noted(state_file, lambda it: ([e["filename"] for e in it["_data_files"]], it.get("_split")))
    if split is not None and not has_splits and split != own:
        raise ValueError(f"{directory} is one data set, not several splits: leave split {split!r} out")
    files = [join(directory, name) for name in names]
    for file in files:
        if not exists(file):
            raise ValueError(f"{file} is missing, though {state_file} names it")
    return files


def noted(path: str, pick: Callable[[Any], Any]) -> Any:
    """What the hub's library noted in a file of JSON."""
    try:
        with open_file(path) as stream:
            return pick(json.load(stream))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not what save_to_disk writes, save the data set again") from None


def _arrow(file: str, columns: tuple[str, ...], census: Census) -> Records:
    import pyarrow as pa

    try:
        with open_file(file) as stream:
            is_file_format = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if is_file_format:
                reader = pa.ipc.open_file(stream)
                batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(stream)
                batches = reader
            wanted = _present(file, reader.schema.names, columns)
            slices = (b.select(wanted).slice(start, _BATCH) for b in batches for start in range(0, b.num_rows, _BATCH))
            yield from _rows(slices, file, census)
    except (pa.ArrowException, OSError) as error:
        raise cannot_read(file, error, " as Arrow") from None


def _rows(batches: Iterable[Any], file: str, census: Census, number: int = 0) -> Records:
    for batch in batches:
        try:
            readers = [(field.name, _reader(field.type)) for field in batch.schema]
            rows = batch.to_pylist(maps_as_pydicts="strict")
            records = [{name: read(row[name]) for name, read in readers} for row in rows]
        except (ValueError, LookupError, OverflowError, RecursionError) as error:
            if batch.num_rows > 1:  # a bad one among them: one at a time
                yield from _rows((batch.slice(i, 1) for i in range(batch.num_rows)), file, census, number)
            else:
                what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else _first_line(error)
                census.report(Place(file, number + 1), what)
                yield None
        else:
            yield from records
        number += batch.num_rows


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Leaves out the keys that a struct has only because another row needs them, which Arrow fills with null. What is
    kept as JSON, as `datasets` keeps values of more than one type, is read and has its own keys.
    """
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: value if value is None else json.loads(value)
    kind = getattr(kind, "storage_type", kind)
    if pa.types.is_struct(kind):
        fields = [(field.name, _reader(field.type)) for field in kind]
        return lambda value: value and {name: read(value[name]) for name, read in fields if value[name] is not None}
    if pa.types.is_map(kind):
        item = _reader(kind.item_type)
        return lambda value: value and {key: item(v) for key, v in value.items() if v is not None}
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):
        entry = _reader(kind.value_type)
        return lambda value: value and [entry(v) for v in value]
    return lambda value: value


def array_record(source: SourceConfig, unit: Unit, columns: tuple[str, ...], census: Census) -> Records:
    """Records of an ArrayRecord file: each a JSON object, or else the text itself, in UTF-8."""
    file, reader = unit.file, _array_reader(unit.file)
    for numbers in _batches(unit, reader.num_records()):
        try:
            records = reader.read(numbers.start, numbers.stop)
        except RuntimeError as error:
            raise ValueError(f"{file} cannot be read as ArrayRecord: {_first_line(error)}") from None
        for number, record in zip(numbers, records, strict=True):
            try:
                yield _json_or_text(record, source.text_key)
            except UnicodeDecodeError:
                census.report(Place(file, number + 1), "not UTF-8 (a TFDS data set is read through its directory)")
                yield None
    reader.close()


def _array_reader(file: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    with local_copy(file) as copy:
        reader = ArrayRecordReader(copy)
    if not reader.ok():  # a damaged file says that it has 0 records, and raises when it is closed
        raise ValueError(f"{file} cannot be read as ArrayRecord: it is damaged, cut off, or of another kind")
    return reader


def _batches(unit: Unit, records: int) -> Iterator[range]:
    """The numbers of the records of a unit, few at a time."""
    stop = records if unit.stop is None else unit.stop
    return (range(start, min(start + _BATCH, stop)) for start in range(unit.start, stop, _BATCH))


def _json_or_text(record: bytes, key: str) -> dict[str, Any]:
    text = record.decode("utf-8-sig")
    with contextlib.suppress(ValueError, RecursionError):  # text that happens to begin with a brace
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
    return {key: text}


def tfds(source: SourceConfig, unit: Unit, columns: tuple[str, ...], census: Census) -> Records:
    """Records of one split of a TFDS data set that was prepared as ArrayRecord files."""
    path = unit.file
    with _tfds_split(source, path) as (builder, split):
        records = builder.as_data_source(split=split)
        wanted = _present(path, builder.info.features.keys(), columns)
        for numbers in _batches(unit, len(records)):
            for number, record in zip(numbers, records.__getitems__(numbers), strict=True):
                try:
                    yield {key: _plain(record[key]) for key in wanted}
                except UnicodeDecodeError:
                    census.report(Place(path, number + 1), "not UTF-8")
                    yield None


def count(source: SourceConfig, kind: str, path: str) -> int:
    """Records of a split of a TFDS data set, or of an ArrayRecord file."""
    if kind == "tfds":
        with _tfds_split(source, path) as (builder, split):
            return int(builder.info.splits[split].num_examples)
    with contextlib.closing(_array_reader(path)) as reader:
        return int(reader.num_records())


@contextlib.contextmanager
def _tfds_split(source: SourceConfig, path: str) -> Iterator[tuple[Any, str]]:
    """Of a data set elsewhere the copies stay until the end of the block: files are opened when they are read."""
    import tensorflow_datasets

    with local_directory(path) as copy:
        try:
            builder = tensorflow_datasets.builder_from_directory(copy)
        except Exception as error:  # a missing or damaged dataset_info.json raises one of a dozen kinds
            raise ValueError(f"{path} cannot be read as a TFDS data set: {_first_line(error)}") from None
        if str(builder.info.file_format.value) != "array_record":
            raise ValueError(
                f"{path} holds {builder.info.file_format.value} files, which need TensorFlow: "
                "prepare the data set with file_format='array_record'"
            )
        splits = list(builder.info.splits)
        split = source.split or "train"
        if split not in splits:
            raise ValueError(f"{path} has the splits {', '.join(splits)}: set split to one of them")
        yield builder, split


def _plain(value: Any) -> Any:
    """TFDS gives text as bytes, in numpy arrays where there are several, and sequences of objects as columns."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        columns = {key: _plain(column) for key, column in value.items()}
        if columns and all(isinstance(column, list) for column in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return columns
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
