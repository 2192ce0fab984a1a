"""The memory of this process on a CPU."""

import ctypes
import sys
from typing import Any

# parameters of glibc's mallopt(3)
KEEP = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads, or each would grow to the size of a step
    -4: 0,  # M_MMAP_MAX: no allocation gets pages of its own, which go back to the system when it is freed
    -1: -1,  # M_TRIM_THRESHOLD: nor does the top of the heap
}


def keep_freed_memory() -> None:
    """Keep the memory of one step's temporaries for the next; to be called before jax is imported.

    XLA's CPU client allocates all temporaries anew at every step. As glibc comes, they are mapped and unmapped each
    time, and the system clears each page again: a quarter of a million page faults a step at shape S of the benchmark,
    an eighth of its time. Does nothing where the C library has no mallopt, nor where jax is there already: a process
    that does other things too, such as the tests, would never give back what the largest of them took.
    """
    library = _glibc()
    if library is not None and "jax" not in sys.modules:
        for parameter, value in KEEP.items():
            library.mallopt(parameter, value)


def drop_freed_memory() -> None:
    """Give what the compiler has freed back to the system, once, before the first step: 0.3 GB at shape S."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None
