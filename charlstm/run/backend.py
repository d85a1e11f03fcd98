"""Choice of the LSTM backend: with --lstm_backend=auto, the fastest one, timed here."""

from statistics import median

import jax
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import estimate
from charlstm.run.memory import End
from data_pipeline.progress import announced
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

TIMED_STEPS = 5
NEEDS = {"fused": "an NVIDIA GPU of the Hopper generation or newer, and JAX 0.11 or newer"}


def chosen(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, end: End = None) -> tuple[Config, str]:
    """`config`, resolved, with "auto" replaced by what all processes take; and why, in words, or "".

    Raises:
      ValueError: what is asked for by name needs another device.
    """
    asked, device = config.model.lstm_backend, distributed.device_kind(mesh)
    had = {"fused": distributed.has_mosaic(mesh)}
    if not had.get(asked, True):
        raise ValueError(
            f"lstm_backend={asked} needs {NEEDS[asked]}, and there is {device}, JAX {jax.__version__}: "
            "give --lstm_backend=scan, whose sums round differently"
        )
    if asked != "auto":
        return config, ""
    beyond = {name: config.model.unsupported_by(name) for name in had}
    names = ["scan", *(name for name in had if had[name] and not beyond[name])]
    if len(names) == 1:
        reasons = [
            f"{name} does not know {beyond[name]}" if had[name] else f"{name} needs {NEEDS[name]}" for name in had
        ]
        return config_lib.replace(config, lstm_backend="scan"), f"lstm_backend=scan on {device}: {', '.join(reasons)}"
    ways = {name: config_lib.replace(config, lstm_backend=name) for name in names}
    with announced(f"compiling and timing an update in {len(ways)} ways (lstm_backend=auto, once)"):
        times = {name: estimate.time_steps(way, corpus, plan, mesh, TIMED_STEPS, end=end) for name, way in ways.items()}
    seconds = {name: median(of) for name, of in times.items()}
    fastest = distributed.all_gather_str(min(seconds, key=lambda name: seconds[name]))[
        0
    ]  # the first process's, for all
    found = ", ".join(f"{name} {1000 * of:.1f} ms" for name, of in seconds.items())
    return ways[fastest], f"lstm_backend={fastest}: an update took {found} on {device}"
