"""Suggests a preset, a flagfile of configs/, to a run that was given none: by the text's size and the devices."""

import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from charlstm import distributed
from charlstm.config import Config
from charlstm.config.model import ModelConfig
from charlstm.config.training import TrainingConfig
from charlstm.model.ops import compiler
from charlstm.run import estimate
from charlstm.run.metrics import duration

SMALL_TEXT, LARGE_TEXT = 5_000_000, 300_000_000  # symbols up to which small is meant, and from which on large
EPOCHS = 8  # at most: with more, a model of a preset's size over-fits
TIMED_SYMBOLS = 16
# An update beside the same arithmetic done as recurrent matmuls alone, about; at the widths of the presets.
OVERHEAD = {"lstm": 1.5, "layer_norm_lstm": 3.5}


def suggestion(config: Config, symbols: int, vocabulary_size: int, mesh: Mesh) -> str:
    """One sentence: which preset, how many steps and how long; "" if model or length were chosen.

    Args:
      symbols: of the training split.
    """
    if config.model != ModelConfig() or config.training.num_steps != TrainingConfig().num_steps:
        return ""
    name = preset_for(symbols, distributed.is_in_host_memory(mesh), mesh.size)
    preset = Config.recipe(name)
    steps = steps_for(preset, symbols)
    a_step = preset.streams.batch_size * preset.streams.window
    seconds = steps * seconds_per_step(preset, vocabulary_size, mesh.size)
    return (
        f"no preset is given, and these settings are for a first look: for {symbols:,} symbols on "
        f"{distributed.describe(mesh)}, --flagfile=configs/{name}.flags --num_steps={steps} is meant "
        f"({steps * a_step / symbols:.2g} epochs, about {duration(seconds)} here)"
    )


def preset_for(symbols: int, on_cpu: bool, devices: int) -> str:
    """Returns the name of the preset for a text of so many symbols."""
    if symbols <= SMALL_TEXT:
        return "small"
    return "large" if symbols >= LARGE_TEXT and devices > 1 and not on_cpu else "medium"


def steps_for(preset: Config, symbols: int) -> int:
    """Returns the steps of `preset`, but those of one epoch at least and of EPOCHS at most; rounded to two digits."""
    an_epoch = symbols / (preset.streams.batch_size * preset.streams.window)
    steps = min(max(preset.training.num_steps, an_epoch), max(1.0, EPOCHS * an_epoch))
    return int(float(f"{steps:.1e}"))


def seconds_per_step(config: Config, vocabulary_size: int, devices: int) -> float:
    """Returns about how long an update takes here, by timing a few recurrent matmuls of its size."""
    rows, units = -(-config.streams.batch_size // devices), config.model.hidden_size
    width = 4 * units

    def read(w: jax.Array, h: jax.Array) -> jax.Array:
        return lax.fori_loop(0, TIMED_SYMBOLS, lambda _, h: jnp.tanh(h @ w)[:, :units], h)

    # With TF32 where training has it, as on a GPU it is several times as fast.
    own = read if config.model.tf32 else compiler.in_full_precision(read)
    timed = jax.jit(own, compiler_options=compiler.options())
    w, h = jnp.full((units, width), 1e-3), jnp.ones((rows, units))
    times = []
    for _ in range(5):  # the first one compiles
        began = time.monotonic()
        jax.block_until_ready(timed(w, h))
        times.append(time.monotonic() - began)
    share = estimate.flops(config, vocabulary_size) / devices / (2 * rows * units * width * TIMED_SYMBOLS)
    return OVERHEAD[config.model.cell] * share * min(times)  # others may use the machine
