"""Arrays out to disk and back onto any mesh. Orbax, whose import path is still moving, is imported by this room alone.

A checkpoint is a directory with one tree of arrays under `state/` and small JSON items beside it. It appears under its
final name only when it is complete, with `commit_success.txt` in it; `files.json`, written after that, lists the size
of every file, so that a truncated or half-deleted checkpoint is recognised without reading it.
"""

import errno
import functools
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mixtral_jax.checkpoint.pieces import Runs

FORMAT = 1
COMMIT = "commit_success.txt"
FILES = "files.json"
STATE = "state"
_UNFINISHED = ".orbax-checkpoint-tmp"

# Orbax logs, with tracebacks, what it also raises, and advice about chunk sizes that are chosen on purpose.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

JsonItems = Mapping[str, Mapping[str, Any]]
Shapes = dict[str, tuple[tuple[int, ...], str]]


class PendingSave:
    """A save under way. `result()` waits until it is complete on disk."""

    left_behind = False  # another one is made in its place: what lies there may be that one's

    def __init__(self, path: epath.Path, response: ocp.AsyncResponse[None], context: ocp.Context):
        self._path, self._response, self._context = path, response, context

    def result(self) -> int:
        """Wait; return the bytes on disk.

        Raises:
            OSError: the file system refused (full, not writable, too large). Nothing is left under the final name.
        """
        with self._context:
            _as_os_error(self._path, self._response.result, lambda: not self.left_behind)
        return list_files(self._path) if jax.process_index() == 0 else 0


def save(path: epath.PathLike, tree: Any, items: JsonItems | None = None) -> int:
    """Write `tree` (arrays) and `items` (JSON) to the new directory `path`, and wait; return the bytes on disk."""
    return save_async(path, tree, items).result()


def save_async(path: epath.PathLike, tree: Any, items: JsonItems | None = None) -> PendingSave:
    """Copy `tree` off the devices, then write in the background. The arrays may be donated as soon as this returns.

    Raises:
        OSError: the directory cannot be made.
    """
    target = _absolute(path)
    items = items or {}
    context = _context(tuple(items))
    with context:
        start = functools.partial(
            ocp.save_checkpointables_async,
            target,
            {STATE: tree, **{k: dict(v) for k, v in items.items()}},
            custom_metadata={"format": FORMAT},
        )
        return PendingSave(target, _as_os_error(target, start), context)


def restore(path: epath.PathLike, abstract: Any, *, partial: bool = False) -> Any:
    """The tree at `path`, placed as the shardings of `abstract` (ShapeDtypeStruct leaves) say, on any mesh.

    `partial` reads only the leaves that `abstract` has. A dtype in `abstract` other than the stored one casts.

    Raises:
        ValueError: a leaf is missing or has another shape; it is named.
    """
    target = _absolute(path)
    check_fits(target, abstract, partial=partial)
    with _context(partial=partial):
        return ocp.load_checkpointables(target, {STATE: abstract})[STATE]


def check_fits(path: epath.PathLike, abstract: Any, *, partial: bool = False) -> None:
    """Whether `restore` would find every leaf of the same shape; reads no array.

    Raises:
        ValueError: a leaf is missing or has another shape; it is named.
    """
    target, stored, wanted = _absolute(path), tree_shapes(path), _flat_shapes(abstract)
    for name, (shape, _) in wanted.items():
        if name not in stored:
            raise ValueError(f"checkpoint {target} has no {name}, which the model needs with shape {shape}")
        if stored[name][0] != shape:
            raise ValueError(f"{name} has shape {stored[name][0]} in checkpoint {target}, but {shape} in the model")
    extra = [] if partial else [name for name in stored if name not in wanted]
    if extra:
        raise ValueError(f"checkpoint {target} has {extra[0]}, which the model does not have")


def discard_unfinished(path: epath.PathLike) -> None:
    """Remove what a save of `path` that was killed or refused has left; never a finished checkpoint."""
    target = _absolute(path)
    if jax.process_index() == 0 and target.parent.exists():
        for leftover in target.parent.glob(f"{target.name}{_UNFINISHED}*"):
            leftover.rmtree(missing_ok=True)


def read_item(path: epath.PathLike, name: str) -> dict[str, Any]:
    """The JSON item `name` of a checkpoint, read as the file that it is: Orbax has errors of its own for all."""
    return json.loads((_absolute(path) / name / "data.json").read_text())


def tree_shapes(path: epath.PathLike) -> Shapes:
    """Shape and dtype of every stored leaf by its dotted name; reads no array."""
    with _context():
        return _flat_shapes(ocp.checkpointables_metadata(_absolute(path)).metadata[STATE])


def is_there(path: epath.Path, directory: bool = False) -> bool:
    """Whether something, or a directory, lies there. exists() says no, too, where a disk or a server does not answer.

    Raises:
        OSError: nobody could look.
    """
    try:
        return _stat(path)[0] or not directory
    except (FileNotFoundError, NotADirectoryError):
        return False


def damage(path: epath.PathLike) -> str | None:
    """Why the checkpoint at `path` is not whole, or None. Sizes are compared; contents are not read.

    Raises:
        OSError: nobody could look. That says nothing of the checkpoint.
    """
    target = _absolute(path)
    if not is_there(target / COMMIT):
        return f"{COMMIT} is missing"
    if not is_there(target / FILES):  # killed between the commit and the list: the commit itself is complete
        return None
    try:
        expected = dict(json.loads((target / FILES).read_text()))
    except (ValueError, TypeError):
        return f"{FILES} is not readable"
    found = _file_sizes(target)
    for name, size in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} of {size} bytes"
    return None


def list_files(path: epath.PathLike) -> int:
    """Note the size of every file of a finished checkpoint, for `damage`; return their sum."""
    target = _absolute(path)
    sizes, temporary = _file_sizes(target), target / f"{FILES}.tmp"
    temporary.write_text(json.dumps(sizes, sort_keys=True))
    temporary.replace(target / FILES)
    return sum(sizes.values())


def stored_format(path: epath.PathLike) -> int | None:
    """Which format of ours a checkpoint says that it has; None: it is somebody else's."""
    try:
        return json.loads((_absolute(path) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["format"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax finds nothing below a relative path, and does not say so."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(path))


def _context(json_items: tuple[str, ...] = (), *, partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in json_items:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    context.array.saving.scoped_storage_options_creator = _chunks
    context.pytree.loading.partial_load = partial
    return context


def _chunks(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Stacks of matrices by layer, expert and half, so that they can be streamed back; moments are named as weights."""
    name = _dotted(key)
    axes: tuple[int, ...] = ()
    if re.search(r"(^|\.)layers\.moe\.w\d", name):
        axes = (0, 1, 3) if name.endswith(".w13") else (0, 1)
    elif re.search(r"(^|\.)layers\.", name):
        axes = (0,)
    runs = Runs(axis for axis in axes if axis < getattr(value, "ndim", 0))
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    return options(shard_axes=runs) if runs else options()


def _flat_shapes(tree: Any) -> Shapes:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {_dotted(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _dotted(path: tuple[Any, ...]) -> str:
    """`params.layers.moe.w2`; a field of a named tuple and a key of the dict that it is stored as read alike."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _file_sizes(path: epath.Path, prefix: str = "") -> dict[str, int]:
    sizes: dict[str, int] = {}
    for child in path.iterdir():
        is_directory, size = _stat(child)
        if is_directory:
            sizes |= _file_sizes(child, f"{prefix}{child.name}/")
        elif child.name != FILES:
            sizes[f"{prefix}{child.name}"] = size
    return sizes


def _stat(path: epath.Path) -> tuple[bool, int]:
    """Whether it is a directory, and its bytes. epath looks up the owner's name too, which not every machine has."""
    if "://" in os.fspath(path):
        far = path.stat()
        return far.is_directory, far.length
    near = os.stat(path)
    return stat.S_ISDIR(near.st_mode), near.st_size


def _as_os_error(path: epath.Path, write: Callable[[], Any], clears: Callable[[], bool] = lambda: True) -> Any:
    """write(), with a refusal by the system as an OSError: tensorstore reports a full disk as a ValueError.

    What it has left is removed where it `clears`.
    """
    try:
        return write()
    except Exception as error:
        if clears():
            discard_unfinished(path)
        code = next((c for c in _REFUSALS if os.strerror(c) in str(error)), None)
        if code is None or isinstance(error, OSError):
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
