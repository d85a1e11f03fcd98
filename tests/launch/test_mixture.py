"""Runs on a mixture: resumed to the bit, each corpus scored by itself, and refused in one sentence."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import charlstm as cl
from charlstm import config as config_lib
from charlstm.run import corpus, run_directory
from launch import evaluate, train
from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.launch.conftest import SMALL, TINY, refusal
from tests.launch.test_resume import KILLED_AT_27, assert_same_end, last_line


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    for name, letters, length in (("a", "abcdefgh \n", 9000), ("b", "ABCD \n", 7000)):
        (folder / f"{name}.txt").write_text("".join(random.choice(list(letters), length)))
    return folder


@pytest.fixture(scope="module")
def flags(texts) -> tuple[str, ...]:
    spec = f"{texts / 'a.txt'}:.7,small={texts / 'b.txt'}:.3"
    more = ("--logical_shards=8", "--checkpoint_every=20", "--evaluate_every=20", "--reset_probability=.05")
    return (TINY, *SMALL, *more, f"--mixture={spec}", f"--cache_dir={texts / 'cache'}")


@pytest.fixture(scope="module")
def straight(texts, flags) -> Path:
    """A run of 40 steps on 8 devices, in turns of 32 windows, of which one begins every second step."""
    assert train.main(["train", *flags, f"--run_dir={texts / 'straight'}"]) == cli.DONE
    return texts / "straight"


def test_a_run_killed_on_2_devices_and_resumed_on_8_ends_with_the_bits_of_one_on_8(flags, straight, tmp_path):
    environment = os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_AT_27, f"--run_dir={tmp_path / 'killed'}", *flags]
    died = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert train.main(["train", *flags, f"--run_dir={tmp_path / 'killed'}"]) == cli.DONE
    assert "continuing from the checkpoint of step 20" in (tmp_path / "killed" / "log.txt").read_text()
    assert_same_end(straight, tmp_path / "killed")


@pytest.mark.optimized
@pytest.mark.long
@pytest.mark.parametrize("segment", ["0", "100", "1500"])
def test_so_does_one_that_moves_between_devices_and_mixes_otherwise(segment, flags, tmp_path):
    ends = []
    for name, moves in (("stayed", ((4, 40),)), ("moved", ((2, 7), (8, 20), (1, 33), (4, 40)))):
        for devices, until in moves:
            environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
            how = [f"--run_dir={tmp_path / name}", *flags, f"--segment={segment}", f"--num_steps={until}"]
            command = [sys.executable, "-m", "launch.train", *how, "--window_deviation=2"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        ends.append(tmp_path / name)
    assert_same_end(*ends)


def test_each_corpus_is_scored_by_itself_and_the_mean_by_weights_says_which_checkpoint_is_best(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    at_40 = {line["split"]: line for line in lines if line["step"] == 40}
    assert set(at_40) == {"train", "valid/a", "valid/small", "valid"} and lines[-1]["split"] == "valid"
    a, b, mean = (at_40[name]["bits_per_symbol"] for name in ("valid/a", "valid/small", "valid"))
    assert a != b and mean == pytest.approx(0.7 * a + 0.3 * b, rel=1e-12)
    scores = {line["step"]: line["bits_per_symbol"] for line in lines if line["split"] == "valid"}
    model = cl.load(straight)
    assert model.step == min(scores, key=scores.get)


def test_the_log_and_a_dry_run_name_the_corpora_their_symbols_and_shares(flags, straight, capsys):
    lines = [
        "a: 70 % (7 of 10 parts) of what is read, 8,100 training symbols, read ",
        "small: 30 % (3 of 10 parts) of what is read, 6,300 training symbols, read ",
        "segments of 512 symbols, in random order",
    ]
    log = (straight / "log.txt").read_text()
    assert train.main(["train", *flags, "--dry_run"]) == cli.DONE
    table = capsys.readouterr().out
    assert all(line in log and line in table for line in lines)
    assert "mixture of 70 % a, 30 % small: 14,400 training symbols" in table
    config, _ = run_directory.read(straight)
    assert config.streams.segment == 512 and config.corpus.corpus == ""


def test_evaluation_prints_each_corpus_and_their_mean(straight, texts, tmp_path, capsys):
    assert evaluate.main(["evaluate", f"--run_dir={straight}", "--format=json"]) == cli.DONE
    found = json.loads(capsys.readouterr().out)
    a, b = found["mixture"]["a"], found["mixture"]["small"]
    assert (a["symbols"], b["symbols"], found["symbols"]) == (450, 350, 800)
    for name in ("bits_per_symbol", "bits_per_byte", "bits_per_character"):
        assert found[name] == pytest.approx(0.7 * a[name] + 0.3 * b[name])
    assert evaluate.main(["evaluate", f"--run_dir={straight}"]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["test/a", "test/small", "test"]
    assert f"{found['bits_per_symbol']:.4f} bits per byte" in lines[2]
    moved = shutil.copytree(texts, tmp_path / "moved", ignore=shutil.ignore_patterns("cache", "straight"))
    spec = f"a={moved / 'a.txt'}:7,small={moved / 'b.txt'}:3"
    assert evaluate.main(["evaluate", f"--run_dir={straight}", f"--corpus={spec}"]) == cli.DONE
    assert capsys.readouterr().out.splitlines()[2].startswith(lines[2].partition(" in ")[0])


def test_the_library_goes_on_with_a_mixture_where_the_program_ended(texts, straight, tmp_path):
    config, _ = run_directory.read(straight)
    mixed = cl.load_mixture(
        {str(texts / "a.txt"): 0.7, f"small={texts / 'b.txt'}": 0.3}, cache_dir=str(texts / "cache")
    )
    assert list(mixed.corpora) == ["a", "small"]
    run_dir = shutil.copytree(straight, tmp_path / "run")
    model = cl.train(config_lib.replace(config, num_steps=41), mixed, run_dir)
    assert last_line(run_dir)["step"] == 41
    assert run_directory.read(run_dir)[0].streams.mixture == mixed.spec
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = {line["split"]: line["bits_per_symbol"] for line in lines if line["step"] == model.step}
    for name, one in mixed.corpora.items():
        assert model.evaluate(one.valid).bits_per_symbol == pytest.approx(logged[f"valid/{name}"])


def test_another_mixture_or_segment_on_the_way_is_refused_with_both(texts, flags, straight):
    run = [*flags, f"--run_dir={straight}"]
    spec = f"a={texts / 'a.txt'}:0.5,small={texts / 'b.txt'}:0.5"
    why = refusal(train.main, *run, f"--mixture={spec}")
    assert "was trained on the corpus with fingerprint" in why and f"small={texts / 'b.txt'}:0.3 -> {spec})" in why
    assert "segment: 512 -> 256" in refusal(train.main, *run, "--segment=256")
    assert "shuffle_segments: True -> False" in refusal(train.main, *run, "--noshuffle_segments")


def test_what_cannot_be_mixed_is_refused_before_there_is_a_run(texts, flags, tmp_path, monkeypatch):
    run = [*flags, f"--run_dir={tmp_path / 'run'}"]
    a, b = texts / "a.txt", texts / "b.txt"
    assert "are both given: leave one out" in refusal(train.main, *run, f"--corpus={a}")
    assert "are both given: leave one out" in refusal(train.main, *run, f"--train={a}")
    assert "names a twice" in refusal(train.main, *run, f"--mixture={a}:.5,{a}:.5")
    assert "rounds to 0 of" in refusal(train.main, *run, f"--mixture={a}:.99999,{b}:.00001")
    short = refusal(train.main, *run, "--segment=2000")
    assert "a has 8100 training symbols, too few for 2000 in each of the 12 of batch_size=16 streams" in short
    assert "needs at least 24000; give --segment=675, or more text" in short
    others = refusal(train.main, *run, "--vocabulary=characters")
    assert "a has a vocabulary of 11 characters (" in others and "--vocabulary_of=" in others
    (tmp_path / "c,d").mkdir()
    monkeypatch.chdir(tmp_path / "c,d")
    for more in ("--dry_run", "--nodry_run"):
        comma = refusal(train.main, *run, "--mixture=a.txt:.5,b.txt:.5", more)
        assert f"{tmp_path}/c,d/a.txt has a comma in its path, and cannot be mixed: rename the folder" in comma
    none = refusal(train.main, *run, f"--mixture={a}:.5,{texts / 'nothing'}:.5")
    assert str(texts / "nothing") in none
    assert not (tmp_path / "run").exists()


def test_weights_that_change_may_be_given_when_a_run_is_resumed_but_for_no_text_that_it_has_read(
    flags, straight, tmp_path
):
    run = [*flags, f"--run_dir={shutil.copytree(straight, tmp_path / 'run')}"]
    why = refusal(train.main, *run, "--mixture_from=39:a:1,small:1")
    assert (
        "mixture_from='39:a:1,small:1' has other weights before step 40" in why and "with changes from step 40" in why
    )
    assert run_directory.read(tmp_path / "run")[0].streams.mixture_from == ""
    assert train.main(["train", *run, "--mixture_from=40:a:2,small:1", "--num_steps=41"]) == cli.DONE
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "changed since the run was started or last continued: mixture_from:  -> 40:a:2,small:1" in log
    assert "from step 40 on, as turns begin: 66.7 % a, 33.3 % small" in log
    config, _ = run_directory.read(tmp_path / "run")
    for changes, allowed in (("40:small:5,a:10;50:a:1", True), ("", False), ("40:small:1", False)):
        now = config_lib.replace(config, mixture_from=changes)
        with contextlib.nullcontext() if allowed else pytest.raises(ValueError, match="has other weights before step"):
            corpus.check_what_was_read(config, now, 41)


@pytest.mark.long
def test_it_reads_what_it_would_have_read_had_they_been_known_from_the_beginning(flags, straight, tmp_path):
    how, ends = [*flags, "--evaluate_every=0", "--segment=256"], []
    for name, moves in (("known", (("25:small:1", 40),)), ("later", (("", 20), ("25:small:1", 40)))):
        for changes, until in moves:
            more = [f"--mixture_from={changes}", f"--num_steps={until}", f"--run_dir={tmp_path / name}"]
            assert train.main(["train", *how, *more]) == cli.DONE
        ends.append(last_line(tmp_path / name)["state_digest"])
    assert ends[0] == ends[1] != last_line(straight)["state_digest"]


def test_a_corpus_that_is_read_later_on_has_weight_0_until_then(texts, flags, tmp_path):
    run = [*flags, f"--mixture=a={texts / 'a.txt'}:1,b={texts / 'b.txt'}:0", f"--run_dir={tmp_path / 'run'}"]
    assert "the weight of b is 0, and no --mixture_from gives it more" in refusal(train.main, *run)
    assert not (tmp_path / "run").exists()
    why = refusal(train.main, *run, "--mixture=", f"--corpus={texts / 'a.txt'}", "--mixture_from=2:a:1")
    assert "mixture_from='2:a:1' is of a mixture: give --mixture, or leave it out" in why
    assert train.main(["train", *run, "--mixture_from=2:b:1", "--num_steps=20"]) == cli.DONE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    score = {line["split"]: line.get("bits_per_symbol") for line in lines}
    assert score["valid"] == pytest.approx(score["valid/a"]) and score["valid/a"] != score["valid/b"]


def test_one_corpus_in_shuffled_segments_says_so_and_learns_other_text(texts, flags, tmp_path):
    one = [*flags, "--mixture=", f"--corpus={texts / 'a.txt'}", "--evaluate_every=0", "--num_steps=3"]
    digests = []
    for more in ((), ("--segment=300",), ("--segment=300", "--noshuffle_segments")):
        run_dir = tmp_path / "_".join(["run", *more])
        assert train.main(["train", *one, f"--run_dir={run_dir}", *more]) == cli.DONE
        order = "in the order of the text" if len(more) > 1 else "in random order"
        assert (f"segments of 300 symbols, {order}" in (run_dir / "log.txt").read_text()) == bool(more)
        digests.append(last_line(run_dir)["state_digest"])
    assert len(set(digests)) == 3
