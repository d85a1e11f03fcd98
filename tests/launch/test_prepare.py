"""`python -m launch.prepare` as a program."""

import os
import subprocess
import sys

import pytest

from data_pipeline import shards
from launch import prepare
from launch.support import cli, flags
from tests.conftest import ROOT
from tests.data_pipeline.build.test_prepare import POEM
from tests.launch.conftest import refusal

# Ctrl-C at a terminal comes to all processes that were started in it; those of the pool may not even have begun.
INTERRUPTED = """
if __name__ == "__main__":
    from data_pipeline import signals
    signals.attach("launch.prepare", "; the same command goes on")
import os, runpy, signal, time
import data_pipeline.build.encode, data_pipeline.progress
def interrupt(doing, done, total):
    if doing == "indexing":
        os.killpg(0, signal.SIGINT)
        time.sleep(30)
if __name__ == "__main__":
    data_pipeline.build.encode.SMALL = 0
    data_pipeline.progress.bar = lambda: interrupt
    runpy.run_module("launch.prepare", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("workers", [1, 2], ids=["threads", "processes"])
def test_a_preparation_that_is_interrupted_says_in_one_line_how_to_go_on(workers, tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    options = (f"--input={tmp_path}/a.txt", f"--output={tmp_path}/out", f"--cache_dir={tmp_path}/cache")
    options += ("--vocabulary=characters", f"--workers={workers}")
    command, environment = (
        [sys.executable, str(tmp_path / "interrupted.py"), *options],
        os.environ | {"PYTHONPATH": ROOT},
    )
    # Its stderr ends when the last of its processes has ended.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True, timeout=300)
    said = done.stderr.splitlines()
    assert (done.returncode, said[1:]) == (130, ["launch.prepare: interrupted; the same command goes on"]), said
    assert said[0].startswith(f"preparing {tmp_path}/a.txt: ")
    assert run(*options).returncode == 0


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_program_prepares_verifies_and_does_nothing_twice(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    out = tmp_path / "out"
    options = (
        f"--input={tmp_path}/*.txt",
        f"--output={out}",
        f"--cache_dir={tmp_path}/cache",
        "--vocabulary=characters",
    )
    first = run(*options)
    assert first.returncode == 0 and first.stdout == ""
    assert first.stderr.splitlines() == [
        f"preparing {tmp_path}/*.txt: 1 file, 1,440 bytes",
        f"prepared: {out}, 19 symbols in the vocabulary, train 936, valid 52, test 52",
    ]
    again = run(*options, "--verify")
    assert again.returncode == 0 and again.stderr.startswith(f"already prepared and verified: {out}")
    data = bytearray((out / "valid-00000.ids").read_bytes())
    data[-1] ^= 1
    (out / "valid-00000.ids").write_bytes(data)
    damaged = run(f"--output={out}", "--verify")
    assert (damaged.returncode, damaged.stderr.count("\n")) == (2, 1) and "valid-00000.ids is damaged" in damaged.stderr


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--inptu=x", "--output=y"], "unknown flag --inptu; did you mean input?"),
        (["--input", "a.txt", "b.txt", "--output=y"], "unexpected argument 'b.txt'"),
        (["--input=/no/such", "--output=y"], "/no/such does not exist"),
        (["--output=/no/such", "--verify"], "/no/such is not a prepared corpus: it has no manifest.json"),
        (["--output=y"], "--input, or --train, must name a text"),
        (["--output=", "--input=x"], "--output is required: name the directory to make"),
        (["--output=", "--verify"], "--output is required: name the directory to make"),
        (["--output=x", "--verify", "--join"], "--input, or --train, must name a text"),
        (
            ["--output=", "--cache=list", "--verify"],
            "--cache=list is given with something to prepare or verify: leave one out",
        ),
        (
            ["--input=x", "--output=y", "--min_count=2"],
            "min_count=2 is of characters: give --vocabulary=characters, or",
        ),
        (
            ["--input=x", "--output=y", "--vocabulary=characters", "--vocabulary_of=z", "--min_count=2"],
            "min_count=2 chooses among counted characters, and --vocabulary_of=z has chosen: leave one out",
        ),
        (
            ["--train=x", "--output=y", "--test_fraction=0.1"],
            "test_fraction=0.1 divides one text, and --train names texts of their own: leave one out",
        ),
        (["--input=x", "--train=x", "--output=y"], "--input and --train are both given: leave one out"),
        (["--input=x", "--output=https://host/y"], "--output=https://host/y: a web server is for reading: name a"),
        (
            ["--input=x", "--output=y", "--vocabulary=byte"],
            "use one of bytes, characters; did you mean bytes?",
        ),
        (["--input=x", "--output=y", "--vocabulary=chars"], "use one of bytes, characters; did you mean characters?"),
        (
            ["--input=x", "--output=y", "--split=columns:3"],
            "split='columns:3' is neither contiguous, hash nor columns:BxT",
        ),
        (["--input=x", "--output=y", "--valid_fraction=1.5"], "valid_fraction=1.5 must be at least 0 and less than 1"),
    ],
)
def test_a_mistake_is_refused_in_one_line(arguments, complaint):
    assert complaint in refusal(prepare.main, *arguments)


def test_a_corpus_is_verified_with_the_patience_that_is_given(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(POEM)
    command = ["prepare", f"--output={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}"]
    assert prepare.main([*command, f"--input={tmp_path / 'a.txt'}"]) == cli.DONE
    asked, opened = [], shards.open_store
    monkeypatch.setattr(shards, "open_store", lambda where, patience: asked.append(patience) or opened(where))
    assert prepare.main([*command, "--verify", "--remote_patience=7"]) == cli.DONE
    assert asked == [7, 7]


def test_help_says_of_input_what_it_takes():
    with pytest.raises(flags.Help) as helped:
        prepare.main(["prepare", "--help"])
    text = " ".join(str(helped.value).split())
    assert "--input= A prepared directory or its URL (s3://, gs://, az://, https://); a text file" in text
    assert "instead of --input" in text and "--corpus" not in text


def test_a_full_disk_is_one_line_with_the_name_of_the_file_and_status_74(tmp_path):
    (tmp_path / "a.txt").write_text(POEM * 10)
    code = (
        "import resource, sys\n"
        "from launch import prepare; from launch.support import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "cli.run('launch.prepare', prepare.main)\n"
    )
    options = (f"--input={tmp_path}/a.txt", f"--output={tmp_path}/out", f"--cache_dir={tmp_path}/cache")
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (74, "", 2)  # with what the text is
    assert "File too large" in done.stderr and f"{tmp_path}/.out.partial/train-00000.ids cannot be used" in done.stderr
    assert run(*options).returncode == 0
