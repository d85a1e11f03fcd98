"""Bad input is one sentence and exit status 2, nothing written; a full disk, a signal, a lost loss: nothing lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from charlstm import distributed
from charlstm.model.layer import CELLS
from charlstm.run import corpus as corpus_lib
from charlstm.run import run_directory, sealing
from charlstm.run.checkpoint import Checkpoints
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from launch import evaluate, train
from launch.support import cli
from launch.support.prometheus import MonitorFlags
from launch.support.services import ProgramServices
from launch.support.watchdog import WatchdogFlags
from tests.jobs import last_line
from tests.launch.conftest import SMALL, TINY, flip, process, refusal, steps, tree

# The corpus.


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        ("{}/empty.txt", "/empty.txt is empty: there is no text to prepare"),
        ("{}/empty", "/empty has no files: name a text file"),
        ("{}/no.txt", "/no.txt does not exist: name a text file"),
        ("{}/*.book", "/*.book has no files"),
        ("tinyshakespear", "did you mean the corpus named tinyshakespeare?"),
        ("", "--corpus is empty"),  # as after --corpus=$UNSET: not the text of the working directory
    ],
)
def test_an_empty_or_missing_corpus_is_refused(corpus, sentence, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    run = (f"--corpus={corpus.format(tmp_path)}", f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={tmp_path / 'run'}")
    assert sentence in refusal(train.main, TINY, *SMALL, *run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--window=1000"], "6930 symbols is too short for batch_size=16 windows of window=1000: needs at least 16000"),
        (["--batch_size=100"], "batch_size=100 cannot be split over 8 devices: use 96 or 104"),
        (["--batch_size=4"], "batch_size=4 cannot be split over 8 devices: use 8"),
        (["--logical_shards=3"], "batch_size=16 cannot be split into logical_shards=3"),
        (["--logical_shards=4"], "logical_shards=4 cannot be split exactly over 8 devices: use 1, 2, 4 devices"),
        (
            ["--reset_state=document", "--vocabulary=characters", r"--document_separator=a\x00"],
            r"(U+0000) at position 1 is not in the vocabulary; prepare the text with one that is, name another",
        ),
        (["--reset_state=document", "--document_separator="], "document_separator='' ends no document: give what does"),
        (
            ["--reset_state=document", r"--document_separator=\q"],
            r"document_separator='\\q': \q is not an escape: use \n",
        ),
        (["--valid_fraction=0.00001", "--test_fraction=0", "--split=columns:9x900"], "split=columns:9x900"),
        (["--initial_checkpoint=nowhere"], "nowhere is not a run: it has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_text_or_the_devices_is_refused_and_nothing_is_written(
    flags, sentence, arguments, tmp_path
):
    assert sentence in refusal(train.main, *arguments, *flags, f"--run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_binary_file_has_no_characters_and_the_first_bad_byte_is_named(arguments, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"hello " * 100 + b"\xff\xd8" + b"x" * 5000)
    binary = (*arguments, f"--corpus={tmp_path / 'photo.jpg'}", "--vocabulary=characters")
    sentence = refusal(train.main, *binary, f"--run_dir={tmp_path / 'run'}")
    assert "photo.jpg is not UTF-8 text: bad sequence at byte 600; convert it" in sentence
    assert not (tmp_path / "run").exists()


@pytest.fixture
def prepared(folder, tmp_path) -> Path:
    return prepare(CorpusSettings(corpus=str(folder / "text.txt"), cache_dir=str(tmp_path)), tmp_path / "prepared")


def test_a_prepared_corpus_with_a_shard_missing_or_shortened_is_refused(prepared, arguments, tmp_path):
    shard = prepared / "train-00000.ids"
    run = (*arguments, f"--corpus={prepared}", f"--run_dir={tmp_path / 'run'}")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "train-00000.ids has 6929 bytes instead of 6930" in refusal(train.main, *run)
    shard.unlink()
    assert "train-00000.ids is missing" in refusal(train.main, *run)
    assert not (tmp_path / "run").exists()


def test_a_shard_changed_in_the_midst_of_a_run_stops_it_with_its_name_and_the_checkpoints_stay(
    prepared, arguments, tmp_path, capsys
):
    run = (*arguments, f"--corpus={prepared}", f"--run_dir={tmp_path / 'run'}", "--logical_shards=8")
    assert train.main(["train", *run, "--num_steps=10"]) == cli.DONE
    flip(prepared / "train-00000.ids", 5000)
    before = tree(tmp_path / "run" / "checkpoints")
    capsys.readouterr()
    sentence = refusal(train.main, *run)
    said = capsys.readouterr().err.splitlines()
    changed, continuing, training = [line for line in said if not line.startswith(("compiling", "text: ", "model: "))]
    assert changed.endswith(": num_steps: 10 -> 40")
    assert continuing == "continuing from the checkpoint of step 10"
    assert training.startswith("training on 8 x cpu")
    assert "train-00000.ids is damaged: the block at byte 0 does not match its checksum" in sentence
    assert tree(tmp_path / "run" / "checkpoints") == before
    flip(prepared / "train-00000.ids", 5000)
    assert train.main(["train", *run, "--num_steps=20"]) == cli.DONE


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vocabulary=characters"], "--vocabulary=characters was given and {} is prepared with bytes"),
        (["--valid_fraction=0.1"], "mean splits of 6545 + 770 + 385 symbols and {} has 6930 + 385 + 385: leave them"),
        (["--split=columns:10x10"], "--split=columns:10x10 was given and {} is prepared with contiguous: leave it out"),
    ],
    ids=["vocabulary", "fraction", "columns"],
)
def test_flags_that_contradict_a_prepared_corpus_are_refused(flags, sentence, prepared, arguments, tmp_path):
    run = (*arguments, f"--corpus={prepared}", f"--run_dir={tmp_path / 'run'}", *flags)
    assert sentence.format(prepared) in refusal(train.main, *run)
    assert not (tmp_path / "run").exists()


# The run directory.


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        (["--hidden_size=16", "--seed=3"], "hidden_size: 8 -> 16; seed: 0 -> 3"),
        (["--vocabulary=characters"], "has a vocabulary of 256 bytes"),
        (["--corpus={}/other.txt"], "was trained on the corpus with fingerprint"),
        (["--log_every=1", "--optimizer=sgd"], "optimizer: adam -> sgd"),
    ],
    ids=["config", "vocabulary", "corpus", "one allowed, one not"],
)
def test_a_run_of_another_config_vocabulary_or_corpus_is_refused_with_both_values(
    flags, both, trained, arguments, folder
):
    before = tree(trained)
    flags = [flag.format(folder) for flag in flags]
    sentence = refusal(train.main, *arguments, *flags, f"--run_dir={trained}")
    assert both in sentence and "another run_dir" in sentence
    if "characters" in flags[0]:
        assert "and the corpus given has a vocabulary of 11 characters" in sentence
    if "other.txt" in flags[0]:
        _, own = run_directory.read(trained)
        assert own.corpus_fingerprint[:12] in sentence and ", and the one given has " in sentence
    assert tree(trained) == before


@pytest.mark.parametrize(
    ("flags", "choice"),
    [([], "1, 2, 4, 8 devices, .* and logical_shards=8$"), (["--reduction=fast"], "1, 2, 4, 8, 16 devices, .*size$")],
    ids=["exact", "fast"],
)
def test_a_run_that_goes_on_with_devices_that_do_not_fit_is_told_which_do(
    flags, choice, trained, arguments, monkeypatch
):
    monkeypatch.setattr(distributed, "make", lambda make=distributed.make: make(jax.devices()[:3]))
    more = f"--run_dir={trained}", "--num_steps=41"
    use = "batch_size=16 cannot be split over 3 devices: use "
    assert re.search(f"{use}{choice}", refusal(train.main, *arguments, *flags, *more))
    assert f"{use}15 or 18" in refusal(train.main, *arguments, *flags, *more, "--run_dir=another")


def test_evaluating_with_another_text_is_refused(trained, folder):
    sentence = refusal(evaluate.main, f"--run_dir={trained}", f"--corpus={folder / 'other.txt'}")
    assert "was trained on the corpus with fingerprint" in sentence


def test_checkpoints_of_another_run_are_refused(copied, arguments, tmp_path):
    other = tmp_path / "other"
    assert train.main(["train", *arguments, "--seed=5", "--num_steps=1", f"--run_dir={other}"]) == cli.DONE
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree(other / "checkpoints", copied / "checkpoints")
    for main, flags in ((train.main, arguments), (evaluate.main, ())):
        sentence = refusal(main, *flags, f"--run_dir={copied}")
        assert "belong to another run (decay_steps: 1 -> 40; seed: 5 -> 0)" in sentence


def test_a_directory_of_other_files_does_not_become_a_run(arguments, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("precious")
    monkeypatch.setattr(corpus_lib, "open_for", lambda *_: pytest.fail("the text was prepared first"))
    assert "holds thesis.tex but no config.json" in refusal(train.main, *arguments, f"--run_dir={tmp_path}")
    assert tree(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("below", ["file", "file/run", "file/a/run"])
def test_a_run_directory_that_cannot_be_made_is_refused(below, arguments, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sentence = refusal(train.main, *arguments, f"--run_dir={tmp_path / below}")
    assert f"run_dir={tmp_path / below} cannot be written (" in sentence and sentence.endswith("): name another")
    assert tree(tmp_path) == {"file": b"in the way"}


@pytest.mark.long
def test_a_read_only_run_directory_is_refused_in_one_line(arguments, tmp_path):
    # Permissions do not stop root, so the file system is read-only, in a mount namespace of this process alone.
    mounted = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"', str(tmp_path))
    try:
        subprocess.run([*mounted, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a read-only file system cannot be mounted here: {error}")
    command = (sys.executable, "-m", "launch.train", *arguments, f"--run_dir={tmp_path}")
    refused = process(*mounted, *command)
    assert (refused.returncode, refused.stdout) == (2, "")
    said = [line for line in refused.stderr.splitlines() if not line.startswith(("compiling", "preparing"))]
    assert said == [f"launch.train: run_dir={tmp_path} cannot be written (Read-only file system): name another"]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_without_a_run_directory_nothing_is_done(name):
    assert "--run_dir is required" in refusal({"train": train, "evaluate": evaluate}[name].main)


# Checkpoints.


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        ("7", "there is no checkpoint 7 in {}/checkpoints: choose one of 20, 30, 40"),
        ("newest", "checkpoint='newest' is neither best, nor latest, nor a step"),
        ("-1", "checkpoint='-1' is neither best, nor latest, nor a step"),
    ],
)
def test_a_checkpoint_that_does_not_exist_is_refused_with_those_that_do(which, sentence, trained):
    assert sentence.format(trained) in refusal(evaluate.main, f"--run_dir={trained}", f"--checkpoint={which}")


def test_a_run_without_checkpoints_and_no_run_at_all_cannot_be_evaluated(copied, tmp_path):
    shutil.rmtree(copied / "checkpoints")
    assert "there is no checkpoint in" in refusal(evaluate.main, f"--run_dir={copied}")
    assert "is not a run: it has no config.json" in refusal(evaluate.main, f"--run_dir={tmp_path}")
    assert not (copied / "checkpoints").exists()


def test_a_torn_checkpoint_is_passed_over_for_the_newest_whole_one_and_both_programs_say_so(
    copied, arguments, trained, capsys
):
    array = max((copied / "checkpoints" / "40" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:-100])
    before = tree(copied)
    assert evaluate.main(["evaluate", f"--run_dir={copied}", "--checkpoint=latest", "--format=json"]) == cli.DONE
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 30
    assert "checkpoint 40 in" in err and "checkpoint 30 is the newest whole one and is used instead" in err
    assert tree(copied) == before  # whoever only reads leaves things as they are
    assert train.main(["train", *arguments, f"--run_dir={copied}"]) == cli.DONE
    err = capsys.readouterr().err
    assert "checkpoint 40 was set aside as 40.corrupt-" in err and "continuing from the checkpoint of step 30" in err
    assert last_line(copied)["state_digest"] == last_line(trained)["state_digest"]


def test_where_no_checkpoint_is_whole_the_run_neither_goes_on_nor_starts_anew(copied, arguments):
    for seal in (copied / "checkpoints").glob("*/checkpoint.json"):
        flip(seal, 30)
    before = {path.name for path in (copied / "checkpoints").iterdir()}
    for _ in range(2):
        sentence = refusal(train.main, *arguments, f"--run_dir={copied}")
        assert "is whole (there are 20, 30, 40): remove it to start anew" in sentence
    assert {path.name for path in (copied / "checkpoints").iterdir()} == before


# Flags.


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--num_stepss=5", "unknown flag --num_stepss; did you mean num_steps?"),
        ("--norotate_stream", "unknown flag --norotate_stream; did you mean rotate_streams?"),
        ("--zebra=1", "unknown flag --zebra"),
        ("--cell=lstn", f"--cell=lstn: use one of {', '.join(CELLS)}; did you mean lstm?"),
        ("--cell=transformer", f"--cell=transformer: use one of {', '.join(CELLS)}"),
        ("--num_steps=abc", "--num_steps=abc: not a whole number"),
        ("--num_steps=1e3", "--num_steps=1e3: not a whole number"),
        ("--num_steps=-1", "num_steps=-1 must be at least 1"),
        ("--num_steps=9999999999", "num_steps=9999999999 must be at most 2147483647"),
        ("--seed=99999999999999999999", "seed=99999999999999999999 must be at most 2147483647"),
        ("--learning_rate=fast", "--learning_rate=fast: not a number"),
        ("--learning_rate=nan", "learning_rate=nan is not a finite float32"),
        ("--forget_bias=inf", "forget_bias=inf is not a finite float32"),
        ("--learning_rate=-1", "learning_rate=-1.0 must be 0 or more"),
        ("--weight_decay=-1", "weight_decay=-1.0 must be 0 or more"),
        ("--final_fraction=-1", "final_fraction=-1.0 must be 0 or more"),
        ("--init_scale=-1", "init_scale=-1.0 must be 0 or more"),
        ("--epsilon=0", "epsilon=0.0 must be more than 0 for optimizer=adam"),
        ("--skip=maybe", "--skip=maybe: use true or false"),
        ("--tie_embeddings", "tie_embeddings needs embedding_size=4 to equal hidden_size=8"),
        ("--split=columns:0x3", "split='columns:0x3' is neither contiguous, hash nor columns:BxT"),
        ("num_steps=5", "unexpected argument 'num_steps=5': every setting is a flag, --name=value"),
        ("--flagfile=no.flags", "flagfile=no.flags cannot be read: No such file"),
        ("--flagfile=/", "flagfile=/ cannot be read: Is a directory"),
        ("--flagfile", "flagfile= cannot be read"),
    ],
)
def test_an_unknown_flag_or_value_is_refused_with_the_nearest_known_one(flag, sentence, arguments, tmp_path):
    # A dry run, so that a mistake that is let pass is not trained with for ever.
    assert sentence in refusal(train.main, *arguments, "--dry_run", f"--run_dir={tmp_path / 'run'}", flag)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"# all is well\n\n--num_stepz=3\n", "unknown flag --num_stepz; did you mean num_steps?"),
        (b"--num_steps=3\nnum_layers=2\n", "my.flags, line 2: 'num_layers=2' is not a flag: write --name=value"),
        (b"--num_steps=\xff\n", "my.flags is not UTF-8 text: invalid start byte at byte 12"),
        (b'--corpus="half', 'my.flags, line 1: "half is not a whole json string'),
        (b"--flagfile=my.flags\n", "flagfile=my.flags reads itself"),
    ],
    ids=["unknown flag", "no flag", "binary", "half a string", "circle"],
)
def test_a_mistake_in_a_flagfile_is_refused(content, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.flags").write_bytes(content)
    assert sentence in refusal(train.main, "--run_dir=run", "--flagfile=my.flags")
    assert not Path("run").exists()


# As processes: one line on stderr, exit status 2, no traceback, nothing written.


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("train", ["--seeed=1", "--run_dir={}/run"], "unknown flag --seeed; did you mean seed?"),
        pytest.param(
            "evaluate",
            ["--run_dir={}/run"],
            "run_dir={}/run is not a run: it has no config.json",
            marks=pytest.mark.long,
        ),
    ],
    ids=["a flag", "a run"],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(name, flags, sentence, tmp_path):
    flags = [flag.format(tmp_path) for flag in flags] + ([f"--cache_dir={tmp_path}/cache"] if name == "train" else [])
    refused = process(sys.executable, "-m", f"launch.{name}", *flags)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"launch.{name}: {sentence.format(tmp_path)}")
    assert refused.stderr.endswith("\n") and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# What comes while the run is on its way.  The child disturbs itself, so that the moment is known.

DISTURBED = """
import os, pathlib, resource, signal, sys, time
from charlstm.run.metrics import MetricAggregator
from launch import train
from launch.support import cli
add, run_dir = MetricAggregator.add, pathlib.Path(sys.argv[1].removeprefix("--run_dir="))
def add_and_disturb(self, step, metrics):
    add(self, step, metrics)
    {disturbance}
MetricAggregator.add = add_and_disturb
cli.run("launch.train", train.main)
"""


def disturbed(disturbance: str, run_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    child = DISTURBED.format(disturbance=disturbance)
    return process(sys.executable, "-c", child, f"--run_dir={run_dir}", *flags, "--logical_shards=8")


def test_sigterm_finishes_the_step_and_saves_and_the_same_command_ends_with_the_same_bits(arguments, trained, tmp_path):
    run_dir = tmp_path / "run"
    # A thread hears the signal, and has time for that.
    stopped = disturbed("if step == 17: os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)", run_dir, *arguments)
    assert stopped.returncode == cli.STOPPED == 75, stopped.stderr
    last = re.search(r"\nstopped by a signal at step (\d+), saved; the same command goes on\n$", stopped.stderr)
    assert last and int(last[1]) >= 17, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert steps(run_dir)[-1] == int(last[1])
    assert train.main(["train", *arguments, f"--run_dir={run_dir}"]) == cli.DONE
    assert last_line(run_dir)["state_digest"] == last_line(trained)["state_digest"]


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    services = ProgramServices(WatchdogFlags(), MonitorFlags())
    with services.opened(tmp_path), services.watching(None):
        assert not services.stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert services.stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_signal_handlers_are_put_back_when_training_ends(trained, arguments):
    assert train.main(["train", *arguments, f"--run_dir={trained}"]) == cli.DONE
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_with_a_full_disk_the_run_goes_on_says_so_and_keeps_its_earlier_checkpoints(arguments, trained, tmp_path):
    # No file may become larger than 4 KB once the checkpoint of step 20 is there.
    full = """
    while step == 25 and not (run_dir / "checkpoints" / "20").is_dir():
        time.sleep(0.01)
    if step == 25:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    """
    run_dir = tmp_path / "run"
    ended = disturbed(full, run_dir, *arguments)
    assert ended.returncode == cli.NOT_SAVED == 74, ended.stderr
    lines = ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr and not [line for line in lines if "Error" in line and "was not" not in line]
    assert [line[:37] for line in lines if "not saved" in line] == [
        "checkpoint 30 was not saved (failure ",
        "checkpoint 40 was not saved (failure ",
    ]
    assert lines[-1] == (
        "ended at step 40, which could not be saved; the same command goes on from the checkpoint of step 20"
    )
    assert last_line(run_dir)["step"] == 40
    assert steps(run_dir) == [10, 20]
    for step in (10, 20):
        sealing.verify(run_dir / "checkpoints" / str(step))
    assert train.main(["train", *arguments, f"--run_dir={run_dir}"]) == cli.DONE
    assert last_line(run_dir)["state_digest"] == last_line(trained)["state_digest"]


def test_a_run_that_cannot_save_stops_after_so_many_failures(arguments, tmp_path, monkeypatch, capsys):
    run_dir, longer = tmp_path / "run", ("--num_steps=100", "--max_failed_saves=2")

    def full(staging, meta, beat, seal=sealing.seal):
        if meta["step"] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(staging, meta, beat)

    monkeypatch.setattr(sealing, "seal", full)
    assert train.main(["train", *arguments, *longer, f"--run_dir={run_dir}"]) == cli.NOT_SAVED
    # Of a save it is known at the next one that it failed.
    assert "ended at step 50, which could not be saved" in capsys.readouterr().err.splitlines()[-1]
    assert steps(run_dir) == [10, 20]
    told = [line for line in (run_dir / "log.txt").read_text().splitlines() if " step " in line and "/100 " in line]
    assert "NOT SAVED" not in told[1] and re.search(r" NOT SAVED, [12] times  step ", told[-1]), told


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_stream_and_nothing_of_it_is_saved(
    arguments, capsys, tmp_path
):
    wild = ("--optimizer=sgd", "--learning_rate=1e38", "--clip_norm=0", "--checkpoint_every=1")
    # The loss and the gradient of the first step are sound.
    assert train.main(["train", *arguments, *wild, f"--run_dir={tmp_path / 'run'}"]) == cli.DIVERGED == 3
    line = capsys.readouterr().err.splitlines()[-1]
    stopped = re.match(
        r"stopped: loss=\S+ is not finite at step (\d+), in .*the largest loss is stream .*; nothing of it was saved$",
        line,
    )
    assert stopped and int(stopped[1]) >= 2, line
    assert steps(tmp_path / "run") == list(range(1, int(stopped[1])))[-3:]


def test_rollbacks_are_counted_and_their_windows_left_out_though_no_save_works(arguments, tmp_path, monkeypatch):
    tries = []

    def full(self, step, items):
        tries.append(step)
        assert len(tries) < 9, "it goes back for ever"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Checkpoints, "_make_staging", full)
    wild = ("--learning_rate=3e38", "--clip_norm=0", "--on_divergence=rollback", "--max_rollbacks=2")
    assert train.main(["train", *arguments, *wild, f"--run_dir={tmp_path / 'run'}"]) == cli.DIVERGED
    assert re.findall("went back to step .*", (tmp_path / "run" / "log.txt").read_text()) == [
        f"went back to step 0, rollback {n} of 2; windows 0 to {2 * n - 1} of each stream are left out" for n in (1, 2)
    ]


def test_an_update_after_which_a_parameter_is_not_finite_is_not_saved(arguments, capsys, tmp_path):
    wild = ("--optimizer=adamw", "--learning_rate=3e38", "--weight_decay=10", "--clip_norm=0")
    # The loss and the gradient of the first step are sound; a checkpoint of it would never go on.
    once = ("--checkpoint_every=1", f"--run_dir={tmp_path / 'run'}")
    assert train.main(["train", *arguments, *wild, *once]) == cli.DIVERGED
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped: a parameter is not finite after step 1; nothing of it was saved"
    )
    assert steps(tmp_path / "run") == []
