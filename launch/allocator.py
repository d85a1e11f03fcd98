"""Memory that a step has freed is kept for the next one.

XLA asks for its temporary arrays, one block of memory, anew at every step.  Where that is large, glibc gives it back to
the system when it is freed, and every page of it is then mapped and zeroed again: 500 MB a step, and an eighth of its
time on a CPU, with two layers of 512 units, 64 streams and windows of 128.  Only glibc is asked; elsewhere, and where
the user has told it otherwise by GLIBC_TUNABLES or a variable MALLOC_..., nothing changes.
"""

import contextlib
import ctypes
import os

# The parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


# Bytes; smaller blocks glibc keeps by itself, and then better, as threads need not wait for each other.
LARGE = 32 << 20


def keep(block: int = LARGE) -> None:
    """Has the C library keep what is freed, where blocks have so many bytes; before JAX starts threads that compute.

    All threads then share one arena: a second one cannot hold a block of more than 64 MB, and would map it by itself.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if told or block < LARGE:
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
