"""Checkpoints that are not whole for one process only: no process goes by what it alone has found."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from charlstm.run import sealing
from launch.support import cli
from tests.compiling import xla_flags
from tests.faults import restorers
from tests.faults.by_hand import free_port, needs_mounts, processes, seeing, statuses, whole_steps
from tests.faults.conftest import Seen
from tests.faults.restorers import flip
from tests.jobs import ROOT, last_line

FLIPS = 1000


@pytest.fixture(scope="module")
def restored(tmp_path_factory) -> list[tuple[dict, dict]]:
    """Of each case of `restorers`, what the one process and the other say."""
    folder = tmp_path_factory.mktemp("restored")
    restorers.save(folder / "0")
    shutil.copytree(folder / "0", folder / "1")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    coordinator = f"localhost:{free_port()}"
    outputs = [folder / "0.said", folder / "1.said"]
    running = []
    try:
        for process, output in enumerate(outputs):
            command = [sys.executable, "-m", "tests.faults.restorers", coordinator, str(process)]
            command += [str(folder / str(process)), str(FLIPS)]
            with open(output, "w") as out:
                running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
        ended = statuses(running, 900)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert ended == [0, 0], [output.read_text()[-2000:] for output in outputs]
    lines = [
        [json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")] for output in outputs
    ]
    return list(zip(*lines, strict=True))


def of(restored: list[tuple[dict, dict]], start: str) -> list[tuple[dict, dict]]:
    found = [pair for pair in restored if pair[0]["case"].startswith(start)]
    assert found, start
    return found


def agree(one: dict, other: dict) -> None:
    """Both took the step that the case asks for, bit for bit, or both refused; and they say the same of each step."""
    assert one["case"] == other["case"]
    assert one["step"] == other["step"], (one, other)
    for found in (one, other):
        expected = found["expected"]
        assert found["step"] in (expected if isinstance(expected, list) else [expected]), found
        assert found["refusal"] if found["step"] is None else found["holds"], found
    assert [line.partition(" in ")[0] for line in one["said"]] == [line.partition(" in ")[0] for line in other["said"]]


def test_of_a_thousand_flipped_bits_in_the_files_of_one_process_none_is_used_by_any(restored, table):
    found = of(restored, "flipped bits")
    noticed = 0
    for pair in found:
        agree(*pair)
        for said in (each["said"] for each in pair):
            assert [int(line.split()[1]) for line in said[:-1]] == sorted(restorers.FLIPPED, reverse=True)
            assert all(" is damaged: " in line for line in said[:-1])
            assert said[-1] == "checkpoint 1 is the newest whole one and is used instead"
        noticed += len(restorers.FLIPPED)
    assert noticed == FLIPS
    table.append(Seen("a bit flipped for one of 2 processes", FLIPS, "the damaged checkpoint", "True, on both"))


def test_each_file_shortened_emptied_or_deleted_for_one_process_makes_all_take_the_same_older_step(restored, table):
    pairs = of(restored, "a file shortened") + of(restored, "a file emptied") + of(restored, "a file deleted")
    for pair in pairs:
        agree(*pair)
        assert all(found["step"] == 2 and "checkpoint 3 in " in found["said"][0] for found in pair)
    unseen = of(restored, "verified by the other, a file ")
    for pair in unseen:
        agree(*pair)
    assert {pair[0]["step"] for pair in unseen} == {2, 3}
    fault = "a file shortened, emptied or deleted for one of 2 processes"
    table.append(Seen(fault, len(pairs), "the damaged checkpoint", "True, on both"))


@pytest.mark.parametrize("case", [name for name, *_ in restorers.ONE_SIDED])
def test_what_one_process_finds_decides_for_all(case, restored, table):
    pairs = [*of(restored, f"{case} on process 0"), *of(restored, f"{case} on process 1")]
    for pair in pairs:
        agree(*pair)
    took = pairs[0][0]["step"]
    outcome = "both refuse" if took is None else f"both take step {took} of 3"
    table.append(Seen(f"{case}, for one of 2 processes", len(pairs), "", outcome))


def test_where_each_process_finds_another_step_damaged_all_take_one_that_is_whole_for_both(restored):
    agree(*of(restored, "another step on each")[0])
    for found in of(restored, "all steps, each on one of both")[0]:
        assert "is whole (there are 1, 2, 3): remove it to start anew" in found["refusal"]


def test_what_both_see_alike_is_judged_as_by_one_process(restored):
    for case in ("a directory of an older step's name on both", "an empty directory on both"):
        agree(*of(restored, case)[0])
        assert all("checkpoint 4 in " in found["said"][0] for found in of(restored, case)[0])
    for found in of(restored, "a newer format on both")[0]:
        assert "has format 99 and this version reads 4 and 5" in found["refusal"] and found["said"] == []


def test_what_proves_nothing_of_a_checkpoint_is_never_called_damage(restored):
    for case in ("a file that cannot be read", "an error in reading the arrays"):
        for found in (found for pair in of(restored, case) for found in pair):
            assert found["said"] == [], found


def damaged_copies(run_dir: Path, folder: Path, *steps: int) -> list[str]:
    """A command inside of which process 1 of 2 sees `steps` of a run with a bit flipped in a file that it verifies."""
    mounts = []
    for step in steps:
        place = run_dir / "checkpoints" / str(step)
        copy = shutil.copytree(place, folder / str(step))
        files = sealing._read(copy)[1]
        flip(Path(sealing.shared({name: file["size"] for name, file in files.items()}, 1, 2)[-1]), 5)(copy)
        mounts.append(f"mount --bind {copy} {place}")
    return seeing(*mounts)


@needs_mounts
def test_a_job_of_which_one_process_sees_its_newest_checkpoint_damaged_goes_on_from_the_one_before(
    half_done, job_flags, undisturbed, table, tmp_path
):
    run_dir = shutil.copytree(half_done, tmp_path / "run")
    inside = {1: damaged_copies(run_dir, tmp_path / "other", 160)}
    with processes([*job_flags, f"--run_dir={run_dir}"], tmp_path, inside=inside) as running:
        ended = statuses(running)
    said = (tmp_path / "0.txt").read_text()
    assert ended == [cli.DONE] * 2, said
    assert re.search(r"^checkpoint 160 in \S+ is damaged: process 1: \S+ was changed", said, re.M)
    assert "checkpoint 80 is the newest whole one and is used instead" in said
    assert re.search(r"^checkpoint 160 was set aside as 160\.corrupt-", said, re.M)
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    table.append(Seen("the newest checkpoint damaged for one of 2 processes of a job", 1, "80", str(equal)))
    assert equal and whole_steps(run_dir) == [80, 160, 240]


@needs_mounts
def test_a_job_of_which_one_process_sees_no_whole_checkpoint_is_refused_by_every_process_and_nothing_is_moved(
    half_done, job_flags, table, tmp_path
):
    run_dir = shutil.copytree(half_done, tmp_path / "run")
    inside = {1: damaged_copies(run_dir, tmp_path / "other", 80, 160)}
    refused_by_all(run_dir, job_flags, tmp_path, inside, "is whole (there are 80, 160): remove it to start anew")
    assert whole_steps(run_dir) == [80, 160]
    table.append(Seen("all checkpoints damaged for one of 2 processes of a job", 1, "", "both refuse, status 2"))


@needs_mounts
@pytest.mark.parametrize("missing", ["checkpoints", ""], ids=["checkpoints", "run"])
@pytest.mark.parametrize("blind", [0, 1])
def test_a_job_of_which_one_process_sees_no_checkpoint_or_no_run_is_refused_by_every_process(
    blind, missing, half_done, job_flags, table, tmp_path
):
    run_dir, empty = shutil.copytree(half_done, tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    inside = {blind: seeing(f"mount --bind {empty} {run_dir / missing}")}
    why = "there is no checkpoint in " if missing else "is not a run: it has no config.json"
    refused_by_all(run_dir, job_flags, tmp_path, inside, why)
    assert whole_steps(run_dir) == [80, 160]
    fault = f"no {missing or 'run'} seen by process {blind} of 2 of a job"
    table.append(Seen(fault, 1, "", "both refuse, status 2"))


@needs_mounts
def test_a_new_job_whose_processes_do_not_share_the_run_directory_is_refused_by_every_process(
    job_flags, table, tmp_path
):
    run_dir, empty = tmp_path / "run", tmp_path / "empty"
    run_dir.mkdir()
    empty.mkdir()
    inside = {1: seeing(f"mount --bind {empty} {run_dir}")}
    refused_by_all(run_dir, job_flags, tmp_path, inside, "on a file system that all processes share")
    table.append(Seen("a run directory that 2 processes do not share", 1, "", "both refuse, status 2"))


def refused_by_all(run_dir: Path, flags: tuple[str, ...], said: Path, inside: dict[int, list[str]], why: str) -> None:
    """Every process ends with status 2 and one sentence."""
    with processes([*flags, f"--run_dir={run_dir}"], said, inside=inside) as running:
        ended = statuses(running)
    for process in (0, 1):
        lines = (said / f"{process}.txt").read_text().splitlines()
        refusals = [line for line in lines if line.startswith("launch.train: ")]
        assert ended[process] == cli.MISTAKE, lines
        assert len(refusals) == 1 and why in refusals[0], lines
        assert not any("Traceback" in line for line in lines)
