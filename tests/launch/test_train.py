"""The training program as a user meets it: what lies in a run directory, what the terminal shows, what comes again."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import corpus, digest, run_directory, sealing
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from data_pipeline.streams import StreamPlan
from launch import train
from launch.support import cli, flags
from launch.support.train_flags import TrainFlags
from tests.compiling import xla_flags
from tests.conftest import ROOT

COLUMNS = 100
KEYS = {
    "step", "epoch", "split", "bits_per_symbol", "bits_per_character", "bits_per_byte", "learning_rate", "grad_norm",
    "symbols_per_second", "input_wait", "scored_symbols", "time", "seconds",
}  # fmt: skip
SETTINGS = (
    "--batch_size=8", "--window=16", "--num_layers=1", "--hidden_size=8", "--embedding_size=4", "--num_steps=20",
    "--log_every=6", "--evaluate_every=8", "--checkpoint_every=5", "--keep_checkpoints=9", "--eval_chunk=256",
    "--burn_in=16", "--sample_every=0", "--logical_shards=8", "--vocabulary=characters",
)  # fmt: skip

SLOW = "the "  # of the line that says how long the steps take, where the machine is slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("train")
    text = "".join(np.random.default_rng(0).choice(list("abcd é€\n"), 4000))
    (path / "text.txt").write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def arguments(folder) -> tuple[str, ...]:
    return (*SETTINGS, f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}")


def on_terminal(*command: str) -> tuple[int, str]:
    """The exit status of a program on one device whose stdin, stdout and stderr are a terminal, and what it wrote."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written, until = b"", time.monotonic() + 300
    try:
        while time.monotonic() < until:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            written += part
        return started.wait(300), written.decode().replace("\r\n", "\n")
    finally:
        started.kill()
        os.close(ours)


def frames(written: str, columns: int) -> list[list[str]]:
    """What the terminal shows after each carriage return or line feed; nothing may reach beyond its last column."""
    lines, column, shown = [""], 0, []
    for character in written:
        if character in "\r\n":
            shown.append([line.rstrip() for line in lines])
            column = 0
            if character == "\n":
                lines.append("")
        else:
            assert character.isprintable() and column < columns, (character, lines[-1])
            lines[-1] = lines[-1].ljust(column)[:column] + character + lines[-1][column + 1 :]
            column += 1
    return [*shown, [line.rstrip() for line in lines]]


@pytest.fixture(scope="module")
def written(folder, arguments) -> str:
    """What was written to a terminal while the run of `trained` was made on it."""
    # The corpus is there before, so that its progress bar is no part of it.
    (config,), _ = flags.parse(["train", *arguments], "", Config())
    corpus.open_for(config, [])
    command = (sys.executable, "-m", "launch.train", *arguments, f"--run_dir={folder / 'run'}")
    status, written = on_terminal(*command)
    assert status == cli.DONE, written
    return written


@pytest.fixture(scope="module")
def trained(written, folder) -> Path:
    return folder / "run"


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# The run directory.


def test_a_run_directory_has_the_documented_files_and_no_other(trained):
    documented = {"config.json", "flags.txt", "identity.json", "log.txt", "metrics.jsonl", "checkpoints"}
    assert {path.name for path in trained.iterdir()} == documented
    steps = {path.name for path in (trained / "checkpoints").iterdir()}
    assert steps == {"5", "8", "10", "15", "16", "20"}
    for step in steps:
        sealing.verify(trained / "checkpoints" / step)


def test_config_json_has_every_setting_of_the_command_and_the_numbers_that_a_zero_stood_for(trained, arguments):
    (wanted,), _ = flags.parse(["train", *arguments], "", Config())
    config, _ = run_directory.read(trained)
    assert config == config_lib.fill_automatic(wanted, 1)
    assert (config.training.logical_shards, config.optimizer.decay_steps) == (8, 20)


def test_flags_txt_is_a_flagfile_that_means_the_same_run(trained, arguments):
    (wanted,), _ = flags.parse(["train", *arguments], "", Config())
    (found, config), _ = flags.parse(["train", f"--flagfile={trained / 'flags.txt'}"], "", TrainFlags(), Config())
    assert config == wanted
    assert found.run_dir == str(trained)


def test_identity_json_has_the_vocabulary_and_the_fingerprint_of_the_text(trained):
    identity = json.loads((trained / "identity.json").read_text())
    _, read = run_directory.read(trained)
    assert identity.keys() == {"vocabulary", "corpus_fingerprint"}
    assert set("abcd é€\n") == {read.vocabulary.decode(np.array([i])) for i in range(1, read.vocabulary.size)}
    assert re.fullmatch("[0-9a-f]{64}", identity["corpus_fingerprint"])


def test_the_lines_of_metrics_are_of_the_documented_keys_at_the_steps_asked_for(trained):
    lines = lines_of(trained)
    assert [(line["step"], line["split"]) for line in lines] == [
        (6, "train"), (8, "valid"), (12, "train"), (16, "valid"), (18, "train"), (20, "train"), (20, "valid"),
    ]  # fmt: skip
    assert [line.keys() for line in lines] == [KEYS] * 6 + [KEYS | {"state_digest"}]
    steps_per_epoch = StreamPlan(3600, 8, 16).steps_per_epoch
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] / steps_per_epoch, abs=1e-4)
        assert 0 < line["bits_per_symbol"] < 6 and line["symbols_per_second"] > 0
        assert line["bits_per_character"] == line["bits_per_symbol"]
        assert (line["bits_per_byte"] is None) == (line["split"] == "train")  # the text is not ASCII
        if line["split"] == "train":
            assert line["learning_rate"] == pytest.approx(0.002) and line["grad_norm"] > 0
            assert 0 <= line["input_wait"] <= 1
        else:
            assert (line["learning_rate"], line["grad_norm"], line["input_wait"]) == (None, None, None)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_the_digest_of_the_last_line_is_that_of_the_last_checkpoint(trained):
    config, identity = run_directory.read(trained)
    mesh = distributed.make(jax.devices()[:2])
    with Checkpoints(trained / "checkpoints", writable=False, log=print) as checkpoints:
        state, meta = checkpoints.restore(train_state.abstract(config, identity.vocabulary.size, mesh))
    assert meta["step"] == int(state.step) == 20
    assert lines_of(trained)[-1]["state_digest"] == digest.state_digest(state)


def test_the_checkpoints_of_validated_steps_have_their_scores(trained):
    scores = {line["step"]: line["bits_per_symbol"] for line in lines_of(trained) if line["split"] == "valid"}
    with Checkpoints(trained / "checkpoints", writable=False, log=print) as checkpoints:
        saved = {step: checkpoints.read_meta(step)["bits_per_symbol"] for step in checkpoints.steps()}
    assert saved == dict.fromkeys((5, 10, 15)) | scores
    assert scores.keys() == {8, 16, 20}


def test_log_txt_tells_the_run_in_plain_lines(trained):
    lines = (trained / "log.txt").read_text("utf-8").splitlines()
    stamps, texts = zip(*((line[:20], line[20:]) for line in lines), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", stamp) for stamp in stamps)
    assert re.fullmatch(r"text: text-\w+, 1 file of [\d.]+ KB: 3,600 symbols to train on, of 9 characters", texts[0])
    assert texts[1].startswith("model: lstm, 1 x 8, ") and texts[1].endswith(" parameters; 0.71 epochs of the text")
    assert texts[2].startswith("training on 1 x cpu in 1 process: step 0 of 20, ")
    assert re.fullmatch(r"finished: 20 steps, \w+ in this process", texts[-1])
    told = [
        re.match(r"step \d+(?:/20)?(?=  epoch|: validation)", text) for text in texts[3:-1] if not text.startswith(SLOW)
    ]
    assert [each and each.group() for each in told] == [
        "step 6/20", "step 8", "step 12/20", "step 16", "step 18/20", "step 20/20", "step 20",
    ]  # fmt: skip
    assert not re.search(r"[^\n -~]", "\n".join(lines))


# The terminal.


def test_a_terminal_shows_one_live_line_under_the_plain_ones_and_leaves_the_plain_ones(written):
    on_screen = frames(written, COLUMNS)
    live = re.compile(
        r"step (\d+)/20  epoch \d+\.\d\d  \d\.\d{3} bpc  [\d,]+ chars/s  ETA \w+  input wait \d+%|"
        r"step (\d+): evaluating the validation split, \d+%(?:, \w+ left)?"
    )
    shown = []
    for *above, foot in on_screen:
        assert not any(live.fullmatch(line) for line in above), above
        if match := live.fullmatch(foot):
            shown.append(int(match.group(1) or match.group(2)))
    assert len(set(shown)) > 10 and shown == sorted(shown)
    plain = [line for line in on_screen[-1] if not line.startswith(("compiling", "text: ", "model: ", SLOW))]
    first, *validations, last, after = plain
    assert first.startswith("training on 1 x cpu")
    assert [re.match(r"step \d+: validation ", line).group() for line in validations] == [
        f"step {step}: validation " for step in (8, 16, 20)
    ]
    assert last.startswith("finished: 20 steps, ") and after == ""


# The same command again.


def test_the_same_command_after_the_end_says_finished_and_changes_nothing_but_the_log(trained, arguments, capsys):
    before, log = tree(trained), (trained / "log.txt").read_text()
    assert train.main(["train", *arguments, f"--run_dir={trained}"]) == cli.DONE
    again = capsys.readouterr()
    assert again.out == ""
    said = [line for line in again.err.splitlines() if not line.startswith("compiling")]
    assert said == [
        "continuing from the checkpoint of step 20",
        "finished: the run is at step 20, and num_steps=20; a larger --num_steps goes on",
    ]
    after = tree(trained)
    assert {name: content for name, (content, _) in after.items() if name != "log.txt"} == {
        name: content for name, (content, _) in before.items() if name != "log.txt"
    }
    checkpoints = [name for name in before if name.startswith("checkpoints/")]
    assert checkpoints and {name: after[name] for name in checkpoints} == {name: before[name] for name in checkpoints}
    appended = (trained / "log.txt").read_text().removeprefix(log)
    assert [line[20:] for line in appended.splitlines()] == said
