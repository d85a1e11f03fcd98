"""Whatever happens to the files, the disk or the process: no wrong bit, no lost commit, no stopped run."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from charlstm.run import replicas, sealing
from charlstm.run.checkpoint import Checkpoints
from charlstm.types import TrainState
from tests.conftest import ROOT
from tests.run.test_checkpoint import (
    IDENTITY,
    abstract_state,
    bits,
    host_state,
    make_state,
    names,
    rewrite_seal,
    save_all,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints 1 and 2, to be copied, not changed."""
    directory = tmp_path_factory.mktemp("saved")
    save_all(directory, 1, 2)
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def restored_by_a_reader(directory: Path, step: int | None = None) -> tuple[int, list[str]]:
    """The step that was restored, bit for bit, and what was said."""
    said: list[str] = []
    with Checkpoints(directory, writable=False, log=said.append) as checkpoints:
        state, meta = checkpoints.restore(abstract_state(), step=step)
    assert bits(state) == bits(host_state(meta["step"]))
    return meta["step"], said


def test_a_flipped_bit_in_any_file_is_never_used(directory):
    rng = random.Random(0)
    candidates = files(directory / "2")
    for trial in range(max(40, len(candidates))):
        path = candidates[trial % len(candidates)]
        whole, bit = path.read_bytes(), rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(sealing.Damaged):
            sealing.verify(directory / "2")
        if trial % 8 == 0:  # what a reader makes of that takes long
            step, said = restored_by_a_reader(directory)
            assert step == 1 and "checkpoint 2" in said[0] and "is damaged" in said[0], (path, bit, said)
        path.write_bytes(whole)
    assert restored_by_a_reader(directory) == (2, [])


def test_each_file_shortened_emptied_lengthened_or_deleted_is_noticed(directory):
    for number, path in enumerate(files(directory / "2")):
        whole, name = path.read_bytes(), path.relative_to(directory / "2").as_posix()
        sentence = f"{name} has {{}} bytes, {len(whole)} were written"
        for content in (whole[:-1], b"", whole + b" "):
            path.write_bytes(content)
            expected = sealing.SEAL if path.name == sealing.SEAL else sentence.format(len(content))
            with pytest.raises(sealing.Damaged, match=re.escape(expected)):
                sealing.verify(directory / "2")
        path.unlink()
        with pytest.raises(sealing.Damaged, match=re.escape(name)):
            sealing.verify(directory / "2")
        if number % 5 == 0:
            step, said = restored_by_a_reader(directory)
            assert step == 1 and name in said[0], (path, said)
        path.write_bytes(whole)
    assert restored_by_a_reader(directory) == (2, [])


def test_an_array_that_was_wrong_before_its_file_was_sealed_is_refused(directory):
    rewrite_seal(directory / "2", lambda meta: meta["arrays"]["params.cells.1.w_x"].update(digest="0123456789abcdef"))
    step, said = restored_by_a_reader(directory)
    assert step == 1 and "params.cells.1.w_x has digest" in said[0]


def test_flips_that_pass_the_file_check_are_caught_by_the_arrays_digests(directory):
    with Checkpoints(directory, log=print) as checkpoints:
        checkpoints.save(make_state(2, devices=1), IDENTITY, None)  # from one device an array is one piece of a file
    values = np.asarray(host_state(2).params.cells[0].w_h).tobytes()
    holding = [path for path in files(directory / "2/params") if values in path.read_bytes()]
    assert holding
    for path in holding:
        flip(path, 8 * path.read_bytes().index(values) + 77)
    rewrite_seal(directory / "2", lambda meta: None)
    step, said = restored_by_a_reader(directory)
    assert step == 1 and "params.cells.0.w_h has digest" in said[0]


def drifted_state(step: int, devices: int = 2) -> TrainState:
    """One float of a parameter and one of the optimizer's state are others on the last device."""

    def drifted(array: Any) -> Any:
        copies = [np.array(shard.data) for shard in array.addressable_shards]
        copies[-1].reshape(-1).view(np.uint32)[-1] ^= 1 << 20
        parts = [jax.device_put(copy, s.device) for copy, s in zip(copies, array.addressable_shards, strict=True)]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    state = make_state(step, devices)
    opt_state: Any = state.opt_state
    return state._replace(
        params=state.params._replace(w_out=drifted(state.params.w_out)),
        opt_state=opt_state | {"mean": drifted(opt_state["mean"])},
    )


@pytest.mark.parametrize("devices", [2, 8])
def test_a_state_whose_copies_have_drifted_apart_is_not_saved_and_costs_no_checkpoint(directory, devices):
    with Checkpoints(directory, keep=1, log=print) as checkpoints:
        for step in (3, 4, 5):
            with pytest.raises(replicas.CopiesDiffer, match=r"device \d.* in opt_state.mean, params.w_out"):
                checkpoints.save(drifted_state(step, devices), IDENTITY, None)
        assert checkpoints.failed_saves == 0
    assert names(directory) == ["1", "2"]
    assert restored_by_a_reader(directory) == (2, [])


def test_what_is_written_is_the_copy_that_was_digested(directory, monkeypatch):
    """As if a copy drifted between the look at all copies and the writing."""
    compare = replicas.compare
    monkeypatch.setattr(replicas, "compare", lambda *args: compare(*args)._replace(differing=""))
    with Checkpoints(directory, keep=1, log=print) as checkpoints:
        checkpoints.save(drifted_state(3), IDENTITY, None)
        checkpoints.wait()
        assert checkpoints.failed_saves == 0
    assert names(directory) == ["3"]
    assert restored_by_a_reader(directory) == (3, [])


def test_a_write_that_goes_wrong_is_a_failed_save_and_costs_no_checkpoint(directory, monkeypatch):
    """What the disk keeps is not what it was given, and the sums of the files are made of what it kept."""
    whole, said = sealing.seal, list[str]()

    def on_a_bad_disk(staging: Path, meta: dict, *rest: object) -> None:
        values = np.asarray(host_state(meta["step"]).params.cells[0].w_h).tobytes()
        holding = next(path for path in files(staging / "params") if values in path.read_bytes())
        flip(holding, 8 * holding.read_bytes().index(values) + 77)
        whole(staging, meta, *rest)

    with Checkpoints(directory, keep=1, log=said.append) as checkpoints:
        monkeypatch.setattr(sealing, "seal", on_a_bad_disk)
        for step in (3, 4):
            checkpoints.save(make_state(step), IDENTITY, None)
            checkpoints.wait()
        assert checkpoints.failed_saves == len(said) == 2
        for step, line in enumerate(said, 3):
            assert f"checkpoint {step} was not saved" in line and "params.cells.0.w_h" in line
        assert [name.partition("-")[0] for name in names(directory)] == ["1", "2", "3.corrupt"]
        monkeypatch.undo()
        checkpoints.save(make_state(5), IDENTITY, None)
        checkpoints.wait()
        assert (checkpoints.failed_saves, checkpoints.steps()) == (0, [5])
    assert restored_by_a_reader(directory) == (5, [])


def test_a_file_that_cannot_be_read_back_is_a_failed_save(directory, monkeypatch):
    whole, said = sealing.seal, list[str]()

    def on_a_bad_disk(staging: Path, meta: dict, *rest: object) -> None:
        for path in files(staging / "opt_state"):
            os.truncate(path, path.stat().st_size // 2)
        whole(staging, meta, *rest)

    monkeypatch.setattr(sealing, "seal", on_a_bad_disk)
    with Checkpoints(directory, keep=1, log=said.append) as checkpoints:
        checkpoints.save(make_state(3), IDENTITY, None)
        checkpoints.wait()
        assert checkpoints.failed_saves == 1 and "checkpoint 3 was not saved" in said[0]
    assert restored_by_a_reader(directory) == (2, [])


def test_other_bits_than_were_written_are_a_failed_save_though_their_file_is_whole(directory, monkeypatch):
    whole, said = sealing.seal, list[str]()

    def on_a_lying_disk(staging: Path, meta: dict, *rest: object) -> None:
        held = max(files(staging / "opt_state"), key=lambda path: path.stat().st_size)
        flip(held, 4 * held.stat().st_size)
        whole(staging, meta, *rest)  # of the file as it is

    monkeypatch.setattr(sealing, "seal", on_a_lying_disk)
    with Checkpoints(directory, keep=1, log=said.append) as checkpoints:
        checkpoints.save(make_state(3), IDENTITY, None)
        checkpoints.wait()
        assert checkpoints.failed_saves == 1 and "read back, it is not what was written" in said[0]
    assert restored_by_a_reader(directory) == (2, [])


def test_a_step_under_another_name_is_refused(directory):
    os.rename(directory / "2", directory / "3")
    step, said = restored_by_a_reader(directory)
    assert step == 1 and "saved as step 2" in said[0]


def test_a_writer_sets_the_damaged_aside_and_a_reader_changes_nothing(directory):
    flip(files(directory / "2/params")[-1], 5)
    before = files(directory)
    assert restored_by_a_reader(directory)[0] == 1
    assert files(directory) == before
    said: list[str] = []
    with Checkpoints(directory, log=said.append) as checkpoints:
        assert int(checkpoints.restore(abstract_state())[0].step) == 1
        assert checkpoints.steps() == [1]
    aside = next(name for name in names(directory) if name != "1")
    assert aside.startswith("2.corrupt-") and any(aside in line for line in said)


def test_an_empty_step_directory_left_by_a_crash_is_passed_over(directory):
    (directory / "3").mkdir()
    with Checkpoints(directory, log=print) as checkpoints:
        assert checkpoints.read_meta()["step"] == 2
        assert checkpoints.best() is None
        assert bits(checkpoints.restore(abstract_state())[0]) == bits(host_state(2))
        assert checkpoints.steps() == [1, 2]


def test_an_empty_step_directory_does_not_stand_in_the_way_of_a_save(directory):
    (directory / "3").mkdir()
    with Checkpoints(directory, log=print) as checkpoints:
        checkpoints.save(make_state(3), IDENTITY, None)
        checkpoints.wait()
        assert checkpoints.failed_saves == 0
    assert restored_by_a_reader(directory) == (3, [])


def test_the_same_step_damaged_twice_is_set_aside_twice(directory):
    for _ in range(2):
        (directory / "2" / sealing.SEAL).write_text("{}")
        with Checkpoints(directory, log=print) as checkpoints:
            assert int(checkpoints.restore(abstract_state())[0].step) == 1
            checkpoints.save(make_state(2), IDENTITY, None)
    assert [name.partition("-")[0] for name in names(directory)] == ["1", "2", "2.corrupt", "2.corrupt"]
    assert restored_by_a_reader(directory) == (2, [])


def test_a_step_that_was_asked_for_is_that_one_or_an_error(directory):
    save_all(directory, 3)
    flip(files(directory / "2/params")[-1], 5)
    before = names(directory)
    with Checkpoints(directory, log=print) as checkpoints:
        for restore in (
            lambda: checkpoints.restore(abstract_state(), step=2),
            lambda: checkpoints.restore_params(abstract_state().params, step=2),
        ):
            with pytest.raises(ValueError, match=r"checkpoint 2 in .* is damaged: .*name another one"):
                restore()
        (directory / "2" / sealing.SEAL).unlink()
        with pytest.raises(ValueError, match=r"checkpoint 2 in .* is damaged: checkpoint.json"):
            checkpoints.read_meta(2)
    assert names(directory) == before
    assert restored_by_a_reader(directory, step=1) == (1, [])


def test_where_the_best_is_damaged_the_next_best_is_used_and_said_aloud(tmp_path):
    save_all(tmp_path, (1, 2.0), (2, 1.0), (3, 1.5), 4, keep=9)
    flip(files(tmp_path / "2/params")[-1], 3)
    for best, then in ((2, 3), (3, 1), (1, 4)):
        said: list[str] = []
        flip(files(tmp_path / str(best) / "params")[-1], 3 if best != 2 else 4)
        with Checkpoints(tmp_path, writable=False, log=said.append) as checkpoints:
            params, meta = checkpoints.restore_params(abstract_state().params, step="best")
        assert meta["step"] == then and bits(params) == bits(host_state(then).params)
        assert f"checkpoint {best} in {tmp_path} is damaged" in " ".join(said)
        assert said[-1] == f"NOT THE BEST CHECKPOINT: checkpoint {then} is the best whole one and is used instead"


def test_where_nothing_is_whole_every_attempt_is_refused_and_nothing_is_moved(directory):
    for step in (1, 2):
        flip(files(directory / str(step) / "params")[-1], 3)
    before = names(directory)
    for _ in range(2):  # a supervisor tries again: it must not find an empty directory and train from the start
        with Checkpoints(directory, log=print) as checkpoints, pytest.raises(ValueError, match=r"whole .*1, 2"):
            checkpoints.restore(abstract_state())
    assert names(directory) == before


def test_the_best_is_forgotten_when_it_is_set_aside(tmp_path):
    save_all(tmp_path, (1, 2.0), (2, 1.0), (3, 3.0))
    flip(files(tmp_path / "2/params")[-1], 3)
    with Checkpoints(tmp_path, log=print) as checkpoints:
        assert checkpoints.best() == 2
        assert checkpoints.restore_params(abstract_state().params, step="best")[1]["step"] == 1
        assert checkpoints.best() == 1
        assert names(tmp_path)[1].startswith("2.corrupt-")


def test_a_process_out_of_file_handles_does_not_take_its_trouble_for_damage(directory):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpoints(directory, log=print) as checkpoints:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                sealing.verify(directory / "2")
            with pytest.raises(OSError, match="Too many open files"):
                checkpoints.restore(abstract_state(), step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert bits(checkpoints.restore(abstract_state())[0]) == bits(host_state(2))
    assert names(directory) == ["1", "2"]


def test_a_save_into_a_directory_that_went_away_is_counted_and_the_next_one_is_made(directory):
    said: list[str] = []
    elsewhere = directory.with_name("elsewhere")
    with Checkpoints(directory, log=said.append) as checkpoints:
        os.rename(directory, elsewhere)
        directory.write_text("no directory")
        for step in (3, 4):
            checkpoints.save(make_state(step), IDENTITY, None)
            checkpoints.wait()
        assert checkpoints.failed_saves == len(said) == 2
        assert checkpoints.last_failure == said[-1] and "checkpoint 4 was not saved (failure 2 in a row)" in said[-1]
        directory.unlink()
        os.rename(elsewhere, directory)
        checkpoints.save(make_state(5), IDENTITY, None)
        checkpoints.wait()
        assert (checkpoints.failed_saves, checkpoints.last_failure) == (0, None)
    assert restored_by_a_reader(directory) == (5, [])


CHILD = """
import resource, sys
from pathlib import Path
from tests import conftest
from tests.run.test_checkpoint import IDENTITY, abstract_state, bits, host_state, make_state, names
from charlstm.run.checkpoint import Checkpoints
"""

FULL_DISK = (
    CHILD
    + """
def report(moment):
    print(moment, checkpoints.failed_saves, checkpoints.steps(), *said, flush=True)
    said.clear()

said, identity = [], {**IDENTITY, "vocabulary": "x" * 20_000}  # the seal is the largest file
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
with Checkpoints(Path(sys.argv[1]), log=said.append) as checkpoints:
    checkpoints.save(make_state(1), identity, 2.0)
    checkpoints.wait()
    report("saved")
    for step, limit in enumerate([100, 1500, 20_000], 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        checkpoints.save(make_state(step), identity, 1.0)
        checkpoints.wait()
        report(limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert names(Path(sys.argv[1])) == ["1"]  # what was written in vain does not take up the disk
    assert bits(checkpoints.restore(abstract_state())[0]) == bits(host_state(1))
    checkpoints.save(make_state(5), identity, 3.0)
    checkpoints.wait()
    report("again")
    assert checkpoints.best() == 1
    assert bits(checkpoints.restore(abstract_state())[0]) == bits(host_state(5))
"""
)


def run(program: str, directory: Path, **streams) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", program, str(directory)], env=environment, **streams)


def test_when_the_disk_is_full_the_run_goes_on_and_saves_again_once_there_is_room(tmp_path):
    child = run(FULL_DISK, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    lines = out.splitlines()
    assert (lines[0], lines[4]) == ("saved 0 [1]", "again 0 [1, 5]")
    # The limits stop it in different places: the first file, an array, the seal.
    for failures, (limit, line) in enumerate(zip((100, 1500, 20_000), lines[1:4], strict=True), 1):
        sentence = f"checkpoint {failures + 1} was not saved (failure {failures} in a row): "
        assert line.startswith(f"{limit} {failures} [1] {sentence}") and "File too large" in line, line
    assert lines[3].endswith("OSError: [Errno 27] File too large")
    assert len(lines) == 5 and names(tmp_path) == ["1", "5"]


SAVE_FOR_EVER = (
    CHILD
    + """
with Checkpoints(Path(sys.argv[1]), keep=2, log=print) as checkpoints:
    for step in range(1, 100_000):
        checkpoints.save(make_state(step), IDENTITY, None)
        if step % 2:
            checkpoints.wait()
            print(step, flush=True)  # committed: from now on it, or a later one, must be there
"""
)


def test_a_process_killed_at_any_moment_leaves_its_last_commit_whole(tmp_path):
    """A stopped process has on disk what a killed one has, so each stop is a kill; the last one is a kill indeed."""
    rng, moments = random.Random(0), 4
    directory, said = tmp_path / "checkpoints", tmp_path / "said"
    with open(said, "w") as out:
        child = run(SAVE_FOR_EVER, directory, stdout=out)
    try:
        while child.poll() is None and len(said.read_text().split()) < 2:
            time.sleep(0.05)
        for moment in range(moments):
            time.sleep(rng.uniform(0.0, 0.3))
            os.kill(child.pid, signal.SIGKILL if moment == moments - 1 else signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            committed = int(said.read_text().split("\n")[-2])
            left = shutil.copytree(directory, tmp_path / f"left-{moment}")
            if moment < moments - 1:
                os.kill(child.pid, signal.SIGCONT)
            with Checkpoints(left, log=print) as checkpoints:
                state, meta = checkpoints.restore(abstract_state())
            assert meta["step"] >= committed
            assert bits(state) == bits(host_state(meta["step"]))
            assert all(name.isdecimal() for name in names(left)), names(left)  # nothing was damaged, nothing left over
            for step in checkpoints.steps():
                sealing.verify(left / str(step))
    finally:
        child.kill()
        child.wait()


def test_the_seal_is_checked_without_jax_and_without_orbax(directory):
    program = (
        "import sys; from pathlib import Path; from charlstm.run import sealing\n"
        "print(sealing.verify(Path(sys.argv[1]))['step'])\n"
        "assert not {'jax', 'orbax', 'numpy'} & sys.modules.keys()"
    )
    child = run(program, directory / "2", stdout=subprocess.PIPE, text=True)
    assert (child.communicate(timeout=300)[0], child.returncode) == ("2\n", 0)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b'{"meta": {}, "files": {}}', b"\xff\xfe", b'{"meta": 1']
)
def test_a_seal_that_is_empty_or_malformed_is_damage(directory, content):
    (directory / "2" / sealing.SEAL).write_bytes(content)
    assert restored_by_a_reader(directory)[0] == 1


def test_a_seal_written_by_another_hand_is_damage_even_if_it_says_the_same(directory):
    seal = directory / "2" / sealing.SEAL
    seal.write_text(json.dumps(json.loads(seal.read_text())))
    assert restored_by_a_reader(directory)[0] == 1
