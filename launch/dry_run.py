"""What a run would take: sizes, arithmetic, memory, traffic, and an ETA from timed steps.  Changes nothing."""

import dataclasses
import json
import os
import time

import jax
import numpy as np
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import mesh as mesh_lib
from charlstm import model, schedules
from charlstm import step as step_lib
from charlstm.config import Config
from charlstm.metrics import duration
from data_pipeline.batch import Batch
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

TIMED_STEPS = 3  # at least, and for
TIMED_SECONDS = 1.0
PATIENCE = 60.0  # seconds; where three whole steps would take longer, short windows are timed instead
SHORT_WINDOW = 8
RATE = 1e13  # products and sums in a second, of which the arithmetic is told in hours: those of one fast GPU, about


def report(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, form: str = "text") -> None:
    """Prints the table, or with the form "json" one line of its numbers.  Raises ValueError as the run itself would."""
    shards = step_lib.shards_per_device(config, mesh.size)
    V, symbols = corpus.vocabulary.size, config.streams.batch_size * config.streams.window
    state = jax.eval_shape(lambda: step_lib.init(config, V))
    parameters, arithmetic = count_parameters(config, V), flops(config, V)
    even = config_lib.replace(config, window_deviation=0, short_window_probability=0.0)  # windows of a usual length
    even_plan = dataclasses.replace(plan, deviation=0, short_probability=0.0)
    seconds, how = _seconds_a_step(even, corpus, even_plan, mesh)
    if form == "json":
        print(json.dumps({"parameters": parameters, "flops_per_step": arithmetic, "seconds_per_step": seconds}))
        return
    memory = _memory(config, V, plan, mesh)
    remarks = schedules.remarks(config.optimizer, config.training, plan.steps_per_epoch, begun=False)
    left, whole = config.training.num_steps * seconds, config.training.num_steps * arithmetic
    rows = [
        ("devices", mesh_lib.describe(mesh)),
        ("corpus", f"{corpus.directory.name}: {plan.symbols:,} training symbols, vocabulary of {V}"),
        ("parameters", f"{parameters:,}"),
        ("state", in_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))),
        (
            "arithmetic",
            f"{arithmetic:.2g} FLOP an update, {whole:.2g} in all: {duration(whole / RATE)} at {RATE:.0e} a second",
        ),
        ("memory per device", memory),
        ("bytes per all-reduce", f"{in_bytes(4 * (parameters + 1))}, once a step ({config.training.reduction})"),
        ("logical shards", f"{config.training.logical_shards}, {shards} a device"),
        ("symbols per step", f"{symbols:,}"),
        ("steps per epoch", f"{plan.steps_per_epoch:,}"),
        ("steps", f"{config.training.num_steps:,} ({config.training.num_steps / plan.steps_per_epoch:.2f} epochs)"),
        ("learning rate", "; ".join([f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}", *remarks])),
        ("time per step", f"{seconds:.4g} s, {symbols / seconds:,.0f} symbols/s ({how})"),
        ("ETA", duration(left)),
    ]
    for name, value in rows:
        print(f"{name:<22}{value}")


def count_parameters(config: Config, vocabulary_size: int) -> int:
    params = jax.eval_shape(lambda: model.init(config.model, vocabulary_size, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops(config: Config, vocabulary_size: int) -> float:
    """Products and sums of one update, about: 6 a symbol and parameter, 2 forwards and 4 in reverse.

    An embedding is looked up and has none.  Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    settings = config.model
    looked_up = 0 if settings.tie_embeddings else vocabulary_size * settings.embedding_size
    symbols = config.streams.batch_size * config.streams.window
    return 6.0 * (count_parameters(config, vocabulary_size) - looked_up) * symbols


def temporaries(config: Config, devices: int) -> int:
    """Bytes of an update's temporary arrays on one of `devices`, about, before anything is compiled.

    They are mostly the window's gates, and their gradients twice; and the gradient of the parameters twice.
    """
    params = jax.eval_shape(lambda: model.init(config.model, 1, jax.random.key(0)))
    gates = sum(cell.w_h.shape[1] for cell in params.cells)
    symbols = config.streams.batch_size * config.streams.window // devices
    return 4 * (3 * symbols * gates + 2 * sum(leaf.size for leaf in jax.tree.leaves(params)))


def _memory(config: Config, V: int, plan: StreamPlan, mesh: Mesh) -> str:
    """Of the compiled step: state, batch and temporaries, as XLA lays them out."""
    train_step = step_lib.make(config, V, mesh, plan.steps_per_epoch)
    shape = (config.streams.batch_size, config.streams.longest_window)
    ids = jax.ShapeDtypeStruct(shape, np.uint8)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, np.bool_))
    state = step_lib.abstract(config, V, mesh)
    batch = mesh_lib.abstract(mesh, mesh_lib.BY_STREAM, batch)
    analysis = train_step.lower(state, batch).compile().memory_analysis()
    if analysis is None:
        return "not told by this backend"
    held, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return f"{in_bytes(held + temporary)} ({in_bytes(held)} state and batch, {in_bytes(temporary)} temporaries)"


def _seconds_a_step(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh) -> tuple[float, str]:
    """A few steps timed: of whole windows, or, where that takes too long here, of short ones scaled up."""
    T = config.streams.window
    if T > SHORT_WINDOW:
        short = config_lib.replace(config, window=SHORT_WINDOW)
        scaled = _median(timed(short, corpus, plan, mesh, 1)) * T / SHORT_WINDOW
        if scaled * (TIMED_STEPS + 1) > PATIENCE:
            times = timed(short, corpus, plan, mesh, TIMED_STEPS)
            return _median(
                times
            ) * T / SHORT_WINDOW, f"{len(times)} steps of {SHORT_WINDOW} symbols timed, scaled to {T}"
    times = timed(config, corpus, plan, mesh, TIMED_STEPS, TIMED_SECONDS)
    return _median(times), f"{len(times)} steps timed"


def timed(
    config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, steps: int, at_least: float = 0.0
) -> list[float]:
    """Seconds of each of so many steps, and of more until `at_least` seconds are full; compilation left out."""
    V, rows = corpus.vocabulary.size, mesh_lib.process_rows(mesh, config.streams.batch_size)
    train_step = step_lib.make(config, V, mesh, plan.steps_per_epoch)
    state = step_lib.place(mesh, step_lib.init(config, V))
    own = plan.read(corpus.splits["train"], 0, rows)
    batch = mesh_lib.put(mesh, mesh_lib.BY_STREAM, Batch(*(a[:, : config.streams.window] for a in own)))
    times: list[float] = []
    while len(times) < 1 + steps or mesh_lib.any_process(sum(times[1:]) < at_least):  # clocks differ
        began = time.monotonic()
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.monotonic() - began)
    return times[1:]


def _median(times: list[float]) -> float:
    return float(np.median(times))


def require_memory(config: Config, vocabulary_size: int) -> None:
    """Raises ValueError where the state alone is more than this machine can hold: XLA would abort the process."""
    state = jax.eval_shape(lambda: step_lib.init(config, vocabulary_size))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"parameters and optimizer state take {in_bytes(needed)} and this machine has {in_bytes(there)} of "
            "memory: lower hidden_size, num_layers or embedding_size"
        )


def in_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
