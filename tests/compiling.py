"""How the tests compile: quickly, except where the bits or the programs are looked at that users have.

The suite spends most of its time in XLA.  Without most of LLVM's optimizations and without XLA's newer generator of
fused loops (fusion emitters), an update of a small model is compiled on a CPU in a fifth of the time.  Without fused
multiply-adds as well, which the older generator would have in some loops and not in others, it has the same bits on any
number of devices all the same.  JAX after 0.11.0 has no older generator, and ends a process that asks for it: there the
tests are compiled with the newer one, which takes longer.
"""

import hashlib
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

UNOPTIMIZED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
HAS_OLDER_GENERATOR = tuple(map(int, version("jaxlib").split(".")[:3])) <= (0, 11, 0)
NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if HAS_OLDER_GENERATOR else ""
NO_FMA = "--xla_cpu_max_isa=AVX" if platform.machine() == "x86_64" else ""
QUICK_FLAGS = f"{NO_EMITTERS} {NO_FMA}".strip()

MOST_KEPT = 1 << 30  # bytes


def compile_quickly(devices: int) -> None:
    """Sets the environment of this process, whose JAX has not started, and of those that it starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ[UNOPTIMIZED] = "true"
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={devices} {QUICK_FLAGS}"


def kept(root: Path) -> Path:
    """Returns the folder for what is compiled by this lock and for so many cores; removes what other locks left.

    XLA divides work by the cores that it sees, which JAX's key of a program does not name.  What is there for other
    numbers of cores stays, as a suite that has these may run; all goes where it has grown together.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lock = hashlib.sha256((root / "requirements.lock").read_bytes()).hexdigest()[:12]
    folder = root / ".pytest_cache" / "compiled"
    is_first = "PYTEST_XDIST_WORKER" not in os.environ
    if is_first and (
        any(not other.name.startswith(lock) for other in folder.glob("*"))
        or sum(file.stat().st_size for file in folder.glob("*/*")) > MOST_KEPT
    ):
        shutil.rmtree(folder, ignore_errors=True)
    own = folder / f"{lock}-{cores}"
    own.mkdir(parents=True, exist_ok=True)
    return own


def xla_flags(devices: int = 0) -> str:
    """Returns the XLA_FLAGS of a program that a test starts: on so many devices (0: as it finds), compiled as here."""
    count = [f"--xla_force_host_platform_device_count={devices}"] if devices else []
    return " ".join([*count, *([QUICK_FLAGS] if QUICK_FLAGS in os.environ.get("XLA_FLAGS", "") else [])])


def compile_as_users_do() -> None:
    """Takes `compile_quickly` back, before JAX has a device: XLA looks at its flags once."""
    import jax

    os.environ.pop(UNOPTIMIZED, None)
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(QUICK_FLAGS, "")
    jax.config.update("jax_disable_most_optimizations", False)
