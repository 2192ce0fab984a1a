"""Continuations of a file of prompts, in a file that appears when it is whole; killed, the same command goes on."""

import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flax import nnx

from mixtral_jax.convert import arrays_identity
from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.progress import meter, say
from mixtral_jax.data.records import Census, Place, digest, file_format, read_lumps, source_files, write_atomically
from mixtral_jax.data.text import turns, with_beside
from mixtral_jax.generation import check_options, generate
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.train.errors import AGAIN, StorageError, UserError
from mixtral_jax.train.text import Chat, Codec


class Prompt(NamedTuple):
    """A record of the file, and what the model is asked."""

    record: Mapping[str, Any]
    asked: str | Chat
    tools: Sequence[Any]
    place: Place


def read_prompts(file: str, before: Sequence[Mapping[str, Any]], *, chat: bool) -> list[Prompt]:
    """Records with `prompt` (text or messages) or `messages`, in every format of data.train; lines of a text file.

    A chat that ends with an answer asks for another one. With `chat` a text is a user's message. `before` stands in
    front of every chat, and before that a record's own `system`; `tools` are read as runs read them.

    Raises:
        UserError: a record has neither, or is none, or a text has these; the sentence names its file and line.
    """
    source, found = SourceConfig(name="prompts", path=file), []
    for name in source_files(source):
        for lump in read_lumps(source, name, (), Census(skip=False)):
            for number, record in lump.parse(Census(skip=False)):
                lines = [record]
                if file_format(source, name) == "text":
                    lines = [{"prompt": line} for line in re.split("\r?\n", record["text"]) if line.strip()]
                try:
                    _dump(lines).encode()  # JSON can spell half of a surrogate pair
                    found += [Prompt(each, *_asked(each, source, before, chat), lump.where(number)) for each in lines]
                except ValueError as error:
                    raise UserError(f"{lump.where(number)}: {error}") from None
    if not found:
        raise UserError(f"{file} holds no prompts")
    return found


def _asked(
    record: dict[str, Any], source: SourceConfig, before: Sequence[Mapping[str, Any]], chat: bool
) -> tuple[str | Chat, Sequence[Any]]:
    """With its tools."""
    column = next((c for c in ("messages", "prompt") if record.get(c) is not None), None)
    if column is None:
        raise ValueError(f"neither 'prompt' nor 'messages' (it has {', '.join(map(repr, record)) or 'nothing'})")
    asked = turns(record[column], repr(column))
    if isinstance(asked, str):
        if not chat and with_beside(record, source, {"prompt": asked}) != {"prompt": asked}:
            raise ValueError("'system' and 'tools' have no place in plain text: --chat makes it a user's message")
        if not chat:
            return asked, ()
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        raise ValueError(f"{column!r} is neither text nor messages")
    if asked and isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
        asked = asked[:-1]
    if not asked:
        raise ValueError(f"{column!r} asks nothing")
    whole = with_beside(record, source, {"messages": [*before, *asked]})
    return whole["messages"], whole.get("tools", ())


def complete(
    model: Mixtral, codec: Codec, prompts: Sequence[Prompt], out: Path, *, samples: int, batch_size: int, **options: Any
) -> None:
    """Write one line for each prompt and sample to `out`: index, sample, prompt, completion, finish, tokens, record.

    A batch has prompts of like lengths, the longest first. What stands in a line depends on seed, index, sample and the
    number of prompts, not on its batch (but for the rounding of logits). Until all is there, lines gather in
    .NAME.incomplete; its first says what they are made of, of which each line has a digest. Where `out` is made of the
    same nothing is left to do.

    Raises:
        ValueError: an option is out of range.
        UserError: a prompt breaks a rule of its template, or what lies there is made of other weights, prompts or
            options.
        StorageError: another process writes `out`.
    """
    check_options(**options)
    ids = []
    for prompt in prompts:
        try:
            ids.append(codec.encode(prompt.asked, prompt.tools))
        except ValueError as error:
            raise UserError(f"{prompt.place}: {error}") from None
    count = len(prompts)
    work = sorted(range(count * samples), key=lambda number: -len(ids[number % count]))
    rows = min(batch_size, len(work))  # few programs: every batch has as many
    made_of = {
        "weights": arrays_identity(nnx.to_pure_dict(nnx.state(model))),
        "dtype": compute_dtype(model.compute.dtype).name,
        "prompts": digest([ids, _dump([prompt.record for prompt in prompts])]),
        "ends": codec.ends, "samples": samples, "batch_size": batch_size, **options,
    }  # fmt: skip
    partial, mark = out.with_name(f".{out.name}.incomplete"), digest(made_of)[:16]
    if out.exists():
        with open(out, "rb") as finished:
            is_ours = finished.readline().endswith(f'"made_of": "{mark}"}}\n'.encode())
        if not is_ours:
            raise UserError(f"{out} is made of other weights, prompts or options: remove it, or name another file")
        partial.unlink(missing_ok=True)
        return say("nothing left to do")
    with open(partial, "a+b") as stream, meter("generating", len(work)) as advance:
        lines = _begun(stream, partial, made_of)
        advance(len(lines), "")
        for start in range(0, len(work), rows):
            batch = work[start : start + rows]
            if start + len(batch) <= len(lines):
                continue
            numbers = batch + batch[-1:] * (rows - len(batch))
            asked = [ids[number % count] for number in numbers]
            answers = generate(model, asked, eos_id=codec.ends, numbers=numbers, **options)
            for number, new in list(zip(batch, answers, strict=False))[len(lines) - start :]:
                lines.append(_line(codec, prompts, ids, number, new, mark))
                stream.write(lines[-1])
            stream.flush()
            advance(len(batch), f"{len(lines)} of {len(work)}")
        in_order = sorted(range(len(work)), key=lambda i: (work[i] % count, work[i]))
        write_atomically(out, b"".join(lines[i] for i in in_order))
    partial.unlink(missing_ok=True)
    return None


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _line(
    codec: Codec, prompts: Sequence[Prompt], ids: Sequence[list[int]], number: int, new: list[int], mark: str
) -> bytes:
    sample, index = divmod(number, len(prompts))
    record, asked, *_ = prompts[index]
    line = {
        "index": index, "sample": sample, "prompt": asked, "completion": codec.text(asked, ids[index], new),
        "finish": codec.finish(new), "tokens": len(new), "record": record,
        "made_of": mark,
    }  # fmt: skip
    return _dump(line).encode() + b"\n"


def _begun(stream: BinaryIO, name: Path, made_of: dict[str, Any]) -> list[bytes]:
    """The whole lines behind the first one, which is written where it is not there yet; the file ends behind them."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"{name} is being written by another process; when that has ended {AGAIN}") from None
    except OSError as error:
        say(f"note: the file system of {name} has no locks ({error.strerror}): let one process alone write it")
    stream.seek(0)
    lines = stream.read().splitlines(keepends=True)
    lines = lines[: len(lines) - (bool(lines) and not lines[-1].endswith(b"\n"))]
    if len(lines) < 2:  # a mistake in the options is not kept
        stream.truncate(0)
        stream.write(json.dumps(made_of).encode() + b"\n")
        return []
    former = json.loads(lines[0])
    changed = [key for key, value in made_of.items() if former.get(key) != value]
    other = "; ".join(f"{key} {former.get(key)} there, {made_of[key]} here" for key in changed)
    if other:
        raise UserError(f"{name} was begun with other options ({other}): give those, or remove it")
    stream.truncate(sum(map(len, lines)))
    say(f"going on behind the {len(lines) - 1} continuations in {name}")
    return lines[1:]
