"""The first start of a job: one process looks at the text and prepares it, and what goes wrong there ends all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from charlstm.config import Config, replace
from charlstm.run import corpus as corpus_lib
from data_pipeline.directory import Directory
from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.faults.by_hand import free_port
from tests.jobs import job
from tests.launch.conftest import process

# Notes which process opens the text, or asks for the size of a shard.
WATCHED = """
import os, sys
stat, file = os.stat, os.open({notes!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what):
    number = [argument for argument in sys.argv if argument.startswith("--process_id=")]
    if number:
        os.write(file, f"{{what}} {{number[0]}}\\n".encode())

def opened(event, arguments):
    if event == "open" and str(arguments[0]).endswith("text.txt"):
        note("open")

def asked(path, *arguments, **named):
    if str(path).endswith(".ids"):
        note("stat")
    return stat(path, *arguments, **named)

sys.addaudithook(opened)
os.stat = asked
"""


def test_of_two_processes_the_first_alone_opens_the_text_and_asks_for_the_sizes_of_shards(arguments, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {n * n} of a text\n" for n in range(400)))
    (tmp_path / "sitecustomize.py").write_text(WATCHED.format(notes=str(tmp_path / "notes")))
    rest = [flag for flag in arguments if not flag.startswith(("--corpus=", "--cache_dir="))]
    flags = [*rest, f"--corpus={tmp_path / 'text.txt'}", f"--cache_dir={tmp_path / 'cache'}", "--num_steps=2"]
    own = ("--processes=2", "--devices_per_process=1")
    with job(own, *flags, f"--run_dir={tmp_path / 'run'}", "--logical_shards=2", python_path=tmp_path) as running:
        _, said = running.communicate(timeout=300)
    assert running.returncode == cli.DONE, said
    notes = (tmp_path / "notes").read_text().splitlines()
    assert "open --process_id=0" in notes and not [note for note in notes if note.endswith("=1")], notes
    assert said.count("preparing ") == 1


@pytest.mark.parametrize("content", ["\x00" * 5000, "short"])
def test_a_text_that_the_first_process_refuses_ends_all_with_its_sentence(content, arguments, tmp_path):
    (tmp_path / "bad.txt").write_text(content)
    own = ("--processes=2", "--devices_per_process=1", "--restarts=3", "--")
    flags = (*arguments, f"--corpus={tmp_path / 'bad.txt'}", f"--run_dir={tmp_path / 'run'}")
    done = process(sys.executable, "-m", "launch.local", *own, *flags)
    refusals = [line for line in done.stderr.splitlines() if "launch.train: " in line]
    assert done.returncode == cli.MISTAKE and len(refusals) == 2, done.stderr
    assert "Traceback" not in done.stderr and "starting again" not in done.stderr


def test_processes_with_different_settings_are_refused_with_both_values(arguments, tmp_path):
    command = [sys.executable, "-m", "launch.train", *arguments, f"--run_dir={tmp_path / 'run'}"]
    command += [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    own = [("--process_id=0", "--learning_rate=2e-3"), ("--process_id=1", "--learning_rate=3e-3", "--read_ahead=4")]
    how = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, *flags], **how) for flags in own]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [cli.MISTAKE] * 2, said
    sentence = "process 1 has other settings than process 0 (learning_rate: 0.002 -> 0.003)"
    assert all(sentence in lines for lines in said), said
    assert not (tmp_path / "run").exists()


def test_a_prepared_corpus_is_looked_at_once_and_not_at_all_by_the_processes_that_follow(folder, trained, monkeypatch):
    sizes: list[str] = []
    size = Directory.size
    monkeypatch.setattr(Directory, "size", lambda self, name: sizes.append(name) or size(self, name))
    config = replace(Config(), corpus=str(folder / "text.txt"), cache_dir=str(folder / "cache"))
    first = corpus_lib.load(config)
    shards = sum(len(split._record.shards) for split in first.splits.values())
    assert len(sizes) == 2 * shards
    found = str(first.directory)
    monkeypatch.setattr(corpus_lib.distributed, "take_from_first", lambda act: found)
    assert corpus_lib.load(config).fingerprint == first.fingerprint
    assert len(sizes) == 2 * shards


def test_a_process_that_does_not_see_the_directory_of_the_first_prepares_one_of_its_own(
    folder, trained, tmp_path, monkeypatch
):
    config = replace(Config(), corpus=str(folder / "text.txt"), cache_dir=str(tmp_path / "own"))
    monkeypatch.setattr(corpus_lib.distributed, "take_from_first", lambda act: str(tmp_path / "elsewhere"))
    found = corpus_lib.load(config)
    assert Path(found.directory).is_relative_to(tmp_path / "own")
