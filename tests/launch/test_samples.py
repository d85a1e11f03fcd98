"""Samples as training goes on: kept and shown, the text of launch.sample, and nothing that training notices."""

import json
import re
import shutil
import time

import pytest

from launch import sample, train
from launch.support import cli
from tests.launch.conftest import refusal

FLAGS = ("--sample_every=15", "--sample_prompt=abc", "--sample_length=40", "--sample_temperature=0.7")
KEYS = {"step", "time", "prompt", "text", "bits_per_symbol"}


def lines(run_dir, name="samples.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def texts(run_dir) -> list[dict]:
    return [line | {"time": 0} for line in lines(run_dir)]


@pytest.fixture(scope="module")
def sampled(folder, arguments):
    """A run of 40 steps with samples of 15, 30 and 40, and when it began."""
    began, run_dir = time.time(), folder / "sampled"
    status = train.main(["train", *arguments, *FLAGS, "--keep_checkpoints=9", f"--run_dir={run_dir}"])
    assert status == cli.DONE
    return run_dir, began


def test_the_samples_of_a_run_are_kept_with_their_steps_and_shown_in_the_log(sampled):
    run_dir, began = sampled
    found = lines(run_dir)
    assert [line["step"] for line in found] == [15, 30, 40]
    for line in found:
        assert line.keys() == KEYS and line["prompt"] == "abc" and len(line["text"]) == 40
        assert began <= line["time"] <= time.time() and 0 < line["bits_per_symbol"] < 10
        (shown, *_) = re.findall(rf"step {line['step']} \| (.*)", (run_dir / "log.txt").read_text())
        first = ("abc" + line["text"]).splitlines()[0]
        assert shown == "".join(c if c.isprintable() else "?" for c in first)
    assert len({line["text"] for line in found}) == 3


def test_a_run_has_the_same_bits_with_and_without_samples(sampled, trained):
    digests = [lines(run_dir, "metrics.jsonl")[-1]["state_digest"] for run_dir in (sampled[0], trained)]
    assert digests[0] == digests[1]
    assert not (trained / "samples.jsonl").exists()


def test_a_sample_is_the_text_that_launch_sample_draws_from_the_checkpoint_of_its_step(sampled, capsys):
    run_dir, _ = sampled
    how = ("--prompt=abc", "--length=40", "--temperature=0.7", "--format=json")
    assert sample.main(["sample", f"--run_dir={run_dir}", "--checkpoint=30", *how]) == cli.DONE
    found, kept = json.loads(capsys.readouterr().out), lines(run_dir)[1]
    assert found["text"] == kept["text"]
    assert found["bits_per_byte"] == pytest.approx(kept["bits_per_symbol"])


@pytest.mark.long
def test_a_resumed_run_has_each_sample_once_and_the_very_texts(sampled, arguments, tmp_path):
    run_dir = shutil.copytree(sampled[0], tmp_path / "resumed")
    for step in ("30", "40"):  # as if it had been killed after the sample of 30 and before the save
        shutil.rmtree(run_dir / "checkpoints" / step)
    again = ("--keep_checkpoints=9", f"--run_dir={run_dir}")
    assert train.main(["train", *arguments, *FLAGS, *again]) == cli.DONE
    assert texts(run_dir) == texts(sampled[0])


def test_a_prompt_that_the_vocabulary_lacks_is_refused_before_training(arguments, tmp_path):
    flags = (*arguments, "--vocabulary=characters", "--sample_every=9", "--sample_prompt=é")
    said = refusal(train.main, *flags, f"--run_dir={tmp_path / 'run'}")
    assert said.startswith("sample_prompt: 'é' (U+00E9)") and not (tmp_path / "run").exists()
