"""A run whose model has learned nothing, and a server of it in this process or in another one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm import rng as rng_lib
from charlstm.config import Config
from charlstm.model import language_model
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from data_pipeline.vocabulary import Vocabulary
from tests.jobs import ROOT, xla_flags

CONFIG = config_lib.replace(
    config_lib.fill_automatic(Config(), 1),
    num_layers=2,
    hidden_size=12,
    batch_size=8,
    initializer="normal",
    init_scale=0.9,
)


def params_of(step, vocabulary, config=CONFIG):
    return language_model.init(config.model, vocabulary.size, rng_lib.named(jax.random.key(step), "init"))


def save(run_dir, vocabulary, step, score, config=CONFIG):
    """Writes a checkpoint."""
    identity = run_directory.Identity(vocabulary, "f" * 64)
    with Checkpoints(run_dir / "checkpoints", log=print) as checkpoints:
        state = train_state.init(config, vocabulary.size)
        params = params_of(step, vocabulary, config)
        state = state._replace(step=jnp.asarray(step, jnp.int32), params=params)
        own = run_directory.checkpoint_identity(config, identity)
        checkpoints.save(train_state.place(distributed.make(), state), own, score)


def make_run(run_dir, vocabulary, config=CONFIG):
    run_directory.create(run_dir, config, run_directory.Identity(vocabulary, "f" * 64), [])
    save(run_dir, vocabulary, 3, 2.5, config)
    return run_dir


RUNS = {
    "bytes": (Vocabulary("bytes"), CONFIG),
    "characters": (Vocabulary("characters", "\nabcdefgé€"), CONFIG),
    "no_newline": (Vocabulary("characters", "abcdefgé€"), CONFIG),
    "documents": (
        Vocabulary("characters", "\nabcdefgé€"),
        config_lib.replace(CONFIG, reset_state="document", document_separator="ab"),
    ),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """name -> run directory."""
    there = tmp_path_factory.mktemp("served")
    return {name: make_run(there / name, *what) for name, what in RUNS.items()}


@contextlib.contextmanager
def started(run_dir, *flags, program=("-m", "launch.serve")):
    """A server in a process of its own; yields the process and its address."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *program, f"--run_dir={run_dir}", "--port=0", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    drain = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    drain.start()
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), (address, said)
        process.said = said
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        drain.join()
        process.stdout.close()
        process.stderr.close()
