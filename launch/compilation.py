"""How programs are compiled: with the same bits on any number of cores, and kept for the next start.

On a CPU, XLA divides what it can among threads, as many as it sees cores: operations on the elements of a large array,
which then may round otherwise than where they are whole; sums, whose parts are added up at the end (docs/decisions.md).
It is told to divide products alone, which are not cut within a sum.  The cores are devices (cores.py).

Compiled programs are kept on this machine: the same run starts again in half the time.  They lie in
~/.cache/charlstm/compiled, a folder for each kind of processor, as JAX writes them, compressed and with a checksum; the
folder may be removed at any time.  JAX's own settings go before these: JAX_COMPILATION_CACHE_DIR is another place, and
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

DIRECTORY = "~/.cache/charlstm/compiled"
# How XLA's flags are set; measured in docs/decisions.md.
FLAGS = {
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",  # operations on elements are not divided
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",  # the one that divides has no sums
    "xla_cpu_prefer_vector_width": "512",  # bits, where the processor has them; by itself XLA takes 256
}


def prepare() -> None:
    """Has programs compiled so, and kept; before anything is compiled."""
    tell_xla()
    keep()


def tell_xla() -> None:
    """Sets FLAGS in the environment; those that XLA_FLAGS has stay as they are."""
    told = os.environ.get("XLA_FLAGS", "")
    more = [f"--{flag}={value}" for flag, value in FLAGS.items() if flag not in told]
    os.environ["XLA_FLAGS"] = " ".join([told, *more]).strip()


def keep(directory: str = DIRECTORY) -> None:
    """Has JAX keep what it compiles, and take what is there; before anything is compiled."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder = Path(directory).expanduser() / _processor()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or one that cannot be written
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # An entry that a full disk or a kill has left unfinished is compiled again, which takes time and nothing else.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    # Small programs, too: a run compiles some dozens of them before its first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _processor() -> str:
    """A name for what the machine code of this host may use: JAX itself would hand it on to another host."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        described += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:12]
