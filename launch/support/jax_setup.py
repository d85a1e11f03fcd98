"""Sets up the process before JAX starts: compilation cache, the C library's memory, CPU cores as devices.

Compilation cache.  Compiled programs are kept in ~/.cache/charlstm/compiled, one folder per kind of processor, as JAX
writes them, compressed and with a checksum; the folder may be removed at any time.  JAX's own settings have precedence:
JAX_COMPILATION_CACHE_DIR names another place, JAX_ENABLE_COMPILATION_CACHE=false disables the cache.  The same run
starts again in half the time.

Memory.  XLA allocates its temporary arrays as one block, anew at every step.  If it is large, glibc returns it to the
system when it is freed, and every page is mapped and zeroed again: 500 MB a step, an eighth of its time on a CPU, with
two layers of 512 units, 64 streams and windows of 128.  GLIBC_TUNABLES or any variable MALLOC_... has precedence.

Devices.  One device per core computes the gradient of its own streams, or its own samples: threads that share a matmul
synchronize after each one, several times a symbol and layer; devices synchronize once an update.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from charlstm import distributed
from charlstm.config import Config
from charlstm.training import placement
from launch.support.cluster import JobFlags

COMPILED = "~/.cache/charlstm/compiled"
LARGE = 32 << 20  # bytes; glibc keeps smaller blocks by itself, and better, as its threads do not share an arena
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt(3), from malloc.h


def keep_compiled(directory: str = COMPILED) -> None:
    """Enables JAX's persistent compilation cache.  Call it before anything is compiled.

    Without a home directory that can be written, nothing is kept.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder = Path(directory).expanduser() / _processor()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or one that cannot be written
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # An entry torn by a full disk or a kill is compiled again: that costs time and nothing else.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    # Small programs, too: a run compiles some dozens of them before its first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _processor() -> str:
    """Returns a key for the instruction set of this host: JAX's own key would share machine code between hosts."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        described += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def keep_freed_memory(block: int = LARGE) -> None:
    """Makes glibc keep freed memory for the next step, if blocks have at least `LARGE` bytes; elsewhere does nothing.

    Call it before JAX starts threads that compute.  All threads then share one arena: a second arena cannot hold a
    block of more than 64 MB, and would map it by itself.
    """
    set_by_user = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if set_by_user or block < LARGE:
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def mesh_chooser(joined: JobFlags) -> Callable[[Config], Mesh]:
    """Returns the function that chooses the mesh of a run.  Call it before JAX starts.

    A process that is alone has the cores of a CPU as devices, if the user has not set their number.
    """
    if not joined.has_others:
        distributed.use_cpu_cores()
    return placement.choose_mesh


def sampling_mesh(count: int) -> Mesh:
    """Returns the mesh for `count` samples side by side: cores of a CPU, or one GPU.  Call it before JAX starts."""
    if count >= 2 * placement.LEAST_ROWS:  # with fewer, the cores share each matmul
        distributed.use_cpu_cores()
    return placement.choose_sampling_mesh(count)
