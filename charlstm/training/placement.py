"""Divides a run's streams and logical shards over devices, and chooses how many devices of a CPU take part."""

from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config

LEAST_ROWS = 8  # streams or samples per device: a matmul with fewer does too little with the weights that it reads


def shards_per_device(config: Config, devices: int, fixed: bool = False) -> int:
    """Returns k, the number of logical shards that each of `devices` computes.

    Args:
      fixed: the run has begun, so only the number of devices and the reduction can change.

    Raises:
      ValueError: the B streams, or the M logical shards, cannot be split over the devices; the message names the
        counts that work.
    """
    B, M = config.streams.batch_size, config.training.logical_shards
    assert M > 0, "fill_automatic(config) sets logical_shards"
    if B % devices:
        low, high = B - B % devices, B + devices - B % devices
        choice = f"{low} or {high}" if low else f"{high}"
        if fixed:
            exact = config.training.reduction == "exact"
            choice = f"{_divisors(M if exact else B)} devices, as the run has this batch_size"
            choice += f" and logical_shards={M}" if exact else ""
        raise ValueError(f"batch_size={B} cannot be split over {devices} devices: use {choice}")
    if B % M:
        raise ValueError(f"batch_size={B} cannot be split into logical_shards={M}: use a multiple of {M}")
    if M % devices == 0:
        return M // devices
    if config.training.reduction == "exact":
        raise ValueError(
            f"logical_shards={M} cannot be split exactly over {devices} devices: use {_divisors(M)} devices, or "
            f"--reduction=fast (not bit-stable across counts)"
        )
    return next(k for k in range(-(-M // devices), B // devices + 1) if B % (devices * k) == 0)


def _divisors(count: int) -> str:
    return ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)


def choose_mesh(config: Config) -> Mesh:
    """Returns a mesh of all GPUs, or of as many devices of a CPU as the streams and logical shards can be split over.

    Each device of a CPU has at least `LEAST_ROWS` streams.  One device if no other count fits.  All devices where the
    user has set their number (XLA_FLAGS or JAX_NUM_CPU_DEVICES), or there are several processes.
    """
    mesh = distributed.make()
    if distributed.all_take_part() or not distributed.is_in_host_memory(mesh):
        return mesh
    most = max(1, min(mesh.size, config.streams.batch_size // LEAST_ROWS))
    count = next((n for n in range(most, 0, -1) if _can_be_split(config, n)), 1)
    return distributed.make(list(mesh.devices.flat[:count]))


def choose_sampling_mesh(count: int) -> Mesh:
    """Returns a mesh for `count` samples: the first device, or devices of a CPU with `LEAST_ROWS` samples each."""
    mesh = distributed.make()
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return distributed.make(list(mesh.devices.flat[: max(1, min(mesh.size, count // LEAST_ROWS)) if on_cpu else 1]))


def _can_be_split(config: Config, devices: int) -> bool:
    try:
        shards_per_device(config_lib.fill_automatic(config, devices), devices)
    except ValueError:
        return False
    return True
