"""How a run begins: from another run's parameters, again after a first try that failed, and with what name."""

import json
import os
import shutil
from pathlib import Path

import pytest

from charlstm import distributed
from charlstm.run import digest, run_directory
from launch import evaluate, sample, train, tune
from launch.support import cli
from tests.jobs import last_line
from tests.launch.conftest import flip, refusal, steps, tree


class Killed(Exception):
    """Stands for kill -9."""


@pytest.fixture
def dies_before_it_trains(monkeypatch):
    """The next run ends after its directory was made and before its first update."""

    def die(*args):
        monkeypatch.undo()
        raise Killed

    monkeypatch.setattr(train.loop.Training, "train", die)


def log_of(run_dir: Path) -> list[str]:
    return [line[20:] for line in (run_dir / "log.txt").read_text().splitlines()]


# A first try that has left no checkpoint.


def test_a_first_try_that_has_failed_is_begun_anew_with_other_settings(arguments, tmp_path):
    run_dir = tmp_path / "run"
    run = [*arguments, f"--run_dir={run_dir}", "--num_steps=3", "--log_every=1", "--checkpoint_every=0"]
    diverges = ["--learning_rate=3e38", "--clip_norm=0", "--seed=1"]
    assert train.main(["train", *run, *diverges]) == cli.DIVERGED
    assert steps(run_dir) == [] and "seed" in (run_dir / "flags.txt").read_text()
    (run_dir / "metrics.jsonl").write_text('{"step": 2, "split": "train", "of": "the first try"}\n')
    assert train.main(["train", *run]) == cli.DONE
    (said,) = [line for line in log_of(run_dir) if line.startswith("begun anew")]
    assert said.startswith(f"begun anew, as there was no checkpoint yet: {run_dir} was started with other settings (")
    assert "seed: 1 -> 0" in said and said.endswith(")")
    assert run_directory.read(run_dir)[0].training.seed == 0 and "seed" not in (run_dir / "flags.txt").read_text()
    assert steps(run_dir) == [3]
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()][:3] == [1, 2, 3]
    assert "the first try" not in (run_dir / "metrics.jsonl").read_text()


@pytest.mark.long
def test_a_first_try_on_another_text_is_begun_anew(arguments, folder, dies_before_it_trains, tmp_path):
    run = [*arguments, f"--run_dir={tmp_path / 'run'}", "--num_steps=1"]
    with pytest.raises(Killed):
        train.main(["train", *run])
    assert train.main(["train", *run, f"--corpus={folder / 'other.txt'}"]) == cli.DONE
    assert "was trained on the corpus with fingerprint" in log_of(tmp_path / "run")[0]


def test_a_run_killed_before_its_first_checkpoint_keeps_what_it_was_started_with(
    arguments, dies_before_it_trains, tmp_path
):
    """Above all the number of its logical shards, which is by default that of the devices it was started on."""
    run = [*arguments, f"--run_dir={tmp_path / 'run'}", "--num_steps=1"]
    with pytest.raises(Killed):
        train.main(["train", *run, "--logical_shards=16"])
    config = (tmp_path / "run" / "config.json").read_text()
    assert train.main(["train", *run]) == cli.DONE
    assert (tmp_path / "run" / "config.json").read_text() == config
    assert not any(line.startswith("begun anew") for line in log_of(tmp_path / "run"))


def test_a_run_killed_while_its_directory_is_made_is_begun_by_the_same_command(arguments, tmp_path):
    for name in ("identity.json", "flags.txt", run_directory.INITIAL, "config.json"):
        (tmp_path / f"{name}.0badf00d.new").write_text("half of it, wri")
    assert train.main(["train", *arguments, "--num_steps=1", f"--run_dir={tmp_path}"]) == cli.DONE
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("left", ["20", "20.corrupt-0123", "20.saving"], ids=["whole", "set aside", "without its name"])
def test_a_run_that_has_saved_anything_is_not_begun_anew(left, copied, arguments, tmp_path):
    for step in steps(copied):
        target = copied / "checkpoints" / (left if step == 20 else f"{step}.abandoned-0")
        os.rename(copied / "checkpoints" / str(step), copied / "checkpoints" / "moved")
        os.rename(copied / "checkpoints" / "moved", target)
    before = tree(copied)
    assert "was started with other settings (seed: 0 -> 3)" in refusal(
        train.main, *arguments, "--seed=3", f"--run_dir={copied}"
    )
    assert tree(copied) == before


def test_a_config_json_of_another_program_is_not_begun_anew(arguments, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "identity.json").write_text("{}")
    before = tree(tmp_path)
    assert "is not the config of a run" in refusal(train.main, *arguments, f"--run_dir={tmp_path}")
    assert tree(tmp_path) == before


def test_a_refused_change_names_the_ways_on(copied, arguments):
    sentence = refusal(train.main, *arguments, "--seed=3", f"--run_dir={copied}")
    assert f"--flagfile={copied / 'flags.txt'}" in sentence and f"--initial_checkpoint={copied}" in sentence
    assert train.main(["train", f"--flagfile={copied / 'flags.txt'}", f"--run_dir={copied}"]) == cli.DONE


# Another run's parameters.


@pytest.fixture
def started(copied, arguments, tmp_path, dies_before_it_trains) -> list[str]:
    """The command of a run that was started from step 40 of `copied`, and killed before its first checkpoint."""
    command = [*arguments, f"--run_dir={tmp_path / 'run'}", f"--initial_checkpoint={copied}", "--num_steps=1"]
    with pytest.raises(Killed):
        train.main(["train", *command])
    return ["train", *command]


def test_a_run_killed_before_its_first_checkpoint_takes_the_same_parameters_again(started, copied, arguments, tmp_path):
    straight = [*started[:-3], f"--run_dir={tmp_path / 'straight'}", *started[-2:]]
    assert train.main(straight) == cli.DONE
    assert train.main(["train", *arguments, f"--run_dir={copied}", "--num_steps=41"]) == cli.DONE
    assert max(steps(copied)) == 41
    assert train.main(started) == cli.DONE
    assert f"starting again from the parameters of step 40 of {copied}" in log_of(tmp_path / "run")
    assert last_line(tmp_path / "run")["state_digest"] == last_line(tmp_path / "straight")["state_digest"]


LONG = [pytest.param(fault, marks=pytest.mark.long) for fault in ("damaged", "no run")]


@pytest.mark.parametrize("fault", ["gone", "another", *LONG])
def test_where_they_are_gone_or_others_now_it_is_refused(fault, started, copied, tmp_path):
    checkpoints = copied / "checkpoints"
    if fault == "gone":
        shutil.rmtree(checkpoints / "40")
    elif fault == "damaged":
        flip(max((checkpoints / "40/params").rglob("*"), key=lambda path: path.stat().st_size), 1000)
    elif fault == "another":  # step 40 holds something else than what was taken
        note = tmp_path / "run" / run_directory.INITIAL
        note.write_text(json.dumps(json.loads(note.read_text()) | {"digest": "0" * 64}))
    else:
        shutil.rmtree(copied)
    before = tree(tmp_path / "run")
    sentence = refusal(train.main, *started[1:])
    assert f"was started from the parameters of step 40 of {copied}, which are not there any more" in sentence
    assert tree(tmp_path / "run") == before


def test_other_parameters_to_start_from_are_another_run(started, trained, arguments, tmp_path):
    """Without a checkpoint it is begun anew; with one it is refused."""
    other = f"--initial_checkpoint={trained / 'checkpoints' / '30'}"
    assert train.main([*started, other]) == cli.DONE
    assert any("begun anew" in line and "initial_checkpoint: " in line for line in log_of(tmp_path / "run"))
    assert f"starting from the parameters of step 30 of {trained}" in log_of(tmp_path / "run")
    assert f"initial_checkpoint: {trained}/checkpoints/30 -> " in refusal(train.main, *started[1:], "--num_steps=2")
    without = [flag for flag in started if not flag.startswith("--initial_checkpoint")]
    assert train.main([*without, "--num_steps=2"]) == cli.DONE


def test_a_damaged_note_of_them_is_refused(started, tmp_path):
    for content in ("{", "[]", '{"named": "x"}', '{"named": 1, "other": "", "step": 1, "item": "", "digest": ""}'):
        (tmp_path / "run" / run_directory.INITIAL).write_text(content)
        assert f"{run_directory.INITIAL} is damaged" in refusal(train.main, *started[1:])


def test_a_run_that_diverges_before_its_first_checkpoint_goes_back_to_the_parameters_it_began_with(
    copied, arguments, tmp_path
):
    run_dir = tmp_path / "run"
    diverges = ["--learning_rate=3e38", "--clip_norm=0", "--on_divergence=rollback", "--max_rollbacks=1"]
    flags = [*diverges, "--checkpoint_every=0", f"--initial_checkpoint={copied}", f"--run_dir={run_dir}"]
    assert train.main(["train", *arguments, *flags]) == cli.DIVERGED
    assert any(line.startswith("went back to step 0, rollback 1 of 1") for line in log_of(run_dir))
    assert steps(run_dir) == [0]
    config, identity = run_directory.read(run_dir)
    params, _ = run_directory.restore_params(run_dir, config, identity, distributed.make(), "latest", print)
    assert digest.state_digest(params) == run_directory.read_initial(run_dir).digest


@pytest.mark.parametrize("main", [evaluate.main, sample.main, train.main])
def test_a_step_that_is_asked_for_and_damaged_is_refused_by_every_program(main, copied, arguments, tmp_path):
    flip(max((copied / "checkpoints/30/params").rglob("*"), key=lambda path: path.stat().st_size), 1000)
    if main is train.main:
        flags = [*arguments, f"--initial_checkpoint={copied}/checkpoints/30", f"--run_dir={tmp_path / 'run'}"]
    else:
        flags = [f"--run_dir={copied}", "--checkpoint=30"]
    assert "checkpoint 30 in" in (sentence := refusal(main, *flags)) and "is damaged" in sentence
    assert not (tmp_path / "run").exists()


def test_where_the_best_is_damaged_a_program_says_so_aloud(copied, capsys):
    flip(max((copied / "checkpoints/40/params").rglob("*"), key=lambda path: path.stat().st_size), 1000)
    assert sample.main(["sample", f"--run_dir={copied}", "--length=5", "--format=json"]) == cli.DONE
    assert "NOT THE BEST CHECKPOINT: checkpoint 30 is" in capsys.readouterr().err


# Names.


@pytest.mark.parametrize(
    ("main", "flag"),
    [(train.main, "run_dir"), (evaluate.main, "run_dir"), (sample.main, "run_dir"), (tune.main, "study_dir")],
)
def test_a_run_directory_whose_name_is_not_utf_8_is_refused_at_once(main, flag, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"run-\xe9")
    flags = {train.main: arguments, tune.main: (*arguments, "--space=none")}.get(main, ())
    sentence = refusal(main, *flags, f"--{flag}={name}")
    assert r"run-\udce9' is not UTF-8" in sentence
    sentence.encode()  # it can be printed
    assert not list(tmp_path.iterdir())
