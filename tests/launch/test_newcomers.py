"""Commands as newcomers type them: a run named by its directory alone, flags of other programs, escapes, folders."""

import json
import shutil

import pytest

from charlstm.run import presets, run_directory
from launch import evaluate, prepare, sample, train
from launch.support import cli
from tests.conftest import ROOT
from tests.launch.conftest import refusal, steps
from tests.launch.test_begun import Killed, dies_before_it_trains  # noqa: F401


def digest(run_dir) -> str:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["state_digest"]


def test_a_run_goes_on_by_its_directory_alone_with_the_bits_of_one_that_was_not_cut_short(copied, trained):
    for step in ("30", "40"):
        shutil.rmtree(copied / "checkpoints" / step)
    before = run_directory.read(copied)[0]
    assert train.main(["train", f"--run_dir={copied}", "--log_every=5"]) == cli.DONE
    assert digest(copied) == digest(trained)
    after = run_directory.read(copied)[0]
    assert after.model == before.model and after.corpus == before.corpus and after.training.log_every == 5


@pytest.mark.parametrize("more", [[], ["--num_steps=50"], ["--dry_run"]])
def test_a_mistyped_directory_is_not_taken_for_a_new_run_on_some_text(more, tmp_path):
    said = refusal(train.main, f"--run_dir={tmp_path / 'mien'}", *more)
    assert "mien is no run to go on with: a new one wants a text, such as --corpus=my.txt" in said
    assert not list(tmp_path.iterdir())


def test_it_may_go_further_and_keeps_what_was_changed(copied):
    assert train.main(["train", f"--run_dir={copied}", "--num_steps=42", "--log_every=3"]) == cli.DONE
    assert train.main(["train", f"--run_dir={copied}", "--num_steps=43"]) == cli.DONE
    assert max(steps(copied)) == 43 and run_directory.read(copied)[0].training.log_every == 3


def test_a_setting_that_is_not_the_runs_own_is_refused(copied):
    assert "was started with other settings (hidden_size: 8 -> 16)" in refusal(
        train.main, f"--run_dir={copied}", "--hidden_size=16"
    )


def test_what_is_given_is_held_against_the_runs_own_settings_and_not_the_defaults(copied, arguments, folder, tmp_path):
    before = run_directory.read(copied)[0]
    for given in ("--num_steps=44", "--cell=lstm"):
        sentence = refusal(train.main, f"--run_dir={copied}", "--stop_after=3", given)
        assert "stop_after=3" in sentence and "evaluate_every=0" in sentence
    assert run_directory.read(copied)[0] == before
    parts = {name: tmp_path / f"{name}.txt" for name in ("train", "valid", "elsewhere")}
    for path in parts.values():
        shutil.copy(folder / "text.txt", path)
    run = f"--run_dir={tmp_path / 'run'}"
    texts = ("--corpus=", f"--train={parts['train']}", f"--valid={parts['valid']}")
    assert train.main(["train", *arguments, *texts, run, "--num_steps=1"]) == cli.DONE
    moved = ["train", run, f"--valid={parts['elsewhere']}", "--num_steps=2"]
    assert train.main(moved) == cli.DONE
    assert run_directory.read(tmp_path / "run")[0].corpus.valid == str(parts["elsewhere"])


@pytest.mark.long
def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on_by_its_directory(
    copied,
    trained,
    arguments,
    tmp_path,
    dies_before_it_trains,  # noqa: F811
):
    run = [*arguments, f"--run_dir={tmp_path / 'run'}", f"--initial_checkpoint={copied}", "--num_steps=2"]
    with pytest.raises(Killed):
        train.main(["train", *run])
    assert train.main(["train", f"--run_dir={tmp_path / 'run'}"]) == cli.DONE
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"starting again from the parameters of step 40 of {copied}" in log and "finished: 2 steps" in log


def test_a_new_run_without_a_preset_is_told_of_one_and_a_resumed_one_is_not(arguments, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(presets, "suggestion", lambda *about: asked.append(about) or "take the small one")
    for last in (1, 2):
        assert train.main(["train", *arguments, f"--run_dir={tmp_path / 'run'}", f"--num_steps={last}"]) == cli.DONE
    ((config, symbols, vocabulary_size, _),) = asked
    assert (config.model.hidden_size, symbols, vocabulary_size) == (8, 6930, 256)
    assert (tmp_path / "run" / "log.txt").read_text().count(" take the small one\n") == 1


@pytest.mark.parametrize(
    ("main", "flag", "meant"),
    [
        (train.main, "--lr=0.1", "learning_rate"),
        (train.main, "--start=x", "sample_prompt"),
        (sample.main, "--start=x", "prompt"),
        (train.main, "--config=configs/tiny.flags", "flagfile"),
        (train.main, "--preset=small", "flagfile"),
        (train.main, "--data=x", "corpus"),
        (prepare.main, "--corpus=x", "input"),
        (evaluate.main, "--model=x", "run_dir"),
    ],
)
def test_a_flag_of_other_programs_is_told_its_name_here(main, flag, meant):
    name = flag.partition("=")[0]
    assert refusal(main, flag) == f"unknown flag {name}: it is called --{meant} here"


def test_epochs_are_no_steps():
    assert refusal(train.main, "--epochs=3").startswith(
        "unknown flag --epochs: a run's length is --num_steps; --dry_run"
    )


def test_a_backslash_and_an_n_in_a_prompt_is_said_not_to_be_a_line_break(trained, capsys):
    assert sample.main(["sample", f"--run_dir={trained}", r"--prompt=a\nb", "--length=3"]) == cli.DONE
    said = capsys.readouterr()
    assert r"for a line break write --prompt=$'a\nb', which is 'a\nb'" in said.err
    assert said.out.startswith(r"a\nb")


def test_a_recipe_named_from_another_folder_is_refused_with_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named in ("configs/tiny.flags", "tiny", "configs/tinny.flag"):
        said = refusal(train.main, f"--flagfile={named}")
        assert said.endswith(f"; --flagfile={ROOT / 'configs' / 'tiny.flags'} is there")


def test_a_dry_run_without_a_preset_names_one(arguments, monkeypatch, capsys):
    monkeypatch.setattr(presets, "suggestion", lambda *about: "take the small one")
    assert train.main(["train", *arguments, "--dry_run"]) == cli.DONE
    assert capsys.readouterr().out.endswith("\ntake the small one\n")
