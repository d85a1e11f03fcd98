"""One job to its end, disturbed at random and made of other processes and devices at every start; the same bits.

    python -m tests.faults.chaos --seed=0 --seeds=100

For each seed a job is started on a number of processes and devices that is drawn, disturbed after a time that is drawn
(killed, pre-empted, halted, bits of its newest checkpoint flipped), and started again by the same command on another
number, until it ends by itself.  Its last state has to have the sha256 of the run that nothing disturbed.  Prints a
line a seed, and exits with 1 where a seed differs.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.compiling import xla_flags
from tests.faults import disturbances
from tests.jobs import ROOT, last_line

DISTURBANCES = (
    disturbances.kill_one,
    disturbances.kill_in_a_save,
    disturbances.preempt_one,
    disturbances.halt_one_for_a_while,
    disturbances.flip_a_bit_and_kill,
)
SHAPES = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2))  # processes, devices of each
LATEST = 1.5  # seconds after its first update at which a job is disturbed


class Ended(NamedTuple):
    """How a seed went."""

    digest: str
    starts: list[str]
    disturbed: list[str]


def flags(folder: Path, num_steps: int) -> tuple[str, ...]:
    """Of launch.train: a text of 24 steps an epoch, made in `folder`, and 8 logical shards."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {n * n} of a text\n" for n in range(330)))
    return (
        "--flagfile=configs/tiny.flags", f"--corpus={text}", f"--cache_dir={folder / 'cache'}", "--logical_shards=8",
        "--evaluate_every=0", "--log_every=5", "--checkpoint_every=20", f"--num_steps={num_steps}",
        "--heartbeat_timeout=10",
    )  # fmt: skip


def undisturbed(folder: Path, of_the_run: tuple[str, ...]) -> str:
    """The sha256 of the last state of a run of one process with eight devices."""
    run_dir = folder / "undisturbed"
    environment = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.train", *of_the_run, f"--run_dir={run_dir}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return last_line(run_dir)["state_digest"]


def disturbed(run_dir: Path, of_the_run: tuple[str, ...], seed: int, most_starts: int = 30) -> Ended:
    """Runs the job under the disturbances of `seed` to its end."""
    random = np.random.default_rng(seed)
    starts, done = [], []
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
    while len(starts) < most_starts:
        processes, devices = SHAPES[random.integers(len(SHAPES))]
        starts.append(f"{processes}x{devices}")
        own = [f"--processes={processes}", f"--devices_per_process={devices}", "--grace=5"]
        command = [sys.executable, "-m", "launch.local", *own, "--", *of_the_run, f"--run_dir={run_dir}"]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as job:
            assert job.stderr is not None
            said = []
            for line in job.stderr:  # until its first update, or its end
                said.append(line)
                if line.startswith("[0] step "):
                    break
            time.sleep(random.uniform(0.0, LATEST))
            what = DISTURBANCES[random.integers(len(DISTURBANCES))]
            if job.poll() is None:
                with contextlib.suppress(OSError):
                    done.append(what(job.pid, random, run_dir))
            said += job.stderr
        if job.returncode == cli.DONE:
            return Ended(last_line(run_dir)["state_digest"], starts, done)
        assert job.returncode in (cli.STOPPED, cli.LOST, cli.HANGS, 128 + 15), "".join(said)
    raise AssertionError(f"seed {seed} has not ended after {most_starts} starts, at {_newest(run_dir)}")


def _newest(run_dir: Path) -> int:
    return max(StepDirectory(run_dir / "checkpoints").steps(), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--num_steps", type=int, default=400)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder, equal, starts = Path(name), 0, 0
        of_the_run = flags(folder, chosen.num_steps)
        expected = undisturbed(folder, of_the_run)
        for seed in range(chosen.seed, chosen.seed + chosen.seeds):
            ended = disturbed(folder / f"seed-{seed}", of_the_run, seed)
            same = ended.digest == expected
            equal, starts = equal + same, starts + len(ended.starts)
            print(f"seed {seed}: {'equal' if same else 'NOT EQUAL'}; {' '.join(ended.starts)}; {len(ended.disturbed)} disturbances", flush=True)  # fmt: skip # noqa: E501
        print(f"{equal} of {chosen.seeds} equal, {starts} starts, sha256 {expected}")
    return 0 if equal == chosen.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
