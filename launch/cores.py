"""The cores of a CPU as devices of their own: each computes the gradient of its own streams, or makes its own samples.

Threads that share a product meet after each one, several times a symbol and layer; devices meet once an update.
"""

import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.training import step as step_lib
from launch.cluster import JobFlags

LEAST_ROWS = 8  # streams or samples of a device: a product with fewer does too little with the weights that it reads


def mesh_of(joined: JobFlags) -> Callable[[Config], Mesh]:
    """How the mesh of a run is made; before JAX starts.

    It has all devices.  Those of a CPU are its cores, where this process is alone and the user has set no number of
    them (XLA_FLAGS or JAX_NUM_CPU_DEVICES), and then as many as the run's streams and logical shards can be split over.
    """
    if joined.has_others or not _become_devices():
        return lambda config: distributed.make()
    return _shared


def mesh_of_samples(count: int) -> Mesh:
    """The devices that make `count` samples side by side, made before JAX starts: the first one, or a CPU's cores."""
    if count >= 2 * LEAST_ROWS:  # with fewer, the cores share each product
        _become_devices()
    mesh = distributed.make()
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return distributed.make(list(mesh.devices.flat[: max(1, min(mesh.size, count // LEAST_ROWS)) if on_cpu else 1]))


def _become_devices() -> bool:
    """Makes a CPU's cores devices, before JAX starts; False where the user has set a number of them."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return False
    jax.config.update("jax_num_cpu_devices", usable())
    return True


def usable() -> int:
    """The cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1  # not on a Mac


def _shared(config: Config) -> Mesh:
    mesh = distributed.make()
    if mesh.devices.flat[0].platform != "cpu":
        return mesh
    most = max(1, min(mesh.size, config.streams.batch_size // LEAST_ROWS))
    count = next((n for n in range(most, 0, -1) if _splits(config, n)), 1)
    return distributed.make(list(mesh.devices.flat[:count]))


def _splits(config: Config, devices: int) -> bool:
    try:
        step_lib.shards_per_device(config_lib.fill_automatic(config, devices), devices)
    except ValueError:
        return False
    return True
