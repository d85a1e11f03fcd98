"""Estimates of a run: sizes, FLOPs, memory, traffic, and an ETA from timed steps.  Changes nothing."""

import dataclasses
import json
import time

import jax
import numpy as np
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.model import language_model
from charlstm.run import memory
from charlstm.run.memory import End, format_bytes
from charlstm.run.metrics import duration
from charlstm.training import placement, schedules, train_state
from charlstm.training import step as step_lib
from data_pipeline.batch import Batch
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

TIMED_STEPS = 3  # at least, and for
TIMED_SECONDS = 1.0
PATIENCE = 60.0  # seconds; where three whole steps would take longer, short windows are timed instead
SHORT_WINDOW = 8
RATE = 1e13  # products and sums in a second, of which the arithmetic is told in hours: those of one fast GPU, about


def report(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, form: str = "text", end: End = None) -> str:
    """The table, or with the form "json" one line of its numbers.  Raises ValueError as the run itself would.

    What does not fit in memory is not timed: its seconds are null.
    """
    shards = placement.shards_per_device(config, mesh.size)
    V, symbols = corpus.vocabulary.size, config.streams.batch_size * config.streams.window
    state = jax.eval_shape(lambda: train_state.init(config, V))
    parameters, arithmetic = count_parameters(config, V), flops(config, V)
    even = config_lib.replace(config, window_deviation=0, short_window_probability=0.0)  # windows of a usual length
    even_plan = dataclasses.replace(plan, deviation=0, short_probability=0.0)
    longest = config_lib.replace(even, window=config.streams.longest_window)
    train_step = step_lib.make(longest, V, mesh, plan.steps_per_epoch)
    update = memory.compiled_update(train_step, longest, V, corpus.splits["train"].dtype, mesh)
    too_much = memory.too_much(update, config, mesh)
    seconds, how = (None, "") if too_much else _seconds_a_step(even, corpus, even_plan, mesh, end)
    if form == "json":
        return json.dumps({"parameters": parameters, "flops_per_step": arithmetic, "seconds_per_step": seconds})
    remarks = schedules.remarks(config.optimizer, config.training, plan.steps_per_epoch, resumed=False)
    whole = config.training.num_steps * arithmetic
    timing = [("time per step", "not timed: it does not fit"), ("does not fit", too_much)]
    if seconds is not None:
        speed = f"{seconds:.4g} s, {symbols / seconds:,.0f} symbols/s ({how})"
        timing = [("time per step", speed), ("ETA", duration(config.training.num_steps * seconds))]
    sizes = f"{format_bytes(update.held)} state and batch, {format_bytes(update.temporary)} temporaries"
    taken = f"{format_bytes(update.on_a_device)} ({sizes})" if update.on_a_device else "not told by this backend"
    rows = [
        ("devices", distributed.describe(mesh)),
        ("corpus", f"{str(corpus.directory).rpartition('/')[2]}: {plan.symbols:,} training symbols, vocabulary of {V}"),
        ("parameters", f"{parameters:,}"),
        ("state", format_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))),
        (
            "arithmetic",
            f"{arithmetic:.2g} FLOP an update, {whole:.2g} in all: {duration(whole / RATE)} at {RATE:.0e} a second",
        ),
        ("memory per device", taken),
        ("bytes per all-reduce", f"{format_bytes(4 * (parameters + 1))}, once a step ({config.training.reduction})"),
        ("logical shards", f"{config.training.logical_shards}, {shards} a device"),
        ("symbols per step", f"{symbols:,}"),
        ("steps per epoch", f"{plan.steps_per_epoch:,}"),
        ("steps", f"{config.training.num_steps:,} ({config.training.num_steps / plan.steps_per_epoch:.2f} epochs)"),
        ("learning rate", "; ".join([f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}", *remarks])),
        *timing,
    ]
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def count_parameters(config: Config, vocabulary_size: int) -> int:
    params = jax.eval_shape(lambda: language_model.init(config.model, vocabulary_size, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops(config: Config, vocabulary_size: int) -> float:
    """Products and sums of one update, about: 6 a symbol and parameter, 2 forwards and 4 in reverse.

    An embedding is looked up and has none.  Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    settings = config.model
    looked_up = 0 if settings.tie_embeddings else vocabulary_size * settings.embedding_size
    symbols = config.streams.batch_size * config.streams.window
    return 6.0 * (count_parameters(config, vocabulary_size) - looked_up) * symbols


def estimate_temp_bytes(config: Config, devices: int) -> int:
    """Bytes of an update's temporary arrays on one of `devices`, about, before anything is compiled.

    They are mostly the window's gates, and their gradients twice; and the gradient of the parameters twice.
    """
    params = jax.eval_shape(lambda: language_model.init(config.model, 1, jax.random.key(0)))
    gates = sum(cell.w_h.shape[1] for cell in params.cells)
    symbols = config.streams.batch_size * config.streams.window // devices
    return 4 * (3 * symbols * gates + 2 * sum(leaf.size for leaf in jax.tree.leaves(params)))


def _seconds_a_step(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, end: End) -> tuple[float, str]:
    """A few steps timed: of whole windows, or, where that takes too long here, of short ones scaled up."""
    T = config.streams.window
    if T > SHORT_WINDOW:
        short = config_lib.replace(config, window=SHORT_WINDOW)
        scaled = _median(time_steps(short, corpus, plan, mesh, 1, end=end)) * T / SHORT_WINDOW
        if scaled * (TIMED_STEPS + 1) > PATIENCE:
            times = time_steps(short, corpus, plan, mesh, TIMED_STEPS, end=end)
            return _median(
                times
            ) * T / SHORT_WINDOW, f"{len(times)} steps of {SHORT_WINDOW} symbols timed, scaled to {T}"
    times = time_steps(config, corpus, plan, mesh, TIMED_STEPS, TIMED_SECONDS, end)
    return _median(times), f"{len(times)} steps timed"


def time_steps(
    config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, steps: int, at_least: float = 0.0, end: End = None
) -> list[float]:
    """Seconds of each of so many steps, and of more until `at_least` seconds are full; compilation left out."""
    V, rows = corpus.vocabulary.size, distributed.process_rows(mesh, config.streams.batch_size)
    train_step = step_lib.make(config, V, mesh, plan.steps_per_epoch)
    state = train_state.place(mesh, train_state.init(config, V))
    own = plan.read(corpus.splits["train"], 0, rows)
    batch = distributed.put(mesh, distributed.BY_STREAM, Batch(*(a[:, : config.streams.window] for a in own)))
    times: list[float] = []
    with memory.watched(mesh, end) as watch:
        while len(times) < 1 + steps or distributed.any_process(sum(times[1:]) < at_least):  # clocks differ
            began = time.monotonic()
            state, metrics = train_step(state, batch)
            watch(metrics.loss)
            jax.block_until_ready((state, metrics))
            times.append(time.monotonic() - began)
    return times[1:]


def _median(times: list[float]) -> float:
    return float(np.median(times))
