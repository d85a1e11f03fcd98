"""What is computed on a CPU has the same bits on any number of cores, wherever the library is called from."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.inference import evaluate
from charlstm.model.ops import compiler
from charlstm.training import step, train_state
from data_pipeline.batch import Batch
from tests.jobs import ROOT, last_line

pytestmark = pytest.mark.optimized

DIVIDED = '"outer_dimension_partitions":["'  # how an operation that XLA divides among threads is marked


@pytest.fixture
def asked_anew():
    compiler.known.cache_clear()
    yield
    compiler.known.cache_clear()


def traced(name: str, **settings: object) -> jax.stages.Traced:
    """A step or an evaluation on one device, of a size at which XLA divides what it may."""
    sizes = {"hidden_size": 768, "num_layers": 1, "embedding_size": 64, "batch_size": 4, "window": 3}
    config = config_lib.replace(Config(), **sizes | settings)
    config, mesh = config_lib.fill_automatic(config, 1), distributed.make(jax.devices()[:1])
    ids, truth = jax.ShapeDtypeStruct((4, 3), np.uint8), jax.ShapeDtypeStruct((4, 3), np.bool_)
    batch, scored = distributed.abstract(mesh, distributed.BY_STREAM, (Batch(ids, ids, truth), truth))
    state = train_state.abstract(config, 100, mesh)
    if name == "step":
        return step.make(config, 100, mesh, 100).trace(state, batch)
    return evaluate.make_window(config, mesh).trace(state.params, state.recurrent_state, batch, scored)


def compiled(name: str) -> str:
    return traced(name).lower().compile().as_text()


@pytest.mark.parametrize("name", ["step", "evaluation"])
def test_nothing_but_products_is_divided_among_threads(name, monkeypatch):
    assert "XLA_FLAGS" in os.environ and not any(option in os.environ["XLA_FLAGS"] for option in compiler.OPTIONS)
    assert DIVIDED not in compiled(name)
    monkeypatch.setattr(compiler, "options", dict)
    assert DIVIDED in compiled(name)


@pytest.mark.parametrize("unknown", [{"xla_cpu_of_another_year": "1"}, {"xla_cpu_experimental_ynn_fusion_type": "NEW"}])
def test_an_option_that_this_jaxlib_does_not_know_is_left_out(unknown, monkeypatch, asked_anew):
    expected = {name: value for name, value in compiler.OPTIONS.items() if name not in unknown}
    monkeypatch.setattr(compiler, "OPTIONS", compiler.OPTIONS | unknown)
    assert compiler.options() == expected
    assert compiler.jit(lambda x: x + 1)(jnp.float32(1)) == 2


def test_what_the_user_has_told_xla_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_cpu_prefer_vector_width=256")
    assert compiler.options().keys() == compiler.OPTIONS.keys() - {"xla_cpu_prefer_vector_width"}


def test_a_program_is_part_of_the_one_that_calls_it():
    double = compiler.jit(lambda x, by: x * by, static_argnames="by")
    assert double(jnp.float32(3), by=2) == 6
    assert jax.jit(lambda x: double(x, by=2) + 1)(jnp.float32(3)) == 7


def test_programs_with_other_options_are_kept_apart(tmp_path):
    def function(x):
        return x * 3 + 1

    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        for _ in range(2):
            for way in (jax.jit(function), compiler.jit(function)):
                way(jnp.float32(1))
            jax.clear_caches()
        assert len(list(tmp_path.glob("jit_function-*-cache"))) == 2
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


# As a notebook would, without any setting of the environment.
PLAIN = """
import jax
from charlstm import config as config_lib, distributed
from charlstm.run import digest
from charlstm.training import step, train_state
from data_pipeline.build import corpora
from data_pipeline.loader import open_windows
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan
from charlstm.run import run_directory
from pathlib import Path
import sys

jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
config, identity = run_directory.read(Path(sys.argv[1]))
mesh = distributed.make()
corpus = open_corpus(corpora.resolve(config.corpus))
plan = StreamPlan(len(corpus.splits["train"]), config.streams.batch_size, config.streams.window, config.training.seed,
    reset_probability=config.streams.reset_probability)
V = corpus.vocabulary.size
train_step = step.make(config, V, mesh, plan.steps_per_epoch)
state = train_state.place(mesh, train_state.init(config, V))
with open_windows(corpus.splits["train"], plan, rows=range(config.streams.batch_size)) as windows:
    for _ in range(config.training.num_steps):
        state, _ = train_step(state, distributed.put(mesh, distributed.BY_STREAM, next(windows)))
print(digest.state_digest(state))
"""


@pytest.mark.long
def test_a_plain_interpreter_has_the_bits_of_the_programs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text of many words, 12345 lines of it\n" * 3000)
    flags = [
        "--flagfile=configs/tiny.flags", f"--corpus={text}", f"--cache_dir={tmp_path / 'cache'}", "--num_layers=1",
        "--hidden_size=640", "--embedding_size=640", "--tie_embeddings", "--window=24", "--num_steps=2",
        "--batch_size=64", "--logical_shards=4", "--evaluate_every=0", f"--run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    one = plain | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    how = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "launch.train", *flags], env=one, **how)
    for devices in "12":
        command = [sys.executable, "-c", PLAIN, str(tmp_path / "run"), devices]
        said = subprocess.run(command, env=plain | {"PYTHONPATH": str(ROOT)}, **how).stdout
        assert said.strip() == last_line(tmp_path / "run")["state_digest"]


DRAWN = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
import jax
from charlstm.config.model import ModelConfig
from charlstm.model import language_model
from charlstm.run import digest

sizes = {"num_layers": 1, "embedding_size": 8}
config = ModelConfig(hidden_size=640, weight_norm=True, **sizes)
print(digest.state_digest(language_model.init(config, 8, jax.random.key(0))))
config = ModelConfig(hidden_size=1500, cell="rnn", initializer="orthogonal", **sizes)
print(digest.state_digest(language_model.init(config, 8, jax.random.key(0))))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one core")
def test_a_model_is_drawn_with_the_same_bits_on_one_core_and_on_two():
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    how = {"cwd": ROOT, "env": plain | {"PYTHONPATH": str(ROOT)}, "check": True, "capture_output": True, "text": True}
    digests = [subprocess.run([sys.executable, "-c", DRAWN, cores], **how).stdout for cores in "12"]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("name", "settings", "is_full"), [
    ("step", {}, False),
    ("step", {"tf32": False}, True),
    ("step", {"tf32": False, "cell": "layer_norm_lstm"}, True),
    ("evaluation", {}, True),
])  # fmt: skip
def test_float32_products_are_rounded_to_tf32_in_training_alone_and_only_if_asked(name, settings, is_full):
    program = traced(name, **settings).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    full = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(products) > 2 and full == (products if is_full else [])


def test_what_is_sampled_and_looked_into_has_full_float32_products():
    seen = []
    compiler.jit(lambda: seen.append(jax.config.jax_default_matmul_precision))()
    assert seen == ["highest"] and jax.config.jax_default_matmul_precision != "highest"
