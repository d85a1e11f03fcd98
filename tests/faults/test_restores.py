"""Checkpoints that are not whole for one process only: no process goes by what it alone has found."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.faults import restorers
from tests.faults.conftest import Seen
from tests.jobs import ROOT

FLIPS = 1000


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        return asked.getsockname()[1]


@pytest.fixture(scope="module")
def restored(tmp_path_factory) -> list[tuple[dict, dict]]:
    """Of each case of `restorers`, what the one process and the other say."""
    folder = tmp_path_factory.mktemp("restored")
    restorers.save(folder / "0" / "few", restorers.STEPS)
    restorers.save(folder / "0" / "many", range(1, restorers.FLIPPED.stop))
    shutil.copytree(folder / "0", folder / "1")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    coordinator = f"localhost:{free_port()}"
    outputs = [folder / "0.said", folder / "1.said"]
    processes = []
    try:
        for process, output in enumerate(outputs):
            command = [sys.executable, "-m", "tests.faults.restorers", coordinator, str(process)]
            command += [str(folder / str(process)), str(FLIPS)]
            with open(output, "w") as out:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
        statuses = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0, 0], [output.read_text()[-2000:] for output in outputs]
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
    for found in (one, other):
        assert found["step"] == found["expected"], found
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
        assert "has format 99 and this version reads 1" in found["refusal"] and found["said"] == []


def test_what_proves_nothing_of_a_checkpoint_is_never_called_damage(restored):
    for case in ("a file that cannot be read", "an error in reading the arrays"):
        for found in (found for pair in of(restored, case) for found in pair):
            assert found["said"] == [], found
