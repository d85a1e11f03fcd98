"""How a run's LSTM reads its windows, where --recurrence=auto leaves the choice: the faster way, timed here."""

from statistics import median

from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import mesh as mesh_lib
from charlstm.config import Config
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan
from launch import dry_run

TIMED_STEPS = 5


def chosen(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh) -> tuple[Config, str]:
    """`config`, resolved, with "auto" replaced by what all processes take; and why, in words, or "".

    Raises:
      ValueError: cudnn is asked for, and there is none.
    """
    model, device = config.model, mesh_lib.device_kind(mesh)
    if model.recurrence == "cudnn" and not mesh_lib.has_cudnn(mesh):
        raise ValueError(f"recurrence=cudnn needs an NVIDIA GPU, and there is {device}: use scan or auto")
    if model.recurrence != "auto":
        return config, ""
    without = f"cuDNN does not know {model.beyond_cudnn}" if model.beyond_cudnn else ""
    if not mesh_lib.has_cudnn(mesh):
        without = f"there is no cuDNN on {device}"
    if without:
        return config_lib.replace(config, recurrence="scan"), f"recurrence=scan: {without}"
    ways = {name: config_lib.replace(config, recurrence=name) for name in ("scan", "cudnn")}
    seconds = {name: median(dry_run.timed(way, corpus, plan, mesh, TIMED_STEPS)) for name, way in ways.items()}
    fastest = mesh_lib.gather(min(seconds, key=lambda name: seconds[name]))[0]  # the first process's, for all
    found = ", ".join(f"{name} {1000 * of:.1f} ms" for name, of in seconds.items())
    return ways[fastest], f"recurrence={fastest}: an update took {found} on {device}"
