"""What a run would take: sizes, memory, traffic, and an ETA from three timed steps.  Changes nothing."""

import os
import time

import jax
import numpy as np
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import mesh as mesh_lib
from charlstm import step as step_lib
from charlstm.config import Config
from charlstm.metrics import duration
from data_pipeline.batch import Batch
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

TIMED_STEPS = 3
PATIENCE = 60.0  # seconds; where three whole steps would take longer, short windows are timed instead
SHORT_WINDOW = 8


def report(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh) -> None:
    """Prints the table.  Raises ValueError as the run itself would."""
    shards = step_lib.shards_per_device(config, mesh.size)
    V, symbols = corpus.vocabulary.size, config.streams.batch_size * config.streams.window
    state = jax.eval_shape(lambda: step_lib.init(config, V))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    memory = _memory(config, V, plan, mesh)
    seconds, how = _seconds_a_step(config, corpus, plan, mesh)
    left = config.training.num_steps * seconds
    rows = [
        ("devices", mesh_lib.describe(mesh)),
        ("corpus", f"{corpus.directory.name}: {plan.symbols:,} training symbols, vocabulary of {V}"),
        ("parameters", f"{parameters:,}"),
        ("state", in_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))),
        ("memory per device", memory),
        ("bytes per all-reduce", f"{in_bytes(4 * (parameters + 1))}, once a step ({config.training.reduction})"),
        ("logical shards", f"{config.training.logical_shards}, {shards} a device"),
        ("symbols per step", f"{symbols:,}"),
        ("steps per epoch", f"{plan.steps_per_epoch:,}"),
        ("steps", f"{config.training.num_steps:,} ({config.training.num_steps / plan.steps_per_epoch:.2f} epochs)"),
        ("time per step", f"{seconds:.4g} s, {symbols / seconds:,.0f} characters/s ({how})"),
        ("ETA", duration(left)),
    ]
    for name, value in rows:
        print(f"{name:<22}{value}")


def _memory(config: Config, V: int, plan: StreamPlan, mesh: Mesh) -> str:
    """Of the compiled step: state, batch and temporaries, as XLA lays them out."""
    train_step = step_lib.make(config, V, mesh, plan.steps_per_epoch)
    shape = (config.streams.batch_size, config.streams.window)
    ids = jax.ShapeDtypeStruct(shape, np.uint8)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, np.bool_))
    state = step_lib.abstract(config, V, mesh)
    batch = mesh_lib.abstract(mesh, mesh_lib.BY_STREAM, batch)
    analysis = train_step.lower(state, batch).compile().memory_analysis()  # type: ignore[attr-defined]
    if analysis is None:
        return "not told by this backend"
    held, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return f"{in_bytes(held + temporary)} ({in_bytes(held)} state and batch, {in_bytes(temporary)} temporaries)"


def _seconds_a_step(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh) -> tuple[float, str]:
    """Three steps timed: of whole windows, or, where that takes too long here, of short ones scaled up."""
    T = config.streams.window
    if T > SHORT_WINDOW:
        scaled = _timed(config_lib.replace(config, window=SHORT_WINDOW), corpus, plan, mesh, 1) * T / SHORT_WINDOW
        if scaled * (TIMED_STEPS + 1) > PATIENCE:
            short = _timed(config_lib.replace(config, window=SHORT_WINDOW), corpus, plan, mesh, TIMED_STEPS)
            return short * T / SHORT_WINDOW, f"{TIMED_STEPS} steps of {SHORT_WINDOW} symbols timed, scaled to {T}"
    return _timed(config, corpus, plan, mesh, TIMED_STEPS), f"{TIMED_STEPS} steps timed"


def _timed(config: Config, corpus: Corpus, plan: StreamPlan, mesh: Mesh, steps: int) -> float:
    """Median seconds of a step, compilation left out."""
    V, rows = corpus.vocabulary.size, mesh_lib.process_rows(mesh, config.streams.batch_size)
    train_step = step_lib.make(config, V, mesh, plan.steps_per_epoch)
    state = step_lib.place(mesh, step_lib.init(config, V))
    own = plan.read(corpus.splits["train"], 0, rows)
    batch = mesh_lib.put(mesh, mesh_lib.BY_STREAM, Batch(*(a[:, : config.streams.window] for a in own)))
    times = []
    for _ in range(steps + 1):
        began = time.monotonic()
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.monotonic() - began)
    return float(np.median(times[1:]))


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
