"""The grid of bounds on the cell state: its models, what is run again, and its table."""

import json
import shutil
import subprocess

import pytest

from benchmarks import capping
from benchmarks.capping import BOUNDS, Cell
from benchmarks.rows import Rows
from charlstm.run import estimate
from launch.support import train_flags

CELLS = capping.grid(["play"], [1, 2])


def test_all_models_have_as_many_parameters_and_the_bounds_that_their_names_say():
    counts = []
    for cell in CELLS:
        config = train_flags.parse(["train", *capping.settings(cell, 100_000)])[3]
        counts.append(estimate.count_parameters(config, 256))
        assert config.model.cap_input_gate == (cell.bound == "capped") and config.model.num_layers == cell.layers
        assert config.streams.reset_probability == {"long": 0, "short": 0.25}[cell.carried]
    assert 97_000 < min(counts) <= max(counts) <= 100_000


def test_a_text_is_named_by_itself_or_by_hand():
    assert capping.name_of("a/play.txt.xz") == ("play", ["--corpus=a/play.txt.xz"])
    assert capping.name_of("books=t.txt:v.txt") == ("books", ["--train=t.txt", "--valid=v.txt"])


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """What would be trained."""
    found: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: found.append(command))
    return found


def test_what_is_finished_is_not_trained_again_and_stands_in_the_table(trained, commands, tmp_path, capsys):
    done = Cell("play", "float32", 1, "long", "capped")
    shutil.copytree(trained, tmp_path / "100000-8-0" / done.directory)
    (tmp_path / "100000-8-0" / done._replace(bound="plain").directory).mkdir()
    rows = Rows("capping", measured=False)
    capping.run(rows, False, "play", str(tmp_path), "1,2", 100_000, 8, 0.0, 0)
    assert len(commands) == len(CELLS) - 1 and not any(done.directory in command[-1] for command in commands)
    row = json.loads(capsys.readouterr().out)
    assert (
        2 < row.pop("capped") < 4
        and [row.pop(bound.replace(" ", "_")) for bound in BOUNDS if bound != "capped"] == [None] * 3
    )
    assert row["text"] == "play" and row["layers"] == 1 and row["carried"] == "long"


def test_an_interrupt_ends_the_grid_with_the_table_of_what_is_there(trained, monkeypatch, tmp_path, capsys):
    def interrupt(*command, check):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    shutil.copytree(trained, tmp_path / "100000-8-0" / CELLS[-1].directory)
    capping.run(Rows("capping", measured=False), False, "play", str(tmp_path), "1,2", 100_000, 8, 0.0, 0)
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
