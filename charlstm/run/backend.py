"""How a run's LSTM reads its windows, where --recurrence=auto leaves the choice: the fastest way, timed here."""

from statistics import median

import jax
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import estimate
from charlstm.run.memory import End
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

TIMED_STEPS = 5
NEEDS = {"fused": "an NVIDIA GPU of the Hopper generation or newer, and JAX 0.11 or newer"}


def chosen(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, end: End = None) -> tuple[Config, str]:
    """`config`, resolved, with "auto" replaced by what all processes take; and why, in words, or "".

    Raises:
      ValueError: what is asked for by name needs another device.
    """
    asked, device = config.model.recurrence, distributed.device_kind(mesh)
    had = {"fused": distributed.has_mosaic(mesh)}
    if not had.get(asked, True):
        raise ValueError(
            f"recurrence={asked} needs {NEEDS[asked]}, and there is {device}, JAX {jax.__version__}: use scan or auto"
        )
    if asked != "auto":
        return config, ""
    beyond = {name: config.model.beyond(name) for name in had}
    names = ["scan", *(name for name in had if had[name] and not beyond[name])]
    if len(names) == 1:
        reasons = [
            f"{name} does not know {beyond[name]}" if had[name] else f"{name} needs {NEEDS[name]}" for name in had
        ]
        return config_lib.replace(config, recurrence="scan"), f"recurrence=scan on {device}: {', '.join(reasons)}"
    ways = {name: config_lib.replace(config, recurrence=name) for name in names}
    seconds = {
        name: median(estimate.timed(way, corpus, plan, mesh, TIMED_STEPS, end=end)) for name, way in ways.items()
    }
    fastest = distributed.gather(min(seconds, key=lambda name: seconds[name]))[0]  # the first process's, for all
    found = ", ".join(f"{name} {1000 * of:.1f} ms" for name, of in seconds.items())
    return ways[fastest], f"recurrence={fastest}: an update took {found} on {device}"
