"""Which devices a run is given: every core of a CPU, as far as its streams can be shared out."""

import os
import subprocess
import sys

import jax
import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from launch import cores
from launch.cluster import JobFlags
from tests.jobs import ROOT, last_line


@pytest.mark.parametrize(
    ("settings", "devices"),
    [
        ({"batch_size": 64}, 8),
        ({"batch_size": 63}, 7),
        ({"batch_size": 50}, 5),  # of 6, which would have 8 streams each, none could
        ({"batch_size": 24}, 3),
        ({"batch_size": 5}, 1),
        ({"batch_size": 64, "logical_shards": 4}, 4),
        ({"batch_size": 60, "logical_shards": 6}, 6),
        ({"batch_size": 64, "logical_shards": 3}, 1),  # which the training step refuses by name
        ({"batch_size": 60, "logical_shards": 1, "reduction": "fast"}, 6),
    ],
)
def test_as_many_cores_compute_as_the_streams_and_the_logical_shards_can_be_split_over(settings, devices):
    assert len(jax.devices()) == 8
    assert cores._shared(config_lib.replace(Config(), **settings)).size == devices


def test_a_number_of_devices_that_the_user_chose_is_left_alone():
    assert cores.mesh_of(JobFlags())(config_lib.replace(Config(), batch_size=5)).size == 8  # XLA_FLAGS of the tests


@pytest.mark.parametrize(
    ("given", "used", "expected"),
    [({}, 1, 1), ({}, 2, 2), ({"JAX_NUM_CPU_DEVICES": "3"}, 1, 3)],
    ids=["one core", "two cores", "told otherwise"],
)
def test_a_run_has_the_cores_that_its_process_may_use(tmp_path, given, used, expected):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < used:
        pytest.skip(f"{used} cores are wanted, and there is one")
    text = tmp_path / "text.txt"
    text.write_text("a text of some words " * 500)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | given
    flags = ["--dry_run", f"--corpus={text}", f"--cache_dir={tmp_path}", "--batch_size=24", "--window=8"]
    said = trained(allowed[:used], environment, *flags, "--hidden_size=8")
    assert f"devices               {expected} x cpu in 1 process" in said


def trained(cores: list[int], environment: dict[str, str], *flags: str) -> str:
    """What launch.train says on these cores."""
    program = (
        f"import os, runpy\nos.sched_setaffinity(0, {cores})\nrunpy.run_module('launch.train', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.long
def test_a_run_of_one_core_goes_on_where_there_are_two(tmp_path):
    allowed = sorted(os.sched_getaffinity(0))[:2]
    if len(allowed) < 2:
        pytest.skip("two cores are wanted, and there is one")
    text = tmp_path / "text.txt"
    text.write_text("a text of some words " * 500)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    flags = [
        "--flagfile=configs/tiny.flags",
        f"--corpus={text}",
        f"--cache_dir={tmp_path}",
        f"--run_dir={tmp_path}/run",
    ]
    flags += ["--batch_size=16", "--evaluate_every=0"]
    trained(allowed[:1], environment, *flags, "--num_steps=2")
    assert "finished: 3 steps" in trained(allowed, environment, *flags, "--num_steps=3")


# At a size at which XLA divides among threads what it may: products that read their left side transposed and operations
# on elements in the first model, sums in the second one.
TIED = "--hidden_size=640 --embedding_size=640 --tie_embeddings --window=24 --num_steps=2 --clip_norm=0.1"
NORMALISED = "--cell=layer_norm_lstm --hidden_size=768 --embedding_size=256 --window=16 --compute_dtype=bfloat16"


@pytest.mark.parametrize(
    "model",
    [TIED, pytest.param(f"{NORMALISED} --num_steps=1", marks=pytest.mark.long)],
    ids=["tied", "normalised"],
)
def test_a_run_has_the_same_bits_on_any_number_of_cores_and_devices(tmp_path, model):
    text, allowed = tmp_path / "text.txt", sorted(os.sched_getaffinity(0))
    text.write_text("some text of many words, 12345 lines of it\n" * 3000)
    flags = ["--flagfile=configs/tiny.flags", f"--corpus={text}", f"--cache_dir={tmp_path}", *model.split()]
    flags += ["--batch_size=64", "--logical_shards=4", "--evaluate_every=0", "--checkpoint_every=0"]
    digests = set()
    for devices, given in ((1, allowed[:1]), (4, allowed)):
        run_dir = tmp_path / f"{devices}-{len(given)}"
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        # Each process compiles for itself: a program that was compiled elsewhere has the bits of that place.
        trained(given, environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, *flags, f"--run_dir={run_dir}")
        digests.add(last_line(run_dir)["state_digest"])
    assert len(digests) == 1, digests
