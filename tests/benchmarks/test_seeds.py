"""The table of what flagfiles reach with several seeds."""

import json
import shutil
import subprocess

import pytest

from benchmarks import seeds
from benchmarks.rows import Rows
from tests.jobs import last_line


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """What is trained, and not; what is scored is scored."""
    found: list[list[str]] = []
    real = subprocess.run

    def run(command, **how):
        if "launch.train" not in command:
            return real(command, **how)
        found.append(command)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_all_are_trained_to_their_end_and_the_mean_and_range_of_all_seeds_are_told(trained, commands, tmp_path, capsys):
    for seed, worse in ((3, 0), (4, 0.5)):
        shutil.copytree(trained, tmp_path / f"tiny-{seed}")
        lines = (tmp_path / f"tiny-{seed}" / "metrics.jsonl").read_text().splitlines()
        changed = [record | {"bits_per_symbol": record["bits_per_symbol"] + worse} for record in map(json.loads, lines)]
        (tmp_path / f"tiny-{seed}" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed))
    best = last_line(trained)["bits_per_symbol"]
    seeds.run(Rows("seeds", measured=False), False, "tiny", "", str(tmp_path), "3,4", "")
    row = json.loads(capsys.readouterr().out)
    assert [command[-2:] for command in commands] == [
        [f"--seed={seed}", f"--run_dir={tmp_path / f'tiny-{seed}'}"]
        for seed in (3, 4)  # though finished: as these?
    ]
    assert row["seeds"] == len(row["minutes"]) == 2 and row["flagfile"] == "tiny"
    assert row["validation_range"] == pytest.approx([best, best + 0.5], abs=1e-4)
    assert row["validation"] == pytest.approx(best + 0.25, abs=1e-4)
    assert row["test"] == row["test_range"][0] == row["test_range"][1]

    commands.clear()
    with pytest.raises(ValueError, match="tiny-5"):  # nothing trained it
        seeds.run(Rows("seeds", measured=False), False, "tiny", "text.txt", str(tmp_path), "3,5", "--window=9,--rnn")
    assert commands[-1][3:-2] == [
        f"--flagfile={seeds.CONFIGS / 'tiny'}.flags",
        "--corpus=text.txt",
        "--window=9",
        "--rnn",
    ]
    assert commands[-1][-2:] == ["--seed=5", f"--run_dir={tmp_path / 'tiny-5'}"]


@pytest.fixture
def flags(monkeypatch) -> list[list[str]]:
    """The flags of every run, whose row is left out."""
    found: list[list[str]] = []
    monkeypatch.setattr(seeds, "report", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: found.append(command[3:]))
    return found


def test_each_flagfile_has_the_corpus_in_its_place_and_its_own_where_none_is(flags, tmp_path):
    seeds.run(Rows("seeds"), False, "tiny,small,medium", ",a.txt", str(tmp_path), "1", "")
    assert [[flag for flag in given if flag.startswith("--corpus")] for given in flags] == [[], ["--corpus=a.txt"], []]


@pytest.mark.parametrize(("flagfiles", "corpora"), [("tiny", "a.txt,b.txt"), ("tiny,tiny", "a.txt,b.txt")])
def test_more_corpora_than_flagfiles_are_refused_and_two_of_one_flagfile(flagfiles, corpora, flags, tmp_path):
    with pytest.raises(SystemExit, match="name each flagfile once, its corpus in its place"):
        seeds.run(Rows("seeds"), False, flagfiles, corpora, str(tmp_path), "1", "")
    assert not flags


def test_quick_runs_are_not_taken_for_whole_ones(flags, tmp_path):
    for quick in (True, False):
        seeds.run(Rows("seeds"), quick, "tiny", "", str(tmp_path), "1", "")
    assert [given[-1] for given in flags] == [f"--run_dir={tmp_path}/quick/tiny-1", f"--run_dir={tmp_path}/tiny-1"]


def test_a_run_that_is_refused_ends_the_table_with_its_status(tmp_path, monkeypatch):
    def refuse(command, check):
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(SystemExit) as ended:
        seeds.run(Rows("seeds"), False, "tiny", "", str(tmp_path), "1", "")
    assert ended.value.code == 2
