"""TensorBoard's own reader, on the event files of a run that was killed ten times."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from charlstm.config import flatten
from charlstm.run import run_directory
from tests.compiling import xla_flags
from tests.interop.conftest import needs, run
from tests.jobs import ROOT, wait_for
from tests.launch.conftest import SMALL, TINY

pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")
pytestmark = pytest.mark.interop

# Prints the points of every tag, [step, value, time], and the settings: as TensorBoard shows them, and then without its
# own clearing up, which drops what was written before a start.
READER = """
import json, sys
from google.protobuf import json_format
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import metadata

def read(**how):
    found = event_accumulator.EventAccumulator(sys.argv[1], event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE, **how)
    found.Reload()
    tags = found.Tags()
    settings = found.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
    settings = metadata.parse_session_start_info_plugin_data(settings)
    return {
        "scalars": {tag: [[e.step, e.value, e.wall_time] for e in found.Scalars(tag)] for tag in tags["scalars"]},
        "texts": {
            tag: [[e.step, e.tensor_proto.string_val[0].decode(), e.wall_time] for e in found.Tensors(tag)]
            for tag in found.PluginTagToContent("text")
        },
        "settings": json_format.MessageToDict(settings)["hparams"],
    }

print(json.dumps([read(), read(purge_orphaned_data=False)]))
"""

STEPS = 2000
FLAGS = (
    *SMALL, f"--num_steps={STEPS}", "--tensorboard", "--log_every=3", "--checkpoint_every=50", "--evaluate_every=50",
    "--sample_every=250", "--sample_length=8",
)  # fmt: skip
# When it is killed: when it has made the event file anew, or so many steps after the last that any start has come to.
KILLS = (None, 1, 40, None, 17, 60, 2, None, 33, 5)


def lines(path: Path) -> list[dict]:
    """The lines that are whole."""
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def reached(run_dir: Path) -> int:
    return max((line["step"] for line in lines(run_dir / "metrics.jsonl")[-1:]), default=0)


def event_files(run_dir: Path) -> set[Path]:
    return set((run_dir / "tensorboard").glob("*"))


def start_and_kill(command: list[str], how: dict, run_dir: Path, steps: int | None) -> None:
    files, goal = event_files(run_dir), reached(run_dir) + (steps or 0)
    with subprocess.Popen(command, **how) as running:
        try:
            wait_for(lambda: reached(run_dir) >= goal if steps else event_files(run_dir) - files)
        finally:
            running.kill()
    assert running.returncode == -signal.SIGKILL  # and has not ended before


@pytest.fixture(scope="module")
def killed(other_python, tmp_path_factory) -> Path:
    """The directory of a run that was killed ten times, and has ended."""
    needs(other_python, "tensorboard")
    folder = tmp_path_factory.mktemp("killed")
    run_dir = folder / "run"
    (folder / "text.txt").write_text("".join(f"line {n * n} of a text\n" for n in range(400)))
    where = (f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}", f"--run_dir={run_dir}")
    command = [sys.executable, "-m", "launch.train", TINY, *FLAGS, *where]
    how = {"cwd": ROOT, "env": os.environ | {"XLA_FLAGS": xla_flags(1)}, "stderr": subprocess.DEVNULL}
    for steps in KILLS:
        start_and_kill(command, how, run_dir, steps)
    subprocess.run(command, **how, check=True, timeout=300)
    assert (run_dir / "log.txt").read_text().count("continuing from the checkpoint of step ") >= len(KILLS) // 2
    return run_dir


@pytest.fixture(scope="module")
def shown(killed, other_python) -> dict:
    """What TensorBoard finds, which is all that the files have."""
    found, written = json.loads(run(other_python, "-c", READER, str(killed / "tensorboard"), cwd=killed))
    assert found == written
    return found


def test_tensorboard_has_each_step_of_a_run_that_was_killed_ten_times_once_with_its_values(killed, shown):
    expected: dict[str, list] = {}
    for line in lines(killed / "metrics.jsonl"):
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                point = [line["step"], pytest.approx(value, rel=1e-6), line["time"]]
                expected.setdefault(f"{line['split']}/{name}", []).append(point)
    assert shown["scalars"] == expected
    steps_of = {tag: [step for step, *_ in points] for tag, points in shown["scalars"].items()}
    assert steps_of["train/bits_per_byte"] == [*range(3, STEPS, 3), STEPS]
    assert steps_of["valid/bits_per_byte"] == [*range(50, STEPS + 1, 50)]
    assert all(steps == sorted(set(steps)) for steps in steps_of.values())


def test_tensorboard_has_each_sample_once_as_it_was_written(killed, shown):
    samples = lines(killed / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [*range(250, STEPS + 1, 250)]
    texts = ["\n".join(f"    {line}" for line in (s["prompt"] + s["text"]).split("\n")) for s in samples]
    points = [[s["step"], text, s["time"]] for s, text in zip(samples, texts, strict=True)]
    assert shown["texts"] == {"sample/text_summary": points}


def test_tensorboard_has_the_settings_of_the_run(killed, shown):
    config, _ = run_directory.read(killed)
    assert shown["settings"]["hidden_size"] == config.model.hidden_size == 8
    settings = {name: getattr(getattr(config, at), name) for name, (at, _) in flatten(config).items()}
    assert shown["settings"] == settings
