"""Who may train in a run directory, and how long a lock that another machine holds is waited for."""

import fcntl
import os
import platform
from pathlib import Path

import pytest

from charlstm.run.run_lock import LOCK, lock_run_directory
from data_pipeline.atomic_files import InUse
from launch import local
from launch.support import cli


def held_by(run_dir: Path, machine: str) -> int:
    """A descriptor that holds the lock, as of a process of that machine."""
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT)
    os.write(descriptor, f"process 7 on {machine}\n".encode())
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_lock_of_another_machine_is_waited_for_and_had_when_it_is_given_up(tmp_path):
    descriptor, said = held_by(tmp_path, "n1"), list[str]()

    def release(line: str) -> None:
        said.append(line)
        os.close(descriptor)

    with lock_run_directory(tmp_path, release, patience=30):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {platform.node()}\n"
    assert len(said) == 1 and "is in use by process 7 on n1: wait" in said[0] and "waits 30 s" in said[0]


def test_one_that_it_keeps_ends_the_program_with_a_status_that_is_requeued_and_no_restart_here(tmp_path, capsys):
    descriptor, said = held_by(tmp_path, "n1"), list[str]()
    with pytest.raises(InUse) as refused, lock_run_directory(tmp_path, said.append, patience=0.01):
        pass
    os.close(descriptor)
    assert len(said) == 1
    assert cli.explain("launch.train", refused.value) == cli.IN_USE == 73
    assert "is in use by process 7 on n1" in capsys.readouterr().err
    policy = local.RestartPolicy(tmp_path, limit=9, pause=0)
    assert not policy.decide([cli.IN_USE] * 2, told_to_stop=False)[0]  # which would set checkpoints aside
    assert local.job_status([cli.IN_USE] * 2) == cli.IN_USE


def test_one_of_this_machine_whose_process_lives_is_refused_at_once(tmp_path):
    descriptor, said = held_by(tmp_path, platform.node()), list[str]()
    with (
        pytest.raises(ValueError, match="is in use by process 7 on") as refused,
        lock_run_directory(tmp_path, said.append),
    ):
        pass
    os.close(descriptor)
    assert not isinstance(refused.value, InUse) and said == []
