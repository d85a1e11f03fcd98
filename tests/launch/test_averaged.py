"""A run that goes by validation: the rate drops and averaging begins when the scores say so, also in a killed one."""

import json
import re

import jax
import numpy as np
import pytest

from charlstm import distributed
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.loop import Training
from charlstm.run.metrics import MetricAggregator
from charlstm.training import step as step_lib
from launch import evaluate, sample, train
from launch.support import cli
from tests.launch.conftest import refusal
from tests.training.test_divergence import flipped
from tests.training.test_step import assert_equal_bits

# So fast that the score soon goes up and down.
FLAGS = (
    "--evaluate_every=2", "--log_every=1", "--checkpoint_every=0", "--keep_checkpoints=40", "--logical_shards=2",
    "--learning_rate=1", "--schedule=plateau", "--plateau_patience=1", "--decay_rate=0.9", "--average=asgd",
    "--average_patience=2", "--evaluation_batch_size=5", "--short_window_probability=0.4",
)  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def go(arguments, folder):
    """Trains `name` on some of the devices; where told to, it dies just before it does something at a step."""

    def go(name, devices=2, dies=None, *flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                distributed, "make", lambda given=None, make=distributed.make: make(given or jax.devices()[:devices])
            )
            if dies:
                owner, method, at = dies
                plain = getattr(owner, method)

                def deadly(self, first, *rest):
                    if int(getattr(first, "step", first)) == at:
                        raise Killed
                    return plain(self, first, *rest)

                patch.setattr(owner, method, deadly)
            command = ["train", *arguments, *FLAGS, f"--run_dir={folder / name}", *flags]
            if dies:
                with pytest.raises(Killed):
                    train.main(command)
            else:
                assert train.main(command) == cli.DONE
        return folder / name

    return go


@pytest.fixture(scope="module")
def straight(go):
    return go("averaged")


def records(run_dir, split):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["split"] == split}


def turns(run_dir) -> list[int]:
    """The steps after which the rate dropped, and averaging began, from the scores alone."""
    best, without, found = np.inf, 0, {}
    for step, line in records(run_dir, "valid").items():
        if step == 40:  # evaluated as it is the last
            continue
        gain = line["bits_per_symbol"] < best
        best, without = (line["bits_per_symbol"], 0) if gain else (best, without + 1)
        if without in (1, 2):
            found.setdefault(without, step)
    return [found[1], found[2]]


def test_the_rate_drops_and_averaging_begins_at_exactly_the_evaluations_that_the_scores_say(straight):
    drop, turn = turns(straight)
    assert drop < turn < 37, "nothing would be seen of what comes after"
    rates = {step: line["learning_rate"] for step, line in records(straight, "train").items()}
    for step, rate in rates.items():  # a window has 16 symbols, or half of them at half the rate
        assert rate in (pytest.approx(full := 1 if step <= drop else 0.9), pytest.approx(full / 2))
    log = (straight / "log.txt").read_text()
    assert re.findall(r"step (\d+): evaluation \d+, (\d) without gain: from here on (\S+ \S+)", log) == [
        (str(drop), "1", "the learning"),
        (str(turn), "2", "the parameters"),
    ]


@pytest.mark.long
def test_killed_before_and_after_each_turn_and_at_its_evaluation_it_ends_with_the_same_bits_on_other_devices(
    go, straight
):
    drop, turn = turns(straight)
    deaths = [
        (MetricAggregator, "add", drop - 1, 1),
        (Training, "save", turn, 1),
        (MetricAggregator, "add", turn + 2, 2),
    ]
    for number, (owner, method, at, devices) in enumerate(deaths):
        name = f"killed {number}"
        go(name, 2, (owner, method, at))
        assert max(map(int, (p.name for p in (straight.parent / name / "checkpoints").iterdir()))) < at
        ended = records(go(name, devices), "valid")
        assert ended[40]["state_digest"] == records(straight, "valid")[40]["state_digest"]
        assert {s: r["bits_per_symbol"] for s, r in ended.items()} == {
            s: r["bits_per_symbol"] for s, r in records(straight, "valid").items()
        }


@pytest.mark.long
def test_a_run_that_is_made_longer_is_told_what_one_of_that_length_is_told(go, straight):
    go("longer", 2, None, f"--num_steps={turns(straight)[1] - 1}")
    assert records(go("longer"), "valid")[40]["state_digest"] == records(straight, "valid")[40]["state_digest"]


def test_the_average_is_what_is_validated_evaluated_and_sampled(straight, capsys):
    logged = records(straight, "valid")
    config, identity = run_directory.read(straight)
    mesh = distributed.make(jax.devices()[:1])
    average, _ = run_directory.restore_params(straight, config, identity, mesh, "40", print)
    with Checkpoints(straight / "checkpoints", writable=False, log=print) as checkpoints:
        params, meta = checkpoints.restore_params(average, step=40)
        held, _ = checkpoints.restore_params(average, step=40, item="average")
        assert checkpoints.best() == min(logged, key=lambda step: logged[step]["bits_per_symbol"])
    assert_equal_bits(average, held)
    assert np.abs(average.b_out - params.b_out).max() > 1e-3
    assert meta["bits_per_symbol"] == logged[40]["bits_per_symbol"]
    capsys.readouterr()
    evaluate.main(["evaluate", f"--run_dir={straight}", "--split=valid", "--checkpoint=40", "--format=json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["bits_per_symbol"] == pytest.approx(logged[40]["bits_per_symbol"], abs=1e-6)
    assert "the average of the parameters (average=asgd)" in said.err
    sample.main(["sample", f"--run_dir={straight}", "--length=3", "--format=json"])
    assert "the average of the parameters (average=asgd)" in capsys.readouterr().err


ROLLBACK = (
    "--on_divergence=rollback",
    "--schedule=constant",
    "--evaluate_every=0",
    "--checkpoint_every=25",
    "--short_window_probability=0",
)
EMA, ASGD = ("--average=ema",), ("--average=asgd", "--average_patience=0")


@pytest.fixture
def disturbed(monkeypatch):
    """Does something to the state before the update of one step, once; gives {step: the states before its updates}."""

    def disturbed(at, disturb):
        seen: dict[int, list] = {}

        def make(*args, make=step_lib.make):
            train_step = make(*args)

            def step(state, batch):
                seen.setdefault(int(state.step), []).append(jax.tree.map(np.array, state))
                first = int(state.step) == at and len(seen[at]) == 1
                return train_step(disturb(state) if first else state, batch)

            step.lower = train_step.lower
            return step

        monkeypatch.setattr(step_lib, "make", make)
        return seen

    return disturbed


@pytest.mark.parametrize("average", [EMA, pytest.param(ASGD, marks=pytest.mark.long)], ids=["ema", "asgd"])
def test_a_run_that_goes_back_has_the_average_of_the_checkpoint(average, go, disturbed):
    seen = disturbed(
        28, lambda state: state._replace(params=jax.tree.map(lambda p: p * np.float32(np.nan), state.params))
    )
    run_dir = go(f"back {average}", 2, None, *ROLLBACK, *average)
    assert "went back to step 25, rollback 1 of 3;" in (run_dir / "log.txt").read_text()
    before, after = seen[25]
    assert_equal_bits((after.average, after.plateau), (before.average, before.plateau))
    assert after.plateau.averaged == 25 and np.abs(after.average.b_out - after.params.b_out).max() > 1e-3
    assert len(seen[28]) == 2 and np.isfinite(seen[39][0].average.b_out).all()


@pytest.mark.long
def test_a_bit_of_the_average_that_flips_on_one_device_is_found(go, disturbed):
    disturbed(28, lambda state: state._replace(average=state.average._replace(b_out=flipped(state.average.b_out, 1))))
    run_dir = go("flipped", 2, None, *ROLLBACK, *EMA, "--check_replicas_every=5")
    log = (run_dir / "log.txt").read_text()
    found = r"diverged: the copies on device 0 .*, device 1 .* differ, in average\.b_out after step 30"
    assert re.search(found, log) and log.count("went back to step 25") == 1


def test_without_a_validation_split_it_is_refused(arguments, tmp_path):
    sentence = refusal(
        train.main, *arguments, *FLAGS, "--logical_shards=8", "--valid_fraction=0", f"--run_dir={tmp_path / 'run'}"
    )
    assert sentence.startswith("schedule=plateau goes by validation scores, and ") and "has no valid split" in sentence
    assert not (tmp_path / "run").exists()
