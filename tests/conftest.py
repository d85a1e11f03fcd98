"""The suite runs on 8 simulated CPU devices, with implicit promotions refused."""

import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests import compiling

if "CHARLSTM_TEST_ON_GPU" in os.environ:  # for those marked gpu, on a machine that has one
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # tolerances are of float32, not of TF32
else:
    compiling.compile_quickly(devices=8)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# The tests, and the programs that they start, share what they compile, with each other and with the next run: some
# megabytes, which go when the versions do or when it grows.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiling.kept(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A suite started in the background of a script inherits that Ctrl-C is ignored, and so would the programs it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hypothesis import settings  # noqa: E402

from tests import fuzzing  # noqa: E402, F401
from tests.jobs import STEPS, last_line  # noqa: E402

settings.load_profile("tests")


def of_users(config: pytest.Config) -> bool:
    """True if the tests marked `optimized` are asked for, which are then compiled as users do."""
    return re.search(r"(?<!not )\boptimized\b", config.option.markexpr) is not None


def pytest_configure(config: pytest.Config) -> None:
    if of_users(config):
        compiling.compile_as_users_do()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if of_users(config) or "CHARLSTM_TEST_ON_GPU" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("optimized"):
            item.add_marker(pytest.mark.skip(reason="is compiled as users do: add -m optimized"))


def pytest_collection_finish() -> None:
    """Has Python look for garbage less often, and not in what is imported: with JAX that takes a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Adds a line to the file CHARLSTM_TEST_TIMES: seconds of processors, those of programs it waited for, the test."""
    before = os.times()
    done = yield
    if path := os.environ.get("CHARLSTM_TEST_TIMES"):
        here, there = (sum(os.times()[of]) - sum(before[of]) for of in (slice(0, 2), slice(2, 4)))
        with open(path, "a") as file:
            file.write(f"{here + there:.2f} {there:.2f} {item.nodeid}\n")
    return done


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real texts beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "corpora"
    if not folder.is_dir():
        pytest.skip("the folder of real corpora is not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def job_flags(tmp_path_factory) -> tuple[str, ...]:
    """Of launch.train: 8 logical shards, and a text of 24 steps an epoch."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_text("".join(f"line {n * n} of a text\n" for n in range(330)))
    return (
        "--flagfile=configs/tiny.flags", f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}",
        "--logical_shards=8", "--evaluate_every=0", "--log_every=80", "--checkpoint_every=80", f"--num_steps={STEPS}",
    )  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(job_flags, tmp_path_factory) -> dict:
    """The last line of the metrics of a run of one process with eight devices."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    environment = os.environ | {"XLA_FLAGS": compiling.xla_flags(8)}
    command = [sys.executable, "-m", "launch.train", *job_flags, f"--run_dir={run_dir}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    return last_line(run_dir)
