"""Settings of this process that speed up a CPU run and change no number."""

import ctypes
import ctypes.util
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed instead of giving it back to the system; whether that worked.

    XLA on a CPU allocates the temporaries of a step anew at every step. By default large blocks are mapped and unmapped
    each time, and every page of them is faulted in and cleared again.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all(mallopt(option, value) == 1 for option, value in settings)
