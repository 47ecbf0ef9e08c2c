"""What malloc does with freed memory. Owned here: the one call that makes glibc keep it.

A training step frees and asks for the same large tensors over and over. By default glibc hands the end of its heap
back to the system each time, which then has to clear every page anew: two of three page faults of the quickstart's
training, and 3 to 8 % of its CPU time.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 256 << 20  # idle memory at the end of the heap that is not handed back
LARGE_BYTES = 32 << 20  # the largest threshold that glibc takes: blocks above it still come and go by themselves


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory instead of handing it back; whether malloc took it (glibc only)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
