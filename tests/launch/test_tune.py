"""Studies: what is drawn, who runs it, what is stopped early, and what is left when a worker dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import estimate, run_directory, search_space
from launch import evaluate, tune
from launch.support import cli, trials
from tests.conftest import ROOT
from tests.jobs import alive, children, wait_for
from tests.launch.conftest import SMALL, TINY, refusal

STAND_IN = ROOT / "tests" / "launch" / "stand_in.py"
SPACE = """
[learning_rate]
low = 1e-4
high = 0.4
log = true

[batch_size]
choices = [8, 16]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def command(tmp_path, folder) -> list[str]:
    """Of a study in `tmp_path / "study"` of runs of 40 updates."""
    space = write(tmp_path / "space.toml", SPACE)
    return [
        "tune", TINY, *SMALL, "--num_steps=44", f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}",
        f"--space={space}", f"--study_dir={tmp_path / 'study'}",
    ]  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(trials, "TRAIN", (sys.executable, str(STAND_IN)))
    monkeypatch.setattr(trials, "LOOK_EVERY", 0.01)


@contextlib.contextmanager
def worker(command: list[str], **environment: str) -> Iterator[subprocess.Popen]:
    """A worker in a process of its own, whose trials are of the stand-in."""
    program_text = (
        "from launch import tune; from launch.support import cli, trials\n"
        f"trials.TRAIN, trials.LOOK_EVERY = ({sys.executable!r}, {str(STAND_IN)!r}), 0.05\n"
        "cli.run('launch.tune', tune.main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program_text, *command[1:]], cwd=ROOT, env=os.environ | environment,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def study_of(tmp_path: Path) -> list:
    return tune.open_study(tmp_path / "study").trials


def states(tmp_path: Path) -> list[str]:
    return [trial.state.name for trial in study_of(tmp_path)]


def starts(tmp_path: Path, number: int) -> list[str]:
    path = tune.run_dir(tmp_path / "study", number) / "starts.txt"
    return path.read_text().splitlines() if path.exists() else []


# The space.


class Fixed:
    """In place of an Optuna trial: draws what it is given."""

    def __init__(self, **values):
        self.suggest_float = self.suggest_int = lambda name, low, high, log: values[name]
        self.suggest_categorical = lambda name, choices: values[name]


def test_a_width_is_fitted_so_that_one_more_unit_would_be_too_many_parameters(tmp_path):
    text = "[num_layers]\nchoices = [1, 2]\n[learning_rate]\nlow = 1e-3\nhigh = 1\n"
    text += "[hidden_size]\nparameters = 240_321\n"
    space = search_space.read(str(write(tmp_path / "s.toml", text)), Config())
    values = search_space.draw(Fixed(num_layers=2, learning_rate=0.0123456), space, Config(), 65)
    assert values == {"num_layers": 2, "learning_rate": 0.01235, "hidden_size": 128}  # as char-rnn's
    for layers in (1, 2):
        values = search_space.draw(Fixed(num_layers=layers, learning_rate=0.1), space, Config(), 65)
        config = config_lib.replace(Config(), **values)
        wider = config_lib.replace(config, hidden_size=values["hidden_size"] + 1)
        assert estimate.count_parameters(config, 65) <= 240_321 < estimate.count_parameters(wider, 65)


@pytest.mark.parametrize(
    ("setting", "parameters", "settings", "found"),
    [
        ("num_layers", 10**9, {"hidden_size": 1}, 256),  # as many as there may be
        ("hidden_size", 9_999, {"tie_embeddings": True, "embedding_size": 256}, "not every value is allowed: tie_emb"),
        ("batch_size", 9_999, {}, "batch_size cannot be fitted to parameters=9999: it does not change their number"),
        ("hidden_size", 9, {}, "with hidden_size=1 the model has more than parameters=9 already"),
    ],
)
def test_a_setting_is_fitted_as_far_as_it_goes_or_refused(setting, parameters, settings, found):
    space = search_space.Space({}, setting, parameters)
    if isinstance(found, int):
        assert search_space.draw(Fixed(), space, Config(**settings), 65) == {setting: found}
    else:
        with pytest.raises(ValueError, match=re.escape(found)):
            search_space.draw(Fixed(), space, Config(**settings), 65)


def test_a_number_that_is_rounded_stays_within_its_bounds(tmp_path):
    text = "[ema_decay]\nlow = 0.900049\nhigh = 0.99998\n"
    space = search_space.read(str(write(tmp_path / "s.toml", text)), Config())
    for drawn, expected in ((0.99997, 0.99998), (0.90005, 0.9001), (0.900049, 0.900049)):
        assert search_space.draw(Fixed(ema_decay=drawn), space, Config(), 65) == {"ema_decay": expected}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[learning_rat]\nlow = 1\nhigh = 2",
            "learning_rat is not a setting of the streams, the model or",
        ),
        ("[vocabulary]\nchoices = ['bytes']", "vocabulary is not a setting of the streams"),
        ("[mixture]\nchoices = ['a:1', 'b:1']", "mixture is the text: with another one, scores would not compare"),
        ("[learning_rate]\nlow = 2\nhigh = 1", "low=2.0 to high=1.0: low must be less"),
        ("[learning_rate]\nlow = 0\nhigh = 1\nlog = true", "low must be less, and above 0"),
        ("[cell]\nlow = 1\nhigh = 2", "not of the form low and high"),
        ("[batch_size]\nchoices = [8, 'many']", "batch_size: 'many' is not an int"),
        ("[batch_size]\nparameters = 8", "no setting to search"),
        ("learning_rate = ", "is not a TOML file"),
        ("", "has no setting to search"),
    ],
)
def test_a_space_that_is_none_is_refused_in_one_sentence(text, sentence, command, tmp_path):
    write(tmp_path / "space.toml", text)
    assert sentence in refusal(tune.main, *command[1:])
    assert not (tmp_path / "study").exists()


# Trials.


def test_a_trial_is_a_run_like_any_other_and_the_first_has_the_flags_own_values(command, tmp_path, capsys):
    assert tune.main([*command, "--trials=1"]) == cli.DONE
    run_dir = tune.run_dir(tmp_path / "study", 0)
    config, _ = run_directory.read(run_dir)
    assert (config.optimizer.learning_rate, config.streams.batch_size, config.training.num_steps) == (0.01, 16, 40)
    (trial,) = study_of(tmp_path)
    assert sorted(trial.intermediate_values) == list(range(1, 11))
    capsys.readouterr()
    assert evaluate.main(["evaluate", f"--run_dir={run_dir}", "--split=valid", "--format=json"]) == cli.DONE
    scored = json.loads(capsys.readouterr().out)
    assert scored["bits_per_symbol"] == pytest.approx(trial.value, abs=1e-6)
    assert trial.user_attrs["seconds"] > 0
    assert trial.user_attrs["parameters"] == 256 * 4 + (4 + 8) * 32 + 2 * 32 + 8 * 256 + 256


def test_bad_trials_are_stopped_early_and_the_report_names_the_best(command, tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("STAND_IN_SPOILS", "yes")
    assert tune.main([*command, "--trials=12"]) == cli.DONE
    told = capsys.readouterr().out
    ended = study_of(tmp_path)
    spoiled = [trial for trial in ended if trial.number >= 4 and trial.params["batch_size"] == 8]
    finished = [trial for trial in ended if trial.state.name == "COMPLETE"]
    assert spoiled and {(trial.state.name, max(trial.intermediate_values)) for trial in spoiled} == {("PRUNED", 2)}
    assert {max(trial.intermediate_values) for trial in finished} == {10}
    best = min(finished, key=lambda trial: trial.value)
    assert f"12 trials: {len(finished)} finished, {12 - len(finished)} stopped early, 0 failed" in told
    rows = [line.split() for line in told.splitlines()[2:12]]
    assert rows[0][:2] == [str(best.number), f"{best.value:.4f}"]
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    assert re.search(r"^importance: .*learning_rate \d+%", told, re.MULTILINE)
    assert f"--flagfile={tune.run_dir(tmp_path / 'study', best.number)}/flags.txt" in told
    # Each trial draws anew.
    assert len({trial.params["learning_rate"] for trial in ended}) == 12


def test_every_trial_makes_as_many_updates_as_its_seconds_allow(command, tmp_path, stand_in):
    assert tune.main([*command, "--trials=1", "--seconds_per_trial=26"]) == cli.DONE
    assert "--num_steps=100 --evaluate_every=10 " in starts(tmp_path, 0)[0]  # of a quarter of a second each


def test_a_trial_that_diverges_counts_as_bad_and_one_that_is_refused_ends_the_worker(command, tmp_path, stand_in):
    write(tmp_path / "space.toml", SPACE.replace("1e-4", "0.6").replace("0.4", "0.7"))
    assert tune.main([*command, "--trials=2"]) == cli.DONE
    assert states(tmp_path) == ["PRUNED", "PRUNED"]
    write(tmp_path / "space.toml", SPACE.replace("1e-4", "0.95").replace("0.4", "0.99"))
    other = [*command[1:], f"--study_dir={tmp_path / 'other'}"]
    assert refusal(tune.main, *other) == "launch.train refuses trial 0: a mistake"


# The end of a study.


def test_the_best_settings_are_trained_again_with_other_seeds_and_the_page_has_it_all(
    command, tmp_path, stand_in, capsys
):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    report = tmp_path / "study.html"
    assert tune.main([*command, "--trials=5", "--repeat_best=3", f"--report={report}"]) == cli.DONE
    best = min((t for t in study_of(tmp_path) if t.state.name == "COMPLETE"), key=lambda trial: trial.value)
    repeats = sorted((tmp_path / "study" / "repeats").glob("*/starts.txt"))
    assert [path.parent.name for path in repeats] == [f"{best.number:04d}-{seed}" for seed in (1, 2, 3)]
    of_best = starts(tmp_path, best.number)[0].split()[1:-1]
    for seed, path in enumerate(repeats, 1):
        assert path.read_text().split()[1:] == [*of_best, f"--seed={seed}", f"--run_dir={path.parent}"]
    said = (
        f"the best settings with 3 other seeds: {best.value:.4f} bits per symbol ({best.value:.4f} to {best.value:.4f})"
    )
    assert capsys.readouterr().out.splitlines()[-1] == said
    page = report.read_text()
    assert said in page and page.count("<svg") == 3 and page.count("<tr>") == 6 and ">learning_rate<" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert tune.main([*command, "--trials=5", "--repeat_best=3"]) == cli.DONE
    assert [len(path.read_text().splitlines()) for path in repeats] == [1, 1, 1], "a whole one was run again"


def test_a_seed_that_diverges_leaves_the_score_of_the_others(command, tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("STAND_IN_DIVERGES_WITH", "2")
    assert tune.main([*command, "--trials=1", "--repeat_best=3"]) == cli.DONE
    assert "the best settings with 2 other seeds: " in capsys.readouterr().out
    (tmp_path / "study" / "repeats" / "0000-3" / "metrics.jsonl").write_text(
        '{"step": 4, "split": "valid", "bits_per_symbol": 2.5}\n'
        '{"step": 8, "split": "valid", "bits_per_symbol": 2.5, "state_digest": "stopped early"}\n'
    )
    assert tune.main([*command, "--trials=0", "--repeat_best=3"]) == cli.DONE
    assert "the best settings with 2 other seeds: " in capsys.readouterr().out
    assert len((tmp_path / "study" / "repeats" / "0000-3" / "starts.txt").read_text().splitlines()) == 1


def test_the_best_is_not_repeated_while_another_worker_has_a_trial(command, tmp_path, stand_in, monkeypatch):
    with worker([*command, "--trials=2"], STAND_IN_PAUSE="0.5"):
        wait_for(lambda: starts(tmp_path, 0))
        assert tune.main([*command, "--trials=2", "--repeat_best=1"]) == cli.DONE
        assert states(tmp_path) == ["RUNNING", "COMPLETE"]
    assert not (tmp_path / "study" / "repeats").exists()


@pytest.mark.parametrize(
    ("pruner", "kind"), [("median", "MedianPruner"), ("asha", "SuccessiveHalvingPruner"), ("none", "NopPruner")]
)
def test_who_stops_trials_early_is_a_choice(pruner, kind, command, tmp_path, stand_in, monkeypatch):
    opened, open_study = [], tune.open_study
    monkeypatch.setattr(tune, "open_study", lambda *about: opened.append(open_study(*about)) or opened[-1])
    assert tune.main([*command, "--trials=1", f"--pruner={pruner}"]) == cli.DONE
    assert [type(study.pruner).__name__ for study in opened] == [kind]


def test_settings_reach_a_trial_as_they_were_given(command, tmp_path, stand_in):
    assert tune.main([*command, "--trials=1", "--sample_prompt=    def ", "--file_separator=\t"]) == cli.DONE
    (line,) = starts(tmp_path, 0)
    assert " --sample_prompt=    def  --" in line and " --file_separator=\t --" in line


@pytest.mark.parametrize("status", [cli.UNREACHABLE, cli.HANGS, cli.LOST, cli.IN_USE, cli.NOT_SAVED])
def test_a_trial_goes_on_after_what_passes_also_where_the_study_was_moved_to(
    status, command, tmp_path, stand_in, monkeypatch
):
    monkeypatch.setenv("STAND_IN_STATUS", str(status))
    assert tune.main([*command, "--trials=1"]) == status
    assert states(tmp_path) == ["RUNNING"]
    monkeypatch.delenv("STAND_IN_STATUS")
    (tmp_path / "study").rename(tmp_path / "moved")
    assert tune.main([*command, "--trials=1", f"--study_dir={tmp_path / 'moved'}"]) == cli.DONE
    assert [trial.state.name for trial in tune.open_study(tmp_path / "moved").trials] == ["COMPLETE"]
    assert len(trials.evaluations(tmp_path / "moved" / "trials" / "0000")) == 10 and not (tmp_path / "study").exists()


def test_the_lock_of_the_journal_leads_to_it_from_any_folder(tmp_path, monkeypatch):
    opened, backend = [], tune.JournalFileBackend
    monkeypatch.setattr(tune, "JournalFileBackend", lambda path: opened.append(path) or backend(path))
    monkeypatch.chdir(tmp_path)
    tune.open_study(Path("studies/mine"))
    assert opened == [str(tmp_path / "studies" / "mine" / "journal.log")]


def test_a_study_is_called_as_its_directory_and_one_from_before_keeps_its_name(tmp_path):
    assert tune.open_study(tmp_path / "mine").study_name == "mine"
    (tmp_path / "mine").rename(tmp_path / "yours")
    assert tune.open_study(tmp_path / "yours").study_name == "mine"


def test_a_worker_has_a_gpu_of_its_own(command, tmp_path, stand_in, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for trials_so_far, flags in ((1, ()), (2, ("--device=3",))):
        assert tune.main([*command, f"--trials={trials_so_far}", *flags]) == cli.DONE
    given = [(tune.run_dir(tmp_path / "study", number) / "device.txt").read_text() for number in (0, 1)]
    assert given == ["all", "3"]
    assert "is not the number of a GPU" in refusal(tune.main, *command[1:], "--device=gpu")
    assert "is not a .html file" in refusal(tune.main, *command[1:], "--report=study.pdf")


def test_samples_are_not_drawn_in_trials_unless_asked_for(command, tmp_path, stand_in):
    assert tune.main([*command, "--trials=1"]) == cli.DONE
    assert "--sample_every=0" in starts(tmp_path, 0)[0]


# Workers.


def test_two_workers_share_a_study_and_no_trial_is_run_twice_or_drawn_alike(command, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN_PAUSE", "0.05")
    with worker([*command, "--trials=8"]) as other:
        wait_for(lambda: starts(tmp_path, 0))
        assert tune.main([*command, "--trials=8"]) == cli.DONE
        stderr = other.communicate(timeout=300)[1]
    assert other.returncode == cli.DONE, stderr
    assert set(states(tmp_path)) <= {"COMPLETE", "PRUNED"} and len(states(tmp_path)) == 8
    assert [len(starts(tmp_path, number)) for number in range(8)] == [1] * 8
    assert len({trial.params["learning_rate"] for trial in study_of(tmp_path)}) == 8
    assert 2 <= len(re.findall(r"trial \d+: {", stderr)) <= 6, "one of them did next to nothing"


def test_a_trial_whose_worker_was_killed_goes_on_with_the_same_settings(command, tmp_path, stand_in, monkeypatch):
    command += ["--seconds_per_trial=10"]
    metrics = tune.run_dir(tmp_path / "study", 0) / "metrics.jsonl"
    with worker([*command, "--trials=2"], STAND_IN_PAUSE="0.3") as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4)
        (child,) = children(process.pid)
    wait_for(lambda: not alive(child))
    assert states(tmp_path) == ["RUNNING"]
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")  # fewer updates would fit now
    assert_goes_on(command, tmp_path)


def test_a_signal_stops_the_trial_and_the_same_command_goes_on_with_it(command, tmp_path, stand_in, monkeypatch):
    metrics = tune.run_dir(tmp_path / "study", 0) / "metrics.jsonl"

    def stop():
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as slow:
        slow.setenv("STAND_IN_PAUSE", "0.1")
        stopper = threading.Thread(target=stop)
        stopper.start()
        assert tune.main([*command, "--trials=2"]) == cli.STOPPED
        stopper.join()
    assert states(tmp_path) == ["RUNNING"]
    assert_goes_on(command, tmp_path)


def assert_goes_on(command: list[str], tmp_path: Path) -> None:
    """With the one trial that was cut short, and another one."""
    assert tune.main([*command, "--trials=2"]) == cli.DONE
    assert states(tmp_path) == ["COMPLETE", "COMPLETE"]
    before, after = (start.partition(" ")[2] for start in starts(tmp_path, 0))
    assert before == after, "it went on with other settings"
    lines = (tune.run_dir(tmp_path / "study", 0) / "metrics.jsonl").read_text().count("\n")
    assert lines == 20, "it began anew"
    assert len(starts(tmp_path, 1)) == 1


def test_a_study_is_held_to_its_terms_and_a_longer_one_goes_on(command, tmp_path, stand_in):
    assert tune.main([*command, "--trials=1"]) == cli.DONE
    assert "was begun with another flags: give its own" in refusal(tune.main, *command[1:], "--hidden_size=9")
    assert "another seconds_per_trial: give" in refusal(tune.main, *command[1:], "--seconds_per_trial=9")
    assert tune.main([*command, "--trials=2"]) == cli.DONE
    write(tmp_path / "space.toml", SPACE.replace("16", "32"))
    assert "another space: give its own, or another study_dir" in refusal(tune.main, *command[1:])
    assert len(states(tmp_path)) == 2


def test_without_optuna_one_line_says_how_to_have_it(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert refusal(tune.main, *command[1:]).endswith("not installed: pip install 'charlstm[tune]'")
    assert not (tmp_path / "study").exists()


def test_a_report_that_cannot_be_written_is_refused_before_the_study(command, tmp_path, monkeypatch):
    missing = tmp_path / "none"
    assert f"there is no directory {missing}" in refusal(tune.main, *command[1:], f"--report={missing / 'a.html'}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sentence = refusal(tune.main, *command[1:], f"--report={tmp_path / 'a.html'}")
    assert sentence.endswith("pip install 'charlstm[compare]'") and not (tmp_path / "study").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_updates_are_timed_ends_the_worker_as_it_ends_others(number, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "run_child", lambda *args, **options: trials.Ended(143, number, False, ""))
    with pytest.raises(KeyboardInterrupt, match=str(int(number))):  # of a process that is not attached
        trials.num_steps_within(1.0, [], tmp_path / "trial.txt", {})


def test_a_space_and_a_place_are_required(command):
    assert "--space and --study_dir are required" in refusal(tune.main, *command[1:-1])


def test_a_trial_is_shown_by_the_step_that_its_process_is_at(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(trials, "bar", lambda: lambda *what: shown.append(what))
    look = trials.following("trial 3", tmp_path, 1000)
    assert not look()  # there is no heartbeat yet
    (tmp_path / "heartbeats").mkdir()
    for number, step in ((1, 250), (0, 240)):
        words = {"process": number, "time": 0, "step": step}
        (tmp_path / "heartbeats" / f"process-{number}.json").write_text(json.dumps(words))
    assert not look()
    assert shown == [("trial 3", 240, 1000)]
