"""How freed memory is kept: the C library's allocator under a training step.

By default glibc gives the top of its heap back to the kernel whenever enough of it is
free, which a step's end always is, and the next step faults every page in again. Keeping
it costs no memory at the peak. Blocks above 32 MiB still come and go (mallopt(3)).
"""

from __future__ import annotations

import ctypes
import sys

#: Names in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

#: glibc's highest threshold of what comes from the heap, and its trim threshold there.
BYTES_MMAP, BYTES_TRIM = 2**25, 2**26
BYTES_TRIM_NEVER = 2**31 - 1


def keep_freed_memory() -> int:
    """Keep what is freed from now on; returns the size up to which that holds.

    Where the C library is another than glibc nothing is changed, and all is taken as kept.
    """
    return BYTES_MMAP if _set(BYTES_TRIM_NEVER) else sys.maxsize


def give_freed_memory_back() -> None:
    """Go back to giving the free top of the heap to the kernel."""
    _set(BYTES_TRIM)


def _set(bytes_trim: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, BYTES_MMAP) and mallopt(M_TRIM_THRESHOLD, bytes_trim))
