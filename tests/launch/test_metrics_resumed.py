"""A run that was cut short has the metrics of one that was not, but for time; one that goes back has those it kept."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from charlstm import distributed
from charlstm.run.metrics import FIGURES, MetricAggregator
from charlstm.training import step as step_lib
from launch import evaluate, train
from launch.support import cli

# Checkpoints of 10, 20, 30 and 40 between lines of 7, 14, 21, 28, 35 and 40; evaluations, saved too, of 12, 24 and 36.
FLAGS = (
    "--log_every=7", "--evaluate_every=12", "--keep_checkpoints=40", "--logical_shards=2", "--eval_chunk=24",
    "--burn_in=8",
)  # fmt: skip
OF_TIME = ("time", "seconds", "symbols_per_second", "input_wait")
STEPS_PER_EPOCH = 27  # of the text in conftest.py


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def go(arguments, folder):
    """Trains `name` on so many devices: (status, None where it was killed; {step: loss of its last update})."""

    def go(name, *flags, devices=1, at=None, end=None, poisoned=None):
        losses = {}

        def make(*args, make=step_lib.make):
            train_step = make(*args)

            def step(state, batch):
                number = int(state.step)
                if int(state.divergence.next_window) == poisoned:
                    state = state._replace(params=jax.tree.map(lambda p: p * np.float32(np.nan), state.params))
                state, metrics = train_step(state, batch)
                losses[number + 1] = float(metrics.loss)
                return state, metrics

            step.lower = train_step.lower
            return step

        def add(self, step, metrics, add=MetricAggregator.add):
            add(self, step, metrics)
            if step == at:
                end()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                distributed, "make", lambda given=None, make=distributed.make: make(given or jax.devices()[:devices])
            )
            patch.setattr(step_lib, "make", make)
            patch.setattr(MetricAggregator, "add", add)
            try:
                status = train.main(["train", *arguments, *FLAGS, f"--run_dir={folder / name}", *flags])
            except Killed:
                status = None
        return status, losses

    return go


def kill():
    raise Killed


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def lines(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def but_for_time(folder, name) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines(folder, name)]


@pytest.fixture(scope="module")
def straight(go, folder) -> list[dict]:
    assert go("measured")[0] == cli.DONE
    return but_for_time(folder, "measured")


@pytest.mark.parametrize(
    ("end", "at", "status", "devices"),
    [
        (kill, 17, None, 2),
        pytest.param(interrupt, 17, cli.STOPPED, 1, marks=pytest.mark.long),
        pytest.param(kill, 33, None, 1, marks=pytest.mark.long),
        pytest.param(interrupt, 21, cli.STOPPED, 1, marks=pytest.mark.long),  # just before a line
    ],
    ids=["killed at 17 on two devices", "Ctrl-C at 17", "killed at 33", "Ctrl-C at 21"],
)
def test_cut_short_and_resumed_it_has_the_metrics_of_the_run_that_was_not(
    end, at, status, devices, go, folder, straight
):
    name = f"{end.__name__} {at}"
    assert go(name, devices=devices, at=at, end=end)[0] == status
    assert go(name)[0] == cli.DONE
    assert but_for_time(folder, name) == straight


def test_on_as_many_devices_as_logical_shards_the_evaluating_program_prints_the_bits_of_the_log(
    straight, folder, monkeypatch, capsys
):
    monkeypatch.setattr(distributed, "make", lambda given=None, make=distributed.make: make(given or jax.devices()[:2]))
    capsys.readouterr()
    for line in straight:
        if line["split"] == "valid" and line["step"] in (12, 40):
            flags = (f"--run_dir={folder / 'measured'}", f"--checkpoint={line['step']}", "--split=valid")
            assert evaluate.main(["evaluate", *flags, "--format=json"]) == cli.DONE
            found = json.loads(capsys.readouterr().out)
            assert [found[name] for name in FIGURES] == [line[name] for name in FIGURES]


@pytest.fixture(scope="module")
def back(go):
    # In window 33 a parameter is poisoned; back to step 30, from where windows 30 to 33 are left out.
    return go("back", "--on_divergence=rollback", poisoned=33)


def test_what_was_gone_back_from_is_in_no_line_and_windows_left_out_are_in_the_epoch(back, folder):
    status, losses = back
    assert status == cli.DONE and "went back to step 30" in (folder / "back" / "log.txt").read_text()
    found = {line["step"]: line for line in lines(folder, "back") if line["split"] == "train"}
    for first, last in ((1, 7), (22, 28), (29, 35), (36, 40)):
        mean = np.mean([losses[step] for step in range(first, last + 1)])
        assert found[last]["bits_per_symbol"] == pytest.approx(mean / np.log(2), rel=1e-12)
    assert {step: line["epoch"] for step, line in found.items()} == {
        step: round((step + (4 if step > 30 else 0)) / STEPS_PER_EPOCH, 4) for step in (7, 14, 21, 28, 35, 40)
    }


@pytest.mark.parametrize(
    ("poisoned", "end", "at"),
    [pytest.param(33, kill, 38, marks=pytest.mark.long), (33, interrupt, 32), (5, interrupt, 4)],
    ids=["killed later", "stopped before", "stopped before the first checkpoint"],
)
def test_one_that_goes_back_is_resumed_with_the_same_metrics(poisoned, end, at, back, go, folder):
    flags, straight = ("--on_divergence=rollback", "--keep_checkpoints=1"), "back" if poisoned == 33 else "back early"
    if poisoned != 33:
        assert go(straight, *flags, poisoned=poisoned)[0] == cli.DONE
    name = f"{straight}, ended at {at}"
    go(name, *flags, poisoned=poisoned, at=at, end=end)
    assert go(name, *flags, poisoned=poisoned)[0] == cli.DONE
    assert but_for_time(folder, name) == but_for_time(folder, straight)
