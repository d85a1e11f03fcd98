"""This project's training step as `launch.train` makes it: compiled and freed memory kept as there."""

import jax
import numpy as np

from benchmarks.peers.recipe import CLIP, LEARNING_RATE
from benchmarks.shapes import Shape, windows
from benchmarks.worker import Contestant
from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.inference import generate
from charlstm.model import language_model
from charlstm.run import estimate
from charlstm.training import step as step_lib
from charlstm.training import train_state
from data_pipeline.batch import Batch
from data_pipeline.loader import open_windows
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan
from launch.support import jax_setup


def config_of(shape: Shape, **changes: object) -> Config:
    """The settings of a run of this shape; zeros that mean the obvious number are filled in by `resolve`."""
    return config_lib.replace(
        Config(), batch_size=shape.B, window=shape.T, cell=shape.cell, hidden_size=shape.H, num_layers=shape.L,
        embedding_size=shape.E, compute_dtype=shape.dtype, clip_norm=CLIP, learning_rate=LEARNING_RATE, **changes,
    )  # fmt: skip


def training(shape: dict, **changes: object) -> Contestant:
    """An update on all the devices there are, from a batch in the host's memory; fused where it can be."""
    sizes = Shape(**shape)
    config = config_of(sizes, **changes)
    jax_setup.keep_freed_memory(estimate.estimate_temp_bytes(config, distributed.usable_cores()))
    mesh = distributed.make()
    config = config_lib.fill_automatic(config, mesh.size)
    if "lstm_backend" not in changes and distributed.has_mosaic(mesh) and not config.model.unsupported_by("fused"):
        config = config_lib.replace(config, lstm_backend="fused")
    train_step = step_lib.make(config, sizes.V, mesh, 1000)
    state = train_state.place(mesh, train_state.init(config, sizes.V))
    text, reset = windows(sizes), np.zeros((sizes.B, sizes.T), bool)

    def update() -> None:
        nonlocal state
        ids = next(text)
        batch = distributed.put(mesh, distributed.BY_STREAM, Batch(ids[:, :-1], ids[:, 1:], reset))
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))

    return Contestant(update, device_memory(mesh), distributed.describe(mesh))


def device_memory(mesh: distributed.Mesh):
    """Tells the peak of the first device's own memory; None where that is the host's."""
    device = mesh.devices.flat[0]
    return (lambda: device.memory_stats()["peak_bytes_in_use"]) if device.memory_stats() else None


def matrix_product(size: int, dtype: str) -> Contestant:
    """One product of two matrices of `size`: what a machine can do at best."""
    a, b = (jax.random.normal(jax.random.key(n), (size, size)).astype(dtype) for n in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return Contestant(lambda: product(a, b).block_until_ready())


def sampling(shape: dict, samples: int, length: int) -> Contestant:
    """`length` symbols of each of `samples` texts, at temperature 1, as `launch.sample` makes them."""
    sizes, mesh = Shape(**shape), jax_setup.sampling_mesh(samples)
    config, prompt = config_of(sizes).model, np.zeros(1, np.int32)
    params = distributed.put(mesh, distributed.REPLICATED, language_model.init(config, sizes.V, jax.random.key(0)))
    how = generate.Sampling()

    def write() -> None:
        for _ in generate.generate(config, params, prompt, how, rows=samples, length=length, seed=0):
            pass

    return Contestant(write, device=distributed.describe(mesh))


def reading(shape: dict, corpus: str) -> Contestant:
    """A window of every stream, from a prepared corpus, read ahead as `launch.train` does."""
    sizes, streams = Shape(**shape), Config().streams
    split = open_corpus(corpus).splits["train"]
    plan = StreamPlan(len(split), sizes.B, sizes.T, reset_probability=streams.reset_probability)
    windows = open_windows(
        split, plan, rows=range(sizes.B), threads=streams.reader_threads, read_ahead=streams.read_ahead
    )
    return Contestant(lambda: next(windows))
