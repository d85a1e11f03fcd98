"""The Slurm recipe of a preparation, submitted as it is to a real Slurm of two nodes on this machine."""

import sys
from pathlib import Path

import pytest

from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.manifest import read_manifest
from data_pipeline.settings import CorpusSettings
from launch.support import cli
from tests.conftest import ROOT
from tests.slurm.conftest import Cluster, wait_for

pytestmark = pytest.mark.faults

RECIPE = ROOT / "launch" / "slurm" / "prepare.sbatch"


def submit(cluster: Cluster, log: Path, *flags: str, array: str = "0-2", **environment: str) -> str:
    own = {"PYTHON": sys.executable} | environment
    command = ("sbatch", "--parsable", f"--output={log}", "--open-mode=append", f"--array={array}", str(RECIPE))
    return cluster.run(*command, *flags, **own).strip()


def ended(cluster: Cluster, job: str) -> set[str]:
    """States of the tasks of an array, once none waits or runs."""
    rows = cluster.run("squeue", "--noheader", "--array", "--states=all", "--format=%T", f"--jobs={job}").split()
    return set() if {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"} & set(rows) else set(rows)


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_an_array_gives_the_fingerprint_of_this_machine(cluster, tmp_path, vocabulary):
    (tmp_path / "text.txt").write_text("".join(f"line {n * n} of a text, é\n" for n in range(900)))
    how = CorpusSettings(corpus=str(tmp_path / "text.txt"), vocabulary=vocabulary, cache_dir=str(tmp_path / "cache"))
    prepare_by_parts(how, tmp_path / "local", sizes=Sizes(4096), workers=1)
    flags = (f"--input={how.corpus}", f"--vocabulary={vocabulary}", f"--cache_dir={how.cache_dir}")
    log = tmp_path / "log.txt"
    job = submit(cluster, log, *flags, f"--output={tmp_path / 'array'}", "--part_bytes=4096")
    wait_for(lambda: ended(cluster, job), log)
    said = log.read_text()
    assert ended(cluster, job) == {"COMPLETED"}, said
    assert read_manifest(tmp_path / "array") == read_manifest(tmp_path / "local"), said
    assert not list(tmp_path.glob(".array*")), said


def test_a_mistake_ends_the_tasks_and_a_death_is_requeued(cluster, tmp_path):
    log = tmp_path / "log.txt"
    job = submit(cluster, log, "--input=/nothing", f"--output={tmp_path / 'out'}", array="0")
    wait_for(lambda: ended(cluster, job), log)
    assert ended(cluster, job) == {"FAILED"} and "/nothing does not exist" in log.read_text()
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nexit $STATUS\n")
    stand_in.chmod(0o755)
    job = submit(cluster, log, array="0", PYTHON=str(stand_in), STATUS=str(cli.UNREACHABLE), MAX_RESTARTS="1")
    wait_for(lambda: ended(cluster, job), log)
    said = log.read_text()
    assert f"status {cli.UNREACHABLE}: requeued, as 0 times before" in said
    assert f"status {cli.UNREACHABLE} after 1 requeues: not requeued again" in said
