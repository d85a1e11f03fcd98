"""A corpus that changes under a running or a resumed job, and two jobs in one run directory."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan
from launch.support import cli
from tests.faults.by_hand import processes, slow_reader, statuses, whole_steps
from tests.faults.conftest import Seen
from tests.jobs import ROOT, has_saved, job, last_line, wait_for

STREAMS, WINDOW, LAST = 16, 64, 400
READ = 2**14 // WINDOW  # steps of which the text is read in one go
SHARD, BLOCK = 4096, 1024


class Prepared(NamedTuple):
    """A corpus of many small shards, another one of the same size, and a run that nothing disturbed."""

    corpus: Path
    other: Path
    flags: tuple[str, ...]
    digest: str
    begun: Path  # the same run, of 100 steps; to be copied
    shards: tuple[str, str]  # read a good while later and not before, by the first and the second half of the streams

    @property
    def shard(self) -> str:
        return self.shards[0]

    def go_on(self, corpus: Path, run_dir: Path, **how) -> tuple[int, str]:
        """The status of the run that goes on with what is in `corpus`, and the last line of what it says."""
        flags = (*self.flags, f"--corpus={corpus}", f"--num_steps={LAST}", f"--run_dir={run_dir}")
        with processes(flags, run_dir.parent, 1, **how) as running:
            status = statuses(running)[0]
        return status, (run_dir.parent / "0.txt").read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    folder, random = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    for name in ("corpus", "other"):
        text = folder / f"{name}.txt"
        text.write_bytes(random.integers(97, 123, 600_000, np.uint8).tobytes())
        whole = CorpusSettings(corpus=str(text), valid_fraction=0, test_fraction=0, cache_dir=str(folder / "cache"))
        prepare(whole, folder / name, shard_bytes=SHARD, block_bytes=BLOCK)
    plan = StreamPlan(len(open_corpus(folder / "corpus").splits["train"]), STREAMS, WINDOW)
    numbers = [plan.positions(READ + READ // 2, range(STREAMS))[b] // SHARD for b in (0, STREAMS // 2)]
    shards = tuple(f"train-{number:05d}.ids" for number in numbers)
    flags = (f"--flagfile={ROOT}/configs/tiny.flags", f"--batch_size={STREAMS}", f"--window={WINDOW}")
    flags += (
        "--logical_shards=2",
        "--checkpoint_every=100",
        "--keep_checkpoints=9",
        "--evaluate_every=0",
        "--log_every=100",
    )
    runs = Prepared(folder / "corpus", folder / "other", flags, "", folder / "begun", shards)
    assert runs.go_on(runs.corpus, folder / "straight")[0] == cli.DONE
    begun = (*flags, f"--corpus={runs.corpus}", "--num_steps=100", f"--run_dir={runs.begun}")
    with processes(begun, folder, 1) as running:
        assert statuses(running) == [cli.DONE]
    return runs._replace(digest=last_line(folder / "straight")["state_digest"])


def changed(shard: Path, other: Path) -> None:
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    content[::BLOCK] ^= 1
    with open(shard, "r+b") as file:
        file.write(content.tobytes())


def truncated(shard: Path, other: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def vanished(shard: Path, other: Path) -> None:
    shard.unlink()


def replaced(shard: Path, other: Path) -> None:
    """By that of another text, with its checksums: as when a corpus is copied over another one."""
    for name in (shard.name, shard.with_suffix(".crc").name):
        shutil.copyfile(other / name, shard.parent / f"{name}.new")
        os.replace(shard.parent / f"{name}.new", shard.parent / name)


FAULTS = [changed, truncated, vanished, replaced]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_shard_that_goes_bad_under_a_running_job_stops_it_with_its_name_and_costs_no_bit(
    fault: Callable[[Path, Path], None], prepared, table, tmp_path
):
    run_dir = shutil.copytree(prepared.begun, tmp_path / "run")
    corpus = shutil.copytree(prepared.corpus, tmp_path / "corpus")
    slowly = {0: slow_reader(tmp_path / "slowly", 0.01)}
    flags = (*prepared.flags, f"--corpus={corpus}", f"--num_steps={LAST}", f"--run_dir={run_dir}")
    with processes((*flags, "--checkpoint_every=20"), tmp_path, 1, python_path=slowly) as running:
        wait_for(has_saved(run_dir, 120))
        fault(corpus / prepared.shard, prepared.other)
        status, said = statuses(running)[0], (tmp_path / "0.txt").read_text().splitlines()
    assert status == cli.MISTAKE and said[-1].startswith(f"launch.train: {corpus / prepared.shard} "), said
    kept = whole_steps(run_dir)
    assert 120 <= kept[-1] < READ + READ // 2
    status, last = prepared.go_on(prepared.corpus, run_dir)
    assert status == cli.DONE, last
    equal = last_line(run_dir)["state_digest"] == prepared.digest
    table.append(Seen(f"a shard {fault.__name__} under a running job", 1, f"since step {kept[-1]}", str(equal)))
    assert equal


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_shard_that_went_bad_before_a_job_is_resumed_stops_it_with_its_name(fault, prepared, table, tmp_path):
    run_dir = shutil.copytree(prepared.begun, tmp_path / "run")
    corpus = shutil.copytree(prepared.corpus, tmp_path / "corpus")
    fault(corpus / prepared.shard, prepared.other)
    status, last = prepared.go_on(corpus, run_dir)
    assert status == cli.MISTAKE and last.startswith(f"launch.train: {corpus / prepared.shard} "), last
    table.append(Seen(f"a shard {fault.__name__} before a job is resumed", 1, "", "refused, status 2"))


def test_a_shard_that_goes_bad_for_one_process_stops_the_job_with_its_name_and_it_is_not_started_again(
    prepared, table, tmp_path
):
    run_dir = shutil.copytree(prepared.begun, tmp_path / "run")
    corpus = shutil.copytree(prepared.corpus, tmp_path / "corpus")
    flags = (*prepared.flags, f"--corpus={corpus}", f"--num_steps={LAST}", f"--run_dir={run_dir}")
    own = ("--processes=2", "--devices_per_process=1", "--restarts=3", "--grace=5")
    changed(corpus / prepared.shards[1], prepared.other)
    with job(own, *flags) as running:
        _, said = running.communicate(timeout=300)
    assert running.returncode == cli.MISTAKE and "starting again" not in said, said
    assert f"[1] launch.train: {corpus / prepared.shards[1]} is damaged: " in said
    status, last = prepared.go_on(prepared.corpus, run_dir)
    equal = last_line(run_dir)["state_digest"] == prepared.digest
    table.append(Seen("a shard changed for one of 2 processes", 1, "", str(equal)))
    assert status == cli.DONE and equal, last


def test_a_job_is_not_resumed_on_another_text_in_the_place_of_its_own(prepared, table, tmp_path):
    run_dir = shutil.copytree(prepared.begun, tmp_path / "run")
    status, last = prepared.go_on(prepared.other, run_dir)
    assert status == cli.MISTAKE and "was trained on the corpus with fingerprint" in last
    assert whole_steps(run_dir) == [100]
    table.append(Seen("another corpus when a job is resumed", 1, "", "refused, status 2"))


def test_a_second_job_in_a_run_directory_is_refused_and_takes_it_over_from_a_killed_one(prepared, table, tmp_path):
    run_dir = shutil.copytree(prepared.begun, tmp_path / "run")
    (tmp_path / "first").mkdir()
    flags = (*prepared.flags, f"--corpus={prepared.corpus}", f"--num_steps={LAST}", f"--run_dir={run_dir}")
    slowly = {0: slow_reader(tmp_path / "slowly", 0.1)}
    with processes((*flags, "--checkpoint_every=5"), tmp_path / "first", 1, python_path=slowly) as running:
        wait_for(has_saved(run_dir, 105))
        status, last = prepared.go_on(prepared.corpus, run_dir)
        assert status == cli.MISTAKE and f"is in use by process {running[0].pid} on " in last
        assert running[0].poll() is None
        running[0].send_signal(signal.SIGKILL)
        running[0].wait()
    status, last = prepared.go_on(prepared.corpus, run_dir)
    assert status == cli.DONE, last
    equal = last_line(run_dir)["state_digest"] == prepared.digest
    table.append(Seen("a second job in a run directory, then kill -9 of the first", 1, "", str(equal)))
    assert equal
