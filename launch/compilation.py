"""What was compiled is kept for the next start, on this machine: the same run starts again in half the time.

Compiled programs lie in ~/.cache/charlstm/compiled, a folder for each kind of processor, as JAX writes them, compressed
and with a checksum; the folder may be removed at any time.  JAX's own settings go before these:
JAX_COMPILATION_CACHE_DIR is another place, and JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import contextlib
import hashlib
import platform
import warnings
from pathlib import Path

import jax

DIRECTORY = "~/.cache/charlstm/compiled"


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
