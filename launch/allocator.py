"""Memory that a step has freed is kept for the next one.

XLA asks for its temporary arrays anew at every step.  glibc gives blocks of that size back to the system when they are
freed, and every page of them is then mapped and zeroed again: 500 MB a step, and an eighth of its time on a CPU, with
two layers of 512 units, 64 streams and windows of 128.  Only glibc is asked; elsewhere, and where the user has told it
otherwise by GLIBC_TUNABLES or a variable MALLOC_..., nothing changes.
"""

import contextlib
import ctypes
import os

# The parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Has the C library keep what is freed; before JAX starts the threads that compute.

    All threads then share one arena: a second one cannot hold a block of more than 64 MB, and would map it by itself.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
