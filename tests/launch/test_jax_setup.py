"""The process before JAX starts: what was compiled is kept, what is freed is kept, the cores of a CPU are devices."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import estimate
from charlstm.training import step as step_lib
from charlstm.training import train_state
from data_pipeline.batch import Batch
from launch.support import jax_setup
from launch.support.cluster import JobFlags
from tests import compiling
from tests.jobs import ROOT, last_line

# Sizes and bits of programs are what is looked at here.
pytestmark = pytest.mark.optimized
QUICKLY = {"XLA_FLAGS": compiling.QUICK_FLAGS, compiling.UNOPTIMIZED: "true"}  # where they are not

# The compilation cache.


def test_the_tests_keep_programs_for_other_numbers_of_cores_and_none_of_another_lock(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    cores = {0}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    (tmp_path / "requirements.lock").write_text("jax==1")
    of_one = compiling.kept(tmp_path)
    cores.add(1)
    of_two = compiling.kept(tmp_path)
    assert of_one != of_two and of_one.is_dir() and of_two.is_dir()
    (tmp_path / "requirements.lock").write_text("jax==2")
    assert compiling.kept(tmp_path).is_dir() and not of_one.exists() and not of_two.exists()


def started(run_dir: Path, home: Path, arguments: tuple[str, ...]) -> tuple[dict[str, int], str]:
    """A run of four steps of somebody who lives in `home`: the sizes of the compiled programs, and what was said."""
    own = {name: value for name, value in os.environ.items() if "_CACHE_" not in name}  # not what the tests share
    environment = own | QUICKLY | {"HOME": str(home)}
    command = [sys.executable, "-m", "launch.train", *arguments, "--num_steps=4", f"--run_dir={run_dir}"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    files = (home / ".cache" / "charlstm" / "compiled").glob("*/*-cache")
    return {path.name: path.stat().st_size for path in files}, ended.stderr


@pytest.mark.long
def test_a_second_start_compiles_nothing_and_torn_programs_are_compiled_again_in_silence(arguments, tmp_path):
    first, _ = started(tmp_path / "first", tmp_path, arguments)
    assert any(name.startswith("jit_local_step-") for name in first)
    assert started(tmp_path / "second", tmp_path, arguments)[0] == first
    for path in (tmp_path / ".cache" / "charlstm" / "compiled").glob("*/jit_*-cache"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if len(content) % 2 else content[:-40] + bytes(40))
    _, said = started(tmp_path / "third", tmp_path, arguments)
    assert "persistent" not in said and "Warning" not in said, said
    digests = {last_line(tmp_path / name)["state_digest"] for name in ("first", "second", "third")}
    assert len(digests) == 1


def test_a_home_that_cannot_be_written_stops_nothing(arguments, tmp_path):
    (tmp_path / ".cache").write_text("a file, not a directory")
    assert started(tmp_path / "run", tmp_path, arguments)[0] == {}
    assert last_line(tmp_path / "run")["step"] == 4


# Freed memory.

PROGRAM = """
import resource, sys, threading
import numpy as np
from launch.support import jax_setup
jax_setup.keep_freed_memory(int(sys.argv[1]))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=lambda: np.ones(100 << 20, np.uint8))
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
@pytest.mark.parametrize(
    ("variable", "block", "kept"),
    [
        ("", jax_setup.LARGE, True),
        ("", jax_setup.LARGE - 1, False),
        pytest.param("MALLOC_ARENA_MAX", jax_setup.LARGE, False, marks=pytest.mark.long),
        ("GLIBC_TUNABLES", jax_setup.LARGE, False),
    ],
)
def test_memory_that_a_thread_has_freed_is_not_mapped_again_if_blocks_are_large_and_the_user_says_nothing_else(
    variable, block, kept
):
    environment = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES" and not n.startswith("MALLOC_")}
    environment |= (
        {variable: "4" if variable.startswith("MALLOC") else "glibc.malloc.tcache_count=7"} if variable else {}
    )
    command = [sys.executable, "-c", PROGRAM, str(block)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    first, second = (int(count) for count in done.stdout.split())
    assert (second < first / 10) == kept, (first, second)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 512, "num_layers": 3}, pytest.param({"cell": "gru", "batch_size": 64}, marks=pytest.mark.long)],
)
def test_the_temporaries_of_an_update_are_known_about_before_it_is_compiled(changes):
    config = config_lib.fill_automatic(config_lib.replace(Config(), **{"batch_size": 32, "window": 64} | changes), 1)
    mesh, shape = distributed.make(jax.devices()[:1]), (config.streams.batch_size, config.streams.window)
    ids = jax.ShapeDtypeStruct(shape, np.uint8)
    batch = distributed.abstract(mesh, distributed.BY_STREAM, Batch(ids, ids, jax.ShapeDtypeStruct(shape, np.bool_)))
    program = step_lib.make(config, 96, mesh, 1000).lower(train_state.abstract(config, 96, mesh), batch).compile()
    told = program.memory_analysis().temp_size_in_bytes
    assert 0.6 * told < estimate.estimate_temp_bytes(config, 1) < 1.4 * told, told


# Cores as devices.


def test_a_number_of_devices_that_the_user_chose_is_left_alone():
    assert (
        jax_setup.mesh_chooser(JobFlags())(config_lib.replace(Config(), batch_size=5)).size == 8
    )  # XLA_FLAGS of the tests


@pytest.mark.parametrize(
    ("given", "used", "expected"),
    [({}, 2, 2), pytest.param({"JAX_NUM_CPU_DEVICES": "3"}, 1, 3, marks=pytest.mark.long)],
    ids=["two cores", "told otherwise"],
)
def test_a_run_has_the_cores_that_its_process_may_use(tmp_path, given, used, expected):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < used:
        pytest.skip(f"{used} cores are wanted, and there is one")
    text = tmp_path / "text.txt"
    text.write_text("a text of some words " * 500)
    environment = os.environ | QUICKLY | given
    flags = [
        "--dry_run",
        f"--corpus={text}",
        f"--cache_dir={tmp_path}",
        "--batch_size=24",
        "--window=8",
        "--num_layers=1",
    ]
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
TIED = (
    "--hidden_size=640 --embedding_size=640 --tie_embeddings --window=24 --num_steps=2 --clip_norm=0.1 --num_layers=1"
)
NORMALISED = "--cell=layer_norm_lstm --hidden_size=768 --embedding_size=256 --window=16 --compute_dtype=bfloat16"


@pytest.mark.parametrize(
    "model",
    [TIED, pytest.param(f"{NORMALISED} --num_steps=1", marks=pytest.mark.long)],
    ids=["tied", "normalized"],
)
def test_a_run_has_the_same_bits_on_any_number_of_cores_and_devices(tmp_path, model):
    text, allowed = tmp_path / "text.txt", sorted(os.sched_getaffinity(0))
    text.write_text("some text of many words, 12345 lines of it\n" * 3000)
    flags = ["--flagfile=configs/tiny.flags", f"--corpus={text}", f"--cache_dir={tmp_path}", *model.split()]
    flags += ["--batch_size=64", "--logical_shards=4", "--valid_fraction=0", "--checkpoint_every=0"]
    digests = set()
    for devices, given in ((1, allowed[:1]), (4, allowed)):
        run_dir = tmp_path / f"{devices}-{len(given)}"
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        # Each process compiles for itself: a program that was compiled elsewhere has the bits of that place.
        trained(given, environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, *flags, f"--run_dir={run_dir}")
        digests.add(last_line(run_dir)["state_digest"])
    assert len(digests) == 1, digests
