"""A run that was killed ends with the same bits as one that was not, on the same or on another number of devices."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from charlstm import distributed
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from launch import train as launch_train
from tests.compiling import xla_flags

ROOT = Path(__file__).resolve().parent.parent.parent

# Runs launch.train and kills its own process in step 27, once the checkpoint of step 20 is on disk: no cleaning up, no
# goodbye, the same as `kill -9` from outside but at a known moment.
KILLED_AT_27 = """
import os, pathlib, signal, sys, time
from charlstm.run.metrics import MetricAggregator
from launch import train
add, run_dir = MetricAggregator.add, pathlib.Path(sys.argv[1].removeprefix("--run_dir="))
def add_and_die(self, step, metrics):
    add(self, step, metrics)
    if step == 27:
        while not (run_dir / "checkpoints" / "20").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
MetricAggregator.add = add_and_die
train.main(sys.argv)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text of 27 steps an epoch for 16 streams of windows of 16: step 20 is mid-epoch, and 27 and 54 are borders."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(40)]
    path.write_text(" ".join(random.choice(words, 1400))[:7700])
    return path


def of_run(run_dir: Path, text: Path, *flags: str) -> list[str]:
    own = [f"--run_dir={run_dir}", f"--flagfile={ROOT / 'configs' / 'tiny.flags'}", f"--corpus={text}"]
    return [*own, f"--cache_dir={text.parent / 'cache'}", "--checkpoint_every=20", "--evaluate_every=0", *flags]


def train(run_dir: Path, text: Path, *flags: str, devices: int = 1, program: tuple[str, ...] = ("-m", "launch.train")):
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, *program, *of_run(run_dir, text, *flags)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_20_steps_and_kill_9_and_20_resumed_are_40_to_the_bit_of_a_small_one(text, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = ("--num_layers=1", "--hidden_size=8", "--num_steps=40", "--logical_shards=8")
    assert launch_train.main(["train", *of_run(straight, text, *flags)]) == 0
    died = train(killed, text, *flags, devices=8, program=("-c", KILLED_AT_27))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert launch_train.main(["train", *of_run(killed, text, *flags)]) == 0
    assert "continuing from the checkpoint of step 20" in (killed / "log.txt").read_text()
    assert_same_end(straight, killed)


def last_line(run_dir: Path) -> dict:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def final_state(run_dir: Path):
    config, identity = run_directory.read(run_dir)
    mesh = distributed.make(jax.devices()[:1])
    with Checkpoints(run_dir / "checkpoints", writable=False, log=print) as checkpoints:
        return checkpoints.restore(train_state.abstract(config, identity.vocabulary.size, mesh))[0]


def assert_same_end(one: Path, other: Path):
    """Every leaf of the last checkpoint, and the digest in the last line of the metrics."""
    a, b = final_state(one), final_state(other)
    for leaf, twin in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(twin).tobytes()
    assert last_line(one)["state_digest"] == last_line(other)["state_digest"]


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        ("--cell=lstm", "--num_layers=1"),
        (
            "--cell=gru",
            "--reset_state=document",
            r"--document_separator=\x20a",
            "--zoneout=.1",
            "--train_initial_state",
        ),
        (
            *("--cell=rnn", "--nonlinearity=relu", "--optimizer=rmsprop", "--norotate_streams"),
            *("--schedule=step", "--drop_epochs=1,2", "--decay_rate=.1"),  # at steps 27 and 54
        ),
        (
            *("--cell=mlstm", "--compute_dtype=bfloat16", "--optimizer=adagrad", "--logical_shards=4"),
            *("--vocabulary=characters", "--embedding_size=0", "--embedding_dropout=0"),
        ),
    ],
    ids=["lstm", "gru", "rnn", "mlstm bfloat16"],
)
def test_20_steps_and_kill_9_and_40_resumed_are_60_to_the_bit(flags, text, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = train(straight, text, *flags)
    assert done.returncode == 0, done.stderr
    assert "27 steps an epoch" in done.stderr
    died = train(killed, text, *flags, program=("-c", KILLED_AT_27))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (killed / "checkpoints" / "40").exists()
    resumed = train(killed, text, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from the checkpoint of step 20" in resumed.stderr
    assert_same_end(straight, killed)
    # The metrics, too, are those of one run: each step once.
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (straight / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.optimized
@pytest.mark.long
def test_a_run_started_on_8_devices_goes_on_4_2_1_and_8_with_the_bits_of_the_run_that_stayed_on_8(text, tmp_path):
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    done = train(stayed, text, "--num_steps=50", devices=8)
    assert done.returncode == 0, done.stderr
    for devices, until in ((8, 10), (4, 20), (2, 30), (1, 40), (8, 50)):
        done = train(moved, text, f"--num_steps={until}", devices=devices)
        assert done.returncode == 0, done.stderr
        assert f"training on {devices} x" in done.stderr
        assert "8 logical shards" in done.stderr
    assert_same_end(stayed, moved)


@pytest.mark.optimized
@pytest.mark.long
def test_with_the_fast_reduction_another_number_of_devices_is_within_1e_5(text, tmp_path):
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    assert train(stayed, text, "--num_steps=40", "--reduction=fast", devices=8).returncode == 0
    assert train(moved, text, "--num_steps=20", "--reduction=fast", devices=8).returncode == 0
    assert train(moved, text, "--num_steps=40", "--reduction=fast", devices=2).returncode == 0
    one, other = final_state(stayed), final_state(moved)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


@pytest.mark.long
def test_a_count_of_devices_that_does_not_divide_the_shards_is_refused_with_those_that_do(text, tmp_path):
    assert train(tmp_path / "run", text, "--num_steps=2", "--batch_size=24", devices=8).returncode == 0
    done = train(tmp_path / "run", text, "--num_steps=4", "--batch_size=24", devices=3)
    assert done.returncode == 2
    assert "logical_shards=8 cannot be split exactly over 3 devices: use 1, 2, 4, 8 devices" in done.stderr
