"""The flagfiles are what they say they are."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config, flagfile
from charlstm.model import language_model
from charlstm.run import estimate, search_space
from charlstm.training import plateau, schedules, step, train_state
from data_pipeline.batch import Batch
from data_pipeline.build.corpora import resolve
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan
from launch.support import flags
from tests.compiling import xla_flags

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_tinyshakespeare_recipe_is_char_rnns_to_the_letter(corpora: Path, tmp_path):
    (config,), _ = flags.parse(
        [
            "train",
            f"--flagfile={ROOT}/configs/tinyshakespeare.flags",
            f"--corpus={corpora}/tinyshakespeare.txt",
            f"--cache_dir={tmp_path}",
        ],
        "",
        Config(),
    )
    corpus = open_corpus(resolve(config.corpus))
    plan = StreamPlan(len(corpus.splits["train"]), config.streams.batch_size, config.streams.window, rotate=False)
    assert plan.steps_per_epoch == 423  # of 446 windows, 23 are held out
    assert len(corpus.splits["valid"]) == 50 * 23 * 50
    assert "test" not in corpus.splits
    assert corpus.vocabulary.size == 65
    params = jax.eval_shape(lambda: language_model.init(config.model, corpus.vocabulary.size, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 240_321
    assert config.training.num_steps == 50 * 423
    # Streams read the columns: stream 7's first window is the beginning of column 7, its last the end of what is kept.
    text = (corpora / "tinyshakespeare.txt").read_text()
    first, last = (plan.read(corpus.splits["train"], step, range(50)) for step in (0, 422))
    assert corpus.vocabulary.decode(first.inputs[7]) == text[7 * 22_300 :][:50]
    assert corpus.vocabulary.decode(last.inputs[7]) == text[7 * 22_300 + 422 * 50 :][:50]
    held_out = corpus.splits["valid"].read(7 * 1150, 8 * 1150)
    assert corpus.vocabulary.decode(held_out) == text[7 * 22_300 + 21_150 : 8 * 22_300]


def test_the_hour_of_shakespeare_has_the_split_of_the_model_that_it_is_compared_with(corpora: Path, tmp_path):
    where = [f"--corpus={corpora}/tinyshakespeare.txt", f"--cache_dir={tmp_path}"]
    (config,), _ = flags.parse(["train", f"--flagfile={ROOT}/configs/shakespeare_hour.flags", *where], "", Config())
    splits = {name: len(split) for name, split in open_corpus(resolve(config.corpus)).splits.items()}
    assert splits == {"train": 1_003_854, "valid": 111_540}  # of 1,115,394: int(0.9 * n), and the rest
    assert config.model.cell == "layer_norm_lstm" and config.training.num_steps == 10 * 490  # windows of an epoch


@pytest.mark.long
def test_the_large_flagfile_with_sizes_turned_down_trains_on_8_devices(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = [sys.executable, "-m", "launch.train", "--flagfile=configs/large.flags", f"--corpus={text}"]
    command += [f"--cache_dir={tmp_path}", f"--run_dir={tmp_path}/run", "--batch_size=16", "--window=16"]
    command += ["--hidden_size=32", "--embedding_size=16", "--num_layers=2", "--num_steps=2", "--eval_chunk=512"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(8)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stderr
    assert re.search(r"step 2: validation \d\.\d+ bits per (character|byte)", done.stderr)


# What is published of each model: the symbols of its text here, its millions of parameters, and to what precision.
PUBLISHED = {
    "enwik8_melis27m": (256, 27, 1),
    "enwik8_melis46m": (256, 46, 1),
    "enwik8_lstm48m": (256, 48, 1),
    "enwik8_mogrifier48m": (256, 48, 1),
    "enwik8_mogrifier96m": (256, 96, 1),
    "enwik8_awd": (256, 47.3, 0.1),
    "enwik8_mlstm46m": (256, 46, 1),
    "ptb_awd": (50, 13.8, 0.1),
    "ptb_mogrifier24m": (50, 24, 1),
    "amazon_mlstm4096": (256, 86.3, 0.1),  # 85 without embedding and softmax
    "flair_news": (275, 18.2, 0.1),  # from the shapes of their file
}
RECIPES = pytest.mark.parametrize("name", sorted(PUBLISHED))


def recipe(name: str) -> Config:
    return flags.parse(["train", f"--flagfile={ROOT}/configs/{name}.flags"], "", Config())[0][0]


@RECIPES
def test_a_recipe_has_as_many_parameters_as_is_published(name):
    V, millions, precision = PUBLISHED[name]
    assert abs(estimate.count_parameters(recipe(name), V) / 1e6 - millions) <= precision / 2


# One of each kind; the others are of the same settings in other sizes and with other rates.
@pytest.mark.parametrize(
    "name",
    [
        "enwik8_awd",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("enwik8_mogrifier48m", "amazon_mlstm4096")),
        *(pytest.param(f"enwik8_{name}", marks=pytest.mark.long) for name in ("melis46m", "mlstm46m", "lstm48m")),
        pytest.param("flair_news", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_recipe_with_sizes_turned_down_takes_two_updates(name):
    config = recipe(name)
    small = {"num_layers": min(config.model.num_layers, 2), "hidden_size": 6, "batch_size": 4, "window": 8}
    small |= {"embedding_size": 4, "last_hidden_size": 4} if config.model.tie_embeddings else {"embedding_size": 6}
    small |= {"mogrifier_rank": min(config.model.mogrifier_rank, 2)}
    small |= {"window_deviation": min(config.streams.window_deviation, 1)}
    config = config_lib.fill_automatic(config_lib.replace(config, **small), 1)
    mesh, random = distributed.make(jax.devices()[:1]), np.random.default_rng(0)
    train_step = step.make(config, 7, mesh, steps_per_epoch=10)
    state = train_state.place(mesh, train_state.init(config, 7))
    before = jax.tree.map(np.asarray, state.params)
    for _ in range(2):
        ids = random.integers(0, 7, (4, 9), dtype=np.uint8)
        batch = Batch(ids[:, :-1], ids[:, 1:], np.zeros((4, 8), bool))
        state, metrics = train_step(state, distributed.put(mesh, distributed.BY_STREAM, batch))
        assert metrics.accepted and metrics.grad_norm > 0
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert (one != np.asarray(other)).any()


@RECIPES
def test_a_recipe_says_what_is_published_what_it_costs_and_what_was_reached(name):
    text = (ROOT / "configs" / f"{name}.flags").read_text()
    config, (V, _, _) = recipe(name), PUBLISHED[name]
    assert f"--flagfile=configs/{name}.flags" in text
    assert re.search(r"^# Published: 1\.\d+ bits per (character|byte)", text, re.MULTILINE)
    assert re.search(r"^# Reached here:", text, re.MULTILINE)
    cost = re.search(r"^# Cost: (\S+) FLOP an update, (\S+) in all", text, re.MULTILINE)
    assert cost, "no cost"
    each = estimate.flops(config, V)
    assert [f"{each:.2g}", f"{each * config.training.num_steps:.2g}"] == list(cost.groups())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.flags")), ids=lambda path: path.stem)
def test_no_flagfile_ends_the_decay_of_the_rate_before_the_run(path):
    assert "decay_steps" not in {name for _, name, _ in flagfile.lines(path)}  # or --num_steps would train at rate 0


@pytest.mark.parametrize(
    ("name", "rate", "windows", "epochs"),
    [("enwik8_awd", 1e-3, 3515, (25, 35, 50)), ("ptb_awd", 2e-3, 261, (300, 400, 500))],
)
def test_the_rate_of_awd_lstm_falls_to_a_tenth_twice(name, rate, windows, epochs):
    config = recipe(name)
    assert config.training.num_steps == windows * epochs[-1]
    schedule = schedules.make(config.optimizer, windows, config.training.num_steps)
    for times, (first, end) in enumerate(itertools.pairwise((0, *epochs))):
        for update in (windows * first, windows * end - 1):
            assert schedule(jnp.int32(update), plateau.start()) == pytest.approx(rate / 10**times, rel=1e-5)


@pytest.mark.parametrize("name", [path.name.partition(".")[0] for path in (ROOT / "configs").glob("*.space.toml")])
def test_a_space_has_the_settings_that_its_study_begins_with_in_it(name):
    space, config = search_space.read(str(ROOT / "configs" / f"{name}.space.toml"), recipe(name)), recipe(name)
    assert search_space.own_values(space, config).keys() == space.drawn.keys()


def test_the_space_around_char_rnns_recipe_leaves_its_size_as_it_is():
    config = recipe("tinyshakespeare")
    space = search_space.read(str(ROOT / "configs" / "tinyshakespeare.space.toml"), config)
    assert not space.fitted and not space.drawn.keys() & {"hidden_size", "num_layers", "cell", "batch_size", "window"}
    assert estimate.count_parameters(config, 65) == 240_321
