"""Ctrl-C during validation: it is interrupted, the step is saved, and the run that goes on makes up for it."""

import json
import os
import signal

import pytest

from charlstm.run.loop import Training
from charlstm.run.validation import Validation
from launch import train
from launch.support import cli
from tests.launch.conftest import steps

FLAGS = (
    "--schedule=plateau", "--plateau_patience=1", "--evaluate_every=10", "--checkpoint_every=0", "--eval_chunk=48",
    "--burn_in=8", "--sample_every=10", "--sample_length=8", "--keep_checkpoints=9", "--log_every=10", "--num_steps=20",
)  # fmt: skip
OF_TIME = ("time", "seconds", "symbols_per_second", "input_wait")


@pytest.fixture(scope="module")
def go(folder, arguments):
    """Trains `name`; with `at`, Ctrl-C comes in the second window of that evaluation."""

    def go(name, at=None, *more):
        evaluations = []

        def score(self, state, doing, score=Validation.score):
            evaluations.append(int(state.step))

            def interrupted(done, windows):
                if evaluations[-1] == at and done == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                doing(done, windows)

            return score(self, state, interrupted)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Validation, "score", score)
            status = train.main(["train", *arguments, *FLAGS, *more, f"--run_dir={folder / name}"])
        return status, evaluations

    return go


def lines(run_dir, name="metrics.jsonl") -> list[dict]:
    found = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in found]


@pytest.mark.parametrize("at", [10, pytest.param(20, marks=pytest.mark.long)])
def test_an_interrupted_validation_is_made_up_for_and_the_run_ends_with_the_same_lines_and_bits(at, go, folder):
    if not (folder / "validated").exists():
        assert go("validated") == (cli.DONE, [10, 20])
    name = f"interrupted at {at}"
    assert go(name, at) == (cli.STOPPED, [step for step in (10, 20) if step <= at])
    log = (folder / name / "log.txt").read_text()
    assert f"step {at}: validation is interrupted, and made up for when the run goes on" in log
    assert steps(folder / name)[-1] == at and f"stopped by a signal at step {at}, saved" in log
    assert go(name) == (cli.DONE, [step for step in (10, 20) if step >= at])
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(folder / name, file) == lines(folder / "validated", file)


def test_a_validation_made_up_for_twice_is_there_once(go, folder, monkeypatch):
    if not (folder / "validated").exists():
        assert go("validated") == (cli.DONE, [10, 20])
    assert go("twice", 10)[0] == cli.STOPPED

    def killed(*args):
        raise RuntimeError("killed before what was made up for is saved")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", killed)
        with pytest.raises(RuntimeError, match="killed before"):
            go("twice")
    assert [line["split"] for line in lines(folder / "twice")] == ["train", "valid"]
    assert go("twice") == (cli.DONE, [10, 20])
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(folder / "twice", file) == lines(folder / "validated", file)


def test_the_evaluation_of_a_last_step_that_is_none_any_more_is_not_due(go, folder):
    assert go("longer", 25, "--num_steps=25") == (cli.STOPPED, [10, 20, 25])
    assert go("longer", None, "--num_steps=15") == (cli.DONE, [])
    assert go("longer", None, "--num_steps=30") == (cli.DONE, [30])
    assert [line["step"] for line in lines(folder / "longer") if line["split"] == "valid"] == [10, 20, 30]
