"""Estimates of a run: sizes, FLOPs, memory, traffic, and an ETA from timed steps.  Changes nothing."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.inference import evaluate as evaluate_lib
from charlstm.model import language_model
from charlstm.run import corpus as corpus_lib
from charlstm.run import digest, memory, run_directory, samples
from charlstm.run.memory import End, format_bytes
from charlstm.run.metrics import duration
from charlstm.training import averaging, placement, schedules, train_state
from charlstm.training import step as step_lib
from data_pipeline.batch import Batch
from data_pipeline.progress import announced
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan

TIMED_STEPS = 3  # at least, and for
TIMED_SECONDS = 1.0
PATIENCE = 60.0  # seconds; where three whole steps would take longer, short windows are timed instead
SHORT_WINDOW = 8
SAMPLED = 128  # symbols of a sample that are timed
RATE = 1e13  # products and sums in a second, of which the arithmetic is told in hours: those of one fast GPU, about


def report(
    config: Config,
    corpus: Corpus,
    plan: StreamPlan,
    mesh: Mesh,
    done: int | None = None,
    form: str = "text",
    end: End = None,
) -> str:
    """The table, or with the form "json" one line of its numbers.  Raises ValueError as the run itself would.

    What does not fit in memory is not timed: its seconds are null.

    Args:
      done: updates that a run to go on with has made; None for a new run.
    """
    shards = placement.shards_per_device(config, mesh.size)
    V, symbols = corpus.vocabulary.size, config.streams.batch_size * config.streams.window
    state = jax.eval_shape(lambda: train_state.init(config, V))
    parameters, arithmetic = count_parameters(config, V), flops(config, V)
    even = config_lib.replace(config, window_deviation=0, short_window_probability=0.0)  # windows of a usual length
    even_plan = dataclasses.replace(plan, deviation=0, short_probability=0.0)
    longest = config_lib.replace(even, window=config.streams.longest_window)
    train_step = step_lib.make(longest, V, mesh, plan.steps_per_epoch)
    with announced("compiling the update"):
        update = memory.compiled_update(train_step, longest, V, corpus.splits["train"].dtype, mesh)
    too_much = memory.too_much(update, config, mesh)
    with announced("timing a few updates"):
        seconds, how = (None, "") if too_much else _seconds_a_step(even, corpus, even_plan, mesh, end)
    if form == "json":
        return json.dumps({"parameters": parameters, "flops_per_step": arithmetic, "seconds_per_step": seconds})
    remarks = schedules.remarks(config.optimizer, config.training, plan.steps_per_epoch, resumed=done is not None)
    whole = config.training.num_steps * arithmetic
    timing = [("time per step", "not timed: it does not fit"), ("does not fit", too_much)]
    if seconds is not None:
        speed = f"{seconds:.4g} s, {symbols / seconds:,.0f} symbols/s ({how})"
        timing = [("time per step", speed), ("ETA", _eta(done or 0, seconds, config, corpus, mesh))]
    sizes = f"{format_bytes(update.held)} state and batch, {format_bytes(update.temporary)} temporaries"
    taken = f"{format_bytes(update.on_a_device)} ({sizes})" if update.on_a_device else "not told by this backend"
    rows = [
        ("devices", distributed.describe(mesh)),
        ("corpus", f"{corpus.name}: {plan.symbols:,} training symbols, vocabulary of {V}"),
        *(("", line) for line in corpus_lib.description(plan, config.training.num_steps)),
        ("parameters", f"{parameters:,}"),
        ("state", format_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))),
        (
            "arithmetic",
            f"{arithmetic:.2g} FLOP an update, {whole:.2g} in all: "
            f"{duration(whole / RATE)} at {RATE:.0e} FLOP/s (a GPU)",
        ),
        ("memory per device", taken),
        ("bytes per all-reduce", f"{format_bytes(4 * (parameters + 2))}, once a step ({config.training.reduction})"),
        ("logical shards", f"{config.training.logical_shards}, {shards} a device"),
        ("symbols per step", f"{symbols:,}"),
        ("steps per epoch", f"{plan.steps_per_epoch:,}"),
        ("steps", f"{config.training.num_steps:,} ({config.training.num_steps / plan.steps_per_epoch:.2f} epochs)"),
        ("learning rate", "; ".join([f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}", *remarks])),
        *timing,
    ]
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _eta(done: int, of_step: float, config: Config, corpus: Corpus, mesh: Mesh) -> str:
    """The whole time in words, and its parts: steps, evaluations, samples, and what a save keeps training from.

    `done` steps are made already; one takes `of_step` seconds.

    One of each is timed, of an evaluation a few windows, of a sample a few symbols.
    """
    training, V = config.training, corpus.vocabulary.size
    last, valid = training.num_steps, corpus.splits.get("valid")
    separator = run_directory.separator(config, corpus.vocabulary)
    state = train_state.place(mesh, train_state.init(config, V))
    left = f"{last - done:,} steps left" if 0 < done < last else "steps"
    parts = [(left, max(0, last - done) * of_step)]
    evaluations = _times_due(done, last, training.evaluate_every) if valid else 0
    if valid:
        shards, most = placement.shards_per_device(config, mesh.size), training.evaluate_symbols
        score = evaluate_lib.make_evaluator(config, V, valid, mesh, separator, shards, most)
        with announced("timing a part of an evaluation"):
            each = _seconds_of_windows(lambda doing: score(averaging.to_evaluate(state), doing))
        parts.append((f"evaluations ({evaluations:,})", evaluations * each))
    if training.sampled_every is not None:
        count, symbols = _times_due(done, last, training.sampled_every), min(training.sample_length, SAMPLED)
        short = config_lib.replace(config, sample_length=symbols)
        with announced("timing a sample"):
            each = _second_time(lambda: samples.draw(short, corpus.vocabulary, separator, averaging.to_evaluate(state)))
        parts.append((f"samples ({count:,})", count * each * training.sample_length / max(1, symbols)))
    saves = max(evaluations, _times_due(done, last, training.checkpoint_every))
    parts.append((f"saves ({saves:,})", saves * _second_time(lambda: digest.state_digest(state))))
    told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts)
    return f"{duration(sum(seconds for _, seconds in parts))}: {told}"


def _times_due(done: int, last: int, every: int) -> int:
    """Returns how often an event is due after step `done` that comes every `every` steps and at the last one."""
    if done >= last:
        return 0
    return -(-last // every) - done // every if every else 1


def _second_time(act: Callable[[], object]) -> float:
    """Seconds of `act` when all is compiled."""
    act()
    began = time.monotonic()
    act()
    return time.monotonic() - began


class _Enough(Exception):
    pass


def _seconds_of_windows(evaluate: Callable[[evaluate_lib.Doing], object]) -> float:
    """Seconds of an evaluation, by its windows of some TIMED_SECONDS."""
    seen: list[float] = []  # when each window but the first two, which are compiled, began
    total = 0

    def doing(done: int, windows: int) -> None:
        nonlocal total
        total = windows
        if done > 1:
            seen.append(time.monotonic())
            if distributed.any_process(seen[-1] - seen[0] > TIMED_SECONDS):  # clocks differ
                raise _Enough

    began = time.monotonic()
    with contextlib.suppress(_Enough):
        evaluate(doing)
    if len(seen) < 2:
        return time.monotonic() - began
    return (seen[-1] - seen[0]) / (len(seen) - 1) * total


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
