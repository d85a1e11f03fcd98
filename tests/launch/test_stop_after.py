"""--stop_after: a run whose validation no longer improves ends, says so, and knows it when it is started again."""

import json
import shutil

import pytest

from charlstm.run.checkpoint import Checkpoints
from launch import train
from launch.support import cli
from tests.launch.conftest import refusal, steps

# Nothing is learned, so that no evaluation but the first, of step 10, is a gain.
FLAGS = ("--learning_rate=0", "--evaluate_every=10", "--checkpoint_every=0", "--keep_checkpoints=9")


def go(run_dir, arguments, *flags) -> int:
    return train.main(["train", *arguments, *FLAGS, f"--run_dir={run_dir}", *flags])


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(folder, arguments):
    run_dir = folder / "stopped"
    assert go(run_dir, arguments, "--stop_after=2") == cli.DONE
    return run_dir


def test_a_run_ends_after_so_many_evaluations_without_gain_and_says_so(stopped):
    assert steps(stopped) == [10, 20, 30]
    assert "finished: 2 evaluations without gain (stop_after) at step 30, " in (stopped / "log.txt").read_text()
    assert lines(stopped)[-1]["split"] == "valid" and "state_digest" in lines(stopped)[-1]


def test_a_resumed_run_stops_at_the_same_evaluation_with_the_same_bits(stopped, arguments, tmp_path):
    run_dir = shutil.copytree(stopped, tmp_path / "resumed")
    shutil.rmtree(run_dir / "checkpoints" / "30")
    assert go(run_dir, arguments, "--stop_after=2") == cli.DONE
    assert steps(run_dir) == [10, 20, 30]
    assert lines(run_dir)[-1]["state_digest"] == lines(stopped)[-1]["state_digest"]
    seconds = [line["seconds"] for line in lines(run_dir)]
    assert seconds == sorted(seconds)  # over both starts


def test_started_again_it_has_nothing_to_do_unless_it_may_wait_longer(stopped, arguments, tmp_path):
    run_dir = shutil.copytree(stopped, tmp_path / "again")
    assert go(run_dir, arguments, "--stop_after=2") == cli.DONE and steps(run_dir) == [10, 20, 30]
    assert "a larger --stop_after goes on" in (run_dir / "log.txt").read_text()
    assert go(run_dir, arguments, "--stop_after=3") == cli.DONE and steps(run_dir) == [10, 20, 30, 40]


def test_scores_of_other_settings_are_not_compared(stopped, arguments, tmp_path):
    run_dir = shutil.copytree(stopped, tmp_path / "changed")
    assert go(run_dir, arguments, "--stop_after=2", "--eval_chunk=4", "--burn_in=0", "--num_steps=90") == cli.DONE
    assert steps(run_dir) == [10, 20, 30, 40, 50, 60]
    assert "new scores do not compare with those so far (eval_chunk: 512 -> 4; burn_in: 64 -> 0)" in (
        (run_dir / "log.txt").read_text()
    )
    with Checkpoints(run_dir / "checkpoints", writable=False, log=print) as checkpoints:
        assert checkpoints.best() == 40


def test_a_run_that_never_validates_is_refused(arguments, tmp_path):
    said = refusal(train.main, *arguments, "--stop_after=2", f"--run_dir={tmp_path / 'run'}")
    assert said.startswith("stop_after=2 goes by validation scores, and with evaluate_every=0 there are none")
