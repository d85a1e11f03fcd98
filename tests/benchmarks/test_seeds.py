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


def test_what_is_missing_is_trained_and_the_mean_and_range_of_all_seeds_are_told(trained, commands, tmp_path, capsys):
    for seed, worse in ((3, 0), (4, 0.5)):
        shutil.copytree(trained, tmp_path / f"tiny-{seed}")
        lines = (tmp_path / f"tiny-{seed}" / "metrics.jsonl").read_text().splitlines()
        changed = [record | {"bits_per_symbol": record["bits_per_symbol"] + worse} for record in map(json.loads, lines)]
        (tmp_path / f"tiny-{seed}" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed))
    best = last_line(trained)["bits_per_symbol"]
    seeds.run(Rows("seeds", measured=False), False, "tiny", "", str(tmp_path), "3,4", "")
    row = json.loads(capsys.readouterr().out)
    assert not commands and row["seeds"] == len(row["minutes"]) == 2 and row["flagfile"] == "tiny"
    assert row["validation_range"] == pytest.approx([best, best + 0.5], abs=1e-4)
    assert row["validation"] == pytest.approx(best + 0.25, abs=1e-4)
    assert row["test"] == row["test_range"][0] == row["test_range"][1]

    with pytest.raises(ValueError, match="tiny-5"):  # nothing trained it
        seeds.run(Rows("seeds", measured=False), False, "tiny", "text.txt", str(tmp_path), "3,5", "--window=9,--rnn")
    assert commands[0][3:-2] == [
        f"--flagfile={seeds.CONFIGS / 'tiny'}.flags",
        "--corpus=text.txt",
        "--window=9",
        "--rnn",
    ]
    assert commands[0][-2:] == ["--seed=5", f"--run_dir={tmp_path / 'tiny-5'}"]
