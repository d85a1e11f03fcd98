"""Disks that are full, read-only or forbidden while a run saves: it goes on, says so, and saves again when it can."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.faults.by_hand import (
    fill,
    held_to_permissions,
    mount,
    needs_mounts,
    own_disk,
    processes,
    seeing,
    slow_reader,
    statuses,
    whole_steps,
    works,
)
from tests.faults.conftest import Seen
from tests.jobs import has_saved, last_line, wait_for

CADENCE = ("--checkpoint_every=10", "--log_every=5")


@pytest.fixture
def run_dir(half_done, tmp_path) -> Path:
    return shutil.copytree(half_done, tmp_path / "run")


def failures(run_dir: Path) -> list[str]:
    return re.findall(r"checkpoint \d+ was not saved \(failure \d+ in a row\): .*", (run_dir / "log.txt").read_text())


@contextlib.contextmanager
def training(run_dir: Path, flags: tuple[str, ...], count: int, **how) -> Iterator[list[subprocess.Popen]]:
    """The run goes on, slowly, and has saved when the block begins; at its end it is done."""
    slowly = slow_reader(run_dir.with_name("slowly"), 0.05)
    python_path = dict.fromkeys(range(count), slowly)
    flags = (*flags, *CADENCE, f"--run_dir={run_dir}")
    with processes(flags, run_dir.parent, count, python_path=python_path, **how) as running:
        wait_for(has_saved(run_dir, 170))
        yield running
        ended = statuses(running)
        assert ended == [cli.DONE] * count, (run_dir.parent / "0.txt").read_text()


def fails_until_mended(
    run_dir: Path, running: list[subprocess.Popen], break_it: Callable[[], object], mend: Callable[[], object]
) -> None:
    """Two saves fail, which harms none of those before; then it is mended, and the next one is made."""

    def ended() -> bool:
        return any(process.poll() is not None for process in running)

    break_it()
    try:
        wait_for(lambda: len(failures(run_dir)) >= 2 or ended())
        kept = whole_steps(run_dir)
        assert kept[-1] >= 170
    finally:
        mend()
    wait_for(lambda: max(StepDirectory(run_dir / "checkpoints").steps()) > kept[-1] or ended())


def check(run_dir: Path, undisturbed: dict, table: list[Seen], fault: str) -> None:
    """What was said, and the bits at the end."""
    log = (run_dir / "log.txt").read_text().splitlines()
    failed = [number for number, line in enumerate(log) if " was not saved (failure " in line]
    steps = [number for number, line in enumerate(log) if re.search(r" step \d+/240 ", line)]
    told = [number for number in steps if "NOT SAVED" in log[number]]
    assert failed[0] < told[0] and set(told) >= {number for number in steps if failed[1] < number < failed[-1]}
    assert "NOT SAVED" not in log[steps[-1]]
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    table.append(Seen(fault, len(failed), "0", str(equal)))
    assert equal and whole_steps(run_dir)[-1] == 240
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == set(map(str, whole_steps(run_dir)))


@needs_mounts
def test_a_disk_that_is_full_costs_no_checkpoint_that_was_made_and_no_bit(run_dir, job_flags, undisturbed, table):
    checkpoints = run_dir / "checkpoints"
    with own_disk(checkpoints, "6m"):
        with training(run_dir, job_flags, 2) as running:
            fails_until_mended(run_dir, running, lambda: fill(checkpoints), (checkpoints / "ballast").unlink)
        check(run_dir, undisturbed, table, "disk full during saves of 2 processes")


@needs_mounts
def test_a_disk_that_becomes_read_only_costs_no_checkpoint_that_was_made_and_no_bit(
    run_dir, job_flags, undisturbed, table
):
    checkpoints = run_dir / "checkpoints"
    with own_disk(checkpoints, "6m"):
        with training(run_dir, job_flags, 1) as running:
            remount = [lambda how=how: mount("-o", f"remount,{how}", checkpoints) for how in ("ro", "rw")]
            fails_until_mended(run_dir, running, *remount)
        check(run_dir, undisturbed, table, "disk read-only during saves")


@needs_mounts
def test_a_disk_that_fails_for_one_process_only_fails_for_all_alike_and_costs_no_bit(
    run_dir, job_flags, undisturbed, table
):
    checkpoints = run_dir / "checkpoints"
    inside = {1: seeing(f"mount --bind {checkpoints} {checkpoints}")}
    with training(run_dir, job_flags, 2, inside=inside) as running:

        def remount(how: str) -> None:
            enter = ["nsenter", "--mount", f"--target={running[1].pid}"]
            subprocess.run([*enter, "mount", "-o", f"remount,bind,{how}", str(checkpoints)], check=True)

        fails_until_mended(run_dir, running, lambda: remount("ro"), lambda: remount("rw"))
        assert all(": OSError: process 1: [Errno 30] Read-only file system" in line for line in failures(run_dir))
    check(run_dir, undisturbed, table, "disk read-only for one of 2 processes")


@pytest.mark.skipif(not works(held_to_permissions()), reason="root cannot be held to permissions here")
@pytest.mark.parametrize("left", [0o500, 0], ids=["to read", "none"])
def test_a_permission_that_is_lost_costs_no_checkpoint_that_was_made_and_no_bit(
    left, run_dir, job_flags, undisturbed, table
):
    checkpoints = run_dir / "checkpoints"
    with training(run_dir, job_flags, 1, inside={0: held_to_permissions()}) as running:
        chmod = [lambda mode=mode: os.chmod(checkpoints, mode) for mode in (left, 0o700)]
        fails_until_mended(run_dir, running, *chmod)
        assert all("Permission denied" in line for line in failures(run_dir))
    rest = "permission to write" if left else "every permission"
    check(run_dir, undisturbed, table, f"{rest} lost during saves")
