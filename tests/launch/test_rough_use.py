"""What is done to a run that is no mistake in its flags: its window closed, itself started twice, its text moved."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from charlstm.run import run_lock, sealing, step_directory
from launch import evaluate, train
from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.jobs import last_line
from tests.launch.conftest import process, refusal, tree


@pytest.mark.long
def test_a_run_goes_on_when_the_terminal_it_was_started_in_goes_away(trained, arguments, tmp_path):
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    command = [sys.executable, "-m", "launch.train", *arguments, "--logical_shards=8", f"--run_dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert any("training on" in line for line in running.stderr)
        running.stderr.close()
        assert running.wait(timeout=300) == cli.DONE
    assert last_line(tmp_path / "run")["state_digest"] == last_line(trained)["state_digest"]
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert " step 40: validation " in log[-2] and " finished: 40 steps" in log[-1]


@pytest.mark.long
@pytest.mark.parametrize("closed", ["2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_outputs_stop_no_training(closed, arguments, tmp_path):
    command = f'exec "$0" -m launch.train "$@" {closed}'
    run = [*arguments, "--num_steps=2", f"--run_dir={tmp_path / 'run'}"]
    done = process("sh", "-c", command, sys.executable, *run)
    assert done.returncode == cli.DONE, done
    assert last_line(tmp_path / "run")["step"] == 2


def test_a_second_job_in_a_run_directory_is_refused_while_the_first_lives_and_no_longer(
    copied,
    arguments,
    tmp_path,
):
    go_on = (*arguments, f"--run_dir={copied}", "--num_steps=41")
    holder = "import sys, time; from pathlib import Path; from charlstm.run import run_lock\n"
    holder += "with run_lock.lock_run_directory(Path(sys.argv[1])): print('held', flush=True); time.sleep(1000)"
    before = {name: content for name, content in tree(copied).items() if name != run_lock.LOCK}
    with subprocess.Popen([sys.executable, "-c", holder, copied], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"
            assert f"is in use by process {first.pid} on " in refusal(train.main, *go_on)
        finally:
            first.send_signal(signal.SIGKILL)
    assert {name: content for name, content in tree(copied).items() if name != run_lock.LOCK} == before
    assert train.main(["train", *go_on]) == cli.DONE
    assert not (copied / run_lock.LOCK).exists()


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.txt", "/r*/*/log.*"])
def test_a_run_directory_inside_of_its_text_is_refused(arguments, tmp_path, pattern):
    (tmp_path / "a.txt").write_text("some text\n" * 500)
    inside = (f"--corpus={tmp_path}{pattern}", f"--run_dir={tmp_path / 'runs' / 'mine'}")
    assert f"lies inside of the corpus {tmp_path}{pattern}: name one outside" in refusal(
        train.main, *arguments, *inside
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_text_named_from_one_directory_is_found_from_another(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text that is long enough\n" * 300)
    monkeypatch.chdir(tmp_path)
    run = (*arguments, "--corpus=a.txt", "--num_steps=2", "--logical_shards=1", f"--run_dir={tmp_path / 'run'}")
    assert train.main(["train", *run, "--logical_shards=8"]) == cli.DONE
    monkeypatch.chdir(ROOT)
    assert evaluate.main(["evaluate", f"--run_dir={tmp_path / 'run'}"]) == cli.DONE
    assert "bits per byte" in capsys.readouterr().out


def test_a_text_of_two_names_is_refused(folder, arguments, tmp_path):
    both = (f"--train={folder / 'other.txt'}", f"--run_dir={tmp_path / 'run'}")
    assert "are both given: leave one out" in refusal(train.main, *arguments, *both)
    assert train.main(["train", *arguments, *both, "--corpus=", "--num_steps=2"]) == cli.DONE  # over a flagfile's


def test_a_continuation_that_is_refused_changes_no_setting(copied, arguments):
    for step in step_directory.StepDirectory(copied / "checkpoints").steps():
        (copied / "checkpoints" / str(step) / sealing.SEAL).write_text("{")
    before = (copied / "config.json").read_bytes()
    assert "is whole" in refusal(train.main, *arguments, f"--run_dir={copied}", "--num_steps=65")
    assert (copied / "config.json").read_bytes() == before


def test_metrics_that_a_failing_disk_left_do_not_stop_a_run(copied, arguments):
    path = copied / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'[1, 2]\n{"step": "x"}\n\xff\xfe\n')
    assert train.main(["train", *arguments, f"--run_dir={copied}", "--num_steps=42"]) == cli.DONE
    assert last_line(copied)["step"] == 42


def test_a_run_that_goes_on_beyond_the_end_of_its_decay_says_so(arguments, capsys, tmp_path):
    run = (*arguments, "--schedule=cosine", "--final_fraction=0.5", "--num_steps=2", f"--run_dir={tmp_path / 'run'}")
    assert train.main(["train", *run]) == cli.DONE
    assert "the learning rate is" not in capsys.readouterr().err
    assert train.main(["train", *run]) == cli.DONE
    finished = "a larger --num_steps goes on, at a learning rate of 0.005: for another decay begin a new run"
    assert finished in capsys.readouterr().err
    said = (
        "the learning rate is 0.005 from step 2 on, for 50% of the 4 steps, as decay_steps=2: for a decay over 4 steps "
        "begin a new run"
    )
    assert train.main(["train", *run, "--num_steps=4", "--dry_run"]) == cli.DONE
    table = capsys.readouterr().out
    assert said in table and re.search(r"^ETA +\w+: 2 steps left \w+, evaluations \(1\)", table, re.M)
    assert train.main(["train", *run, "--num_steps=4"]) == cli.DONE
    assert said in capsys.readouterr().err


def test_a_dry_run_of_a_run_that_is_there_refuses_what_the_run_would(arguments, capsys, tmp_path):
    run = (*arguments, "--num_steps=2", f"--run_dir={tmp_path / 'run'}")
    assert train.main(["train", *run]) == cli.DONE
    assert "started with other settings (seed: " in refusal(train.main, *run, "--seed=7", "--dry_run")
    capsys.readouterr()
    assert train.main(["train", f"--run_dir={tmp_path / 'run'}", "--dry_run"]) == cli.DONE
    assert re.search(r"^ETA +0s: steps 0s, evaluations \(0\) 0s, saves \(0\) 0s$", capsys.readouterr().out, re.M)


def test_a_decay_that_ends_long_before_the_run_is_said_when_it_starts_and_by_a_dry_run(arguments, capsys, tmp_path):
    run = (*arguments, "--schedule=cosine", "--decay_steps=1", "--num_steps=3", f"--run_dir={tmp_path / 'run'}")
    said = "the learning rate is 0 from step 1 on, for 67% of the 3 steps, which learn nothing, as decay_steps=1"
    assert train.main(["train", *run, "--dry_run"]) == cli.DONE
    assert re.search(rf"^learning rate +0\.01, cosine; {said}", capsys.readouterr().out, re.M)
    assert train.main(["train", *run]) == cli.DONE
    assert said in capsys.readouterr().err and said in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.long
def test_a_run_of_one_device_goes_on_on_eight_with_the_fast_reduction_and_not_otherwise(
    arguments,
    tmp_path,
):
    run = (*arguments, "--num_steps=2", f"--run_dir={tmp_path / 'run'}")
    done = process(sys.executable, "-m", "launch.train", *run)
    assert done.returncode == cli.DONE, done.stderr
    more = (*run, "--num_steps=4")
    refused = refusal(train.main, *more)
    assert "logical_shards=1 cannot be split exactly over 8 devices: use 1 devices, or --reduction=fast" in refused
    assert train.main(["train", *more, "--reduction=fast"]) == cli.DONE
    assert last_line(tmp_path / "run")["step"] == 4


def test_what_no_machine_can_hold_is_refused_before_it_is_tried(arguments, tmp_path):
    huge = (*arguments, "--hidden_size=2000000", f"--run_dir={tmp_path / 'run'}")
    assert "of memory on this machine" in refusal(train.main, *huge)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_devices_that_are_not_there_are_one_sentence(arguments, tmp_path):
    command = ("env", "JAX_PLATFORMS=cuda", sys.executable, "-m", "launch.train")
    refused = process(*command, *arguments, f"--run_dir={tmp_path / 'run'}")
    assert (refused.returncode, refused.stdout) == (cli.MISTAKE, "")
    assert refused.stderr.startswith("launch.train: there are no devices: ") and refused.stderr.count("\n") == 1
    assert not Path(tmp_path / "run").exists()
