"""The flagfiles are what they say they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax

from charlstm import model
from charlstm.config import Config
from data_pipeline.corpora import resolve
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan
from launch import flags

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
    params = jax.eval_shape(lambda: model.init(config.model, corpus.vocabulary.size, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 240_321
    assert config.training.num_steps == 50 * 423
    # Streams read the columns: stream 7's first window is the beginning of column 7, its last the end of what is kept.
    text = (corpora / "tinyshakespeare.txt").read_text()
    first, last = (plan.read(corpus.splits["train"], step, range(50)) for step in (0, 422))
    assert corpus.vocabulary.decode(first.inputs[7]) == text[7 * 22_300 :][:50]
    assert corpus.vocabulary.decode(last.inputs[7]) == text[7 * 22_300 + 422 * 50 :][:50]
    held_out = corpus.splits["valid"].read(7 * 1150, 8 * 1150)
    assert corpus.vocabulary.decode(held_out) == text[7 * 22_300 + 21_150 : 8 * 22_300]


def test_the_large_flagfile_with_sizes_turned_down_trains_on_8_devices(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = [sys.executable, "-m", "launch.train", "--flagfile=configs/large.flags", f"--corpus={text}"]
    command += [f"--cache_dir={tmp_path}", f"--run_dir={tmp_path}/run", "--batch_size=16", "--window=16"]
    command += ["--hidden_size=32", "--embedding_size=16", "--num_steps=4", "--log_every=2", "--piece=512"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stderr
    assert re.search(r"step 4: validation \d\.\d+ bits per character", done.stderr)
