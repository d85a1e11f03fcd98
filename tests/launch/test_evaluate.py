"""The evaluating program on run directories made here: what stdout has, of which checkpoint, and the same each time."""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed, rng
from charlstm.config import Config
from charlstm.inference.dynamic_evaluation import DynamicEvaluationConfig
from charlstm.inference.score import Score
from charlstm.model import language_model
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from charlstm.training.loss import cross_entropy
from data_pipeline.build.corpora import resolve
from data_pipeline.shards import open_corpus
from launch import evaluate
from launch.support import progress
from tests.compiling import xla_flags
from tests.conftest import ROOT

KEYS = {
    "split", "step", "bits_per_symbol", "bits_per_character", "bits_per_byte", "symbols", "characters", "bytes",
    "unknown_share", "seconds",
}  # fmt: skip
SCORES = {3: 2.75, 5: 2.5, 7: 2.625}  # step -> bits per symbol on validation: the best is neither end
TEXT = "".join(np.random.default_rng(0).choice(list("abcd é€\n"), 4000))
CHARACTERS = {"train": 3600, "valid": 200, "test": 200}  # of which "test" is the end of the text


def params_of(config, step, V):
    return language_model.init(config.model, V, rng.named(jax.random.key(step), "init"))


def make_run(folder, scores, vocabulary="characters", text=TEXT, **changes):
    """A run that was never trained, with a checkpoint of each step of `scores`; folder/run."""
    (folder / "text.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    small = {
        "num_layers": 1, "hidden_size": 8, "batch_size": 8, "window": 16, "initializer": "normal", "init_scale": 1.0,
        "eval_chunk": 10**6, "corpus": str(folder / "text.txt"), "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    config = config_lib.replace(config_lib.fill_automatic(Config(), 1), vocabulary=vocabulary, **(small | changes))
    corpus = open_corpus(resolve(config.corpus))
    identity = run_directory.Identity(corpus.vocabulary, corpus.fingerprint)
    run_directory.create(folder / "run", config, identity, [])
    with Checkpoints(folder / "run" / "checkpoints", keep=9, log=print) as checkpoints:
        for step, score in scores.items():
            state = train_state.init(config, corpus.vocabulary.size)
            params = params_of(config, step, corpus.vocabulary.size)
            state = train_state.place(
                distributed.make(), state._replace(step=jnp.asarray(step, jnp.int32), params=params)
            )
            checkpoints.save(state, run_directory.checkpoint_identity(config, identity), score)
    return folder / "run"


@pytest.fixture(scope="module")
def characters_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("characters"), SCORES)


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("bytes"), {3: None, 5: None}, "bytes", eval_chunk=10, burn_in=20)


@pytest.fixture
def run(capsys):
    """Runs the program in this process: its stdout."""

    def run(run_dir, *arguments):
        assert evaluate.main(["evaluate", f"--run_dir={run_dir}", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def json_of(run):
    return lambda *arguments: json.loads(run(*arguments, "--format=json"))


@functools.cache
def bits_by_hand(run_dir, text, step) -> float:
    """The bits of `text`, one character after the other, by the model of `step`."""
    config, identity = run_directory.read(run_dir)
    ids, V = identity.vocabulary.encode(text).astype(np.int32)[None], identity.vocabulary.size
    forward = jax.jit(language_model.apply, static_argnums=0)
    state = language_model.zero_state(config.model, 1)
    reset = np.zeros((1, ids.size - 1), bool)
    _, logits = forward(config.model, params_of(config, step, V), state, ids[:, :-1], reset)
    return float(np.asarray(cross_entropy(logits, ids[:, 1:].T), np.float64).sum()) / math.log(2) + math.log2(V)


# What is printed.


def test_json_is_one_line_with_the_documented_keys(run, characters_run):
    out = run(characters_run, "--format=json")
    assert out.count("\n") == 1 and out.endswith("\n")
    found = json.loads(out)
    assert found.keys() == KEYS
    assert (found["split"], found["step"]) == ("test", 5)
    assert found["seconds"] >= 0


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_is_scored_as_by_hand_and_counted_in_characters_and_in_bytes(split, json_of, characters_run):
    stop = 3800 if split == "valid" else 4000
    text = TEXT[stop - 200 : stop]
    bits, found = bits_by_hand(characters_run, text, 5), json_of(characters_run, f"--split={split}")
    assert (found["characters"], found["bytes"]) == (200, len(text.encode()))
    assert found["bits_per_character"] == pytest.approx(bits / 200, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("split", CHARACTERS)
def test_of_text_with_long_characters_a_byte_has_fewer_bits_than_a_character(split, json_of, characters_run):
    found = json_of(characters_run, f"--split={split}")
    assert found["split"] == split and found["characters"] == CHARACTERS[split] < found["bytes"]
    assert found["bits_per_byte"] < found["bits_per_character"]
    ratio = found["bits_per_character"] / found["bits_per_byte"]
    assert ratio == pytest.approx(found["bytes"] / found["characters"], rel=1e-12)


def test_of_a_vocabulary_of_bytes_a_symbol_is_a_byte_and_characters_are_counted_apart(json_of, run, bytes_run):
    found = json_of(bytes_run)
    text = TEXT.encode()[4960 + 275 :]  # after 90 % and 5 %
    assert (found["symbols"], found["bytes"]) == (len(text), len(text))
    assert found["characters"] == sum(byte & 0xC0 != 0x80 for byte in text) < len(text)
    bits = found["bits_per_symbol"] * len(text)
    assert found["bits_per_byte"] * found["bytes"] == pytest.approx(bits, rel=1e-12)
    assert found["bits_per_character"] * found["characters"] == pytest.approx(bits, rel=1e-12)
    assert re.fullmatch(
        f"test: {found['bits_per_byte']:.4f} bits per byte \\({found['bits_per_character']:.4f} per character\\) at "
        f"step 5, {found['characters']} characters of {found['bytes']} bytes in \\w+\n",
        run(bytes_run),
    )


@pytest.mark.parametrize(
    ("text", "vocabulary", "words", "length", "none"),
    [
        ("plain text\n" * 300, "bytes", "{:.4f} bits per byte", "165 bytes", ()),
        ("plain text\n" * 300, "characters", "{:.4f} bits per character", "165 characters of 165 bytes", ()),
        (b"caf\xe9 au\n" * 400, "bytes", "{:.4f} bits per byte", "160 bytes", ("bits_per_character",)),
        (
            "plain text\n" * 300 + "\u0645\u062b" * 40, "characters",
            "{:.4f} bits per character, 47% of the symbols unknown", "169 characters of 249 bytes", ("bits_per_byte",),
        ),
    ],
    ids=["ascii bytes", "ascii characters", "latin-1", "unknown"],
)  # fmt: skip
def test_a_figure_that_does_not_apply_is_null_and_not_printed(
    text, vocabulary, words, length, none, tmp_path, run, json_of
):
    run_dir = make_run(tmp_path, {5: None}, vocabulary, text=text)
    found = json_of(run_dir)
    assert {name for name in found if found[name] is None} - {"characters"} == set(none)
    line = f"test: {words.format(found['bits_per_symbol'])} at step 5, {length} in "
    assert run(run_dir).startswith(line)


def test_as_text_the_result_is_one_line_with_the_figures_of_json(run, json_of, characters_run):
    found, line = json_of(characters_run), run(characters_run)
    assert re.fullmatch(
        f"test: {found['bits_per_character']:.4f} bits per character \\({found['bits_per_byte']:.4f} per byte\\) "
        f"at step 5, 200 characters of {found['bytes']} bytes in \\w+\n",
        line,
    )


# Which checkpoint.


@pytest.mark.parametrize(
    ("arguments", "step"),
    [
        ((), 5), (("--checkpoint=best",), 5), (("--checkpoint=latest",), 7), (("--checkpoint=3",), 3),
        (("--checkpoint=7",), 7),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_checkpoint_asked_for_is_the_one_that_is_scored(arguments, step, json_of, characters_run):
    found = json_of(characters_run, *arguments)
    assert found["step"] == step
    expected = {each: bits_by_hand(characters_run, TEXT[3800:], each) / 200 for each in SCORES}
    assert found["bits_per_character"] == pytest.approx(expected[step], rel=1e-5)
    assert len({round(bits, 3) for bits in expected.values()}) == 3


def test_where_no_checkpoint_was_validated_the_best_is_the_newest(json_of, bytes_run):
    assert json_of(bytes_run)["step"] == 5


# The figure.


def test_the_figure_is_the_same_each_time_and_whatever_is_scored_side_by_side(json_of, characters_run):
    pieces = ("--eval_chunk=10", "--burn_in=20")
    found = json_of(characters_run, *pieces)
    assert json_of(characters_run, *pieces)["bits_per_character"] == found["bits_per_character"]
    for size in (1, 16, 500):  # of 20 pieces on 8 devices: 8, 16 and 24 at a time
        other = json_of(characters_run, *pieces, f"--evaluation_batch_size={size}")
        assert other["bits_per_character"] == pytest.approx(found["bits_per_character"], abs=1e-6)
        assert (other["characters"], other["bytes"]) == (found["characters"], found["bytes"])


def test_the_pieces_are_those_of_the_run_where_no_flag_says_otherwise(json_of, bytes_run):
    own, same, other = (
        json_of(bytes_run, *flags)["bits_per_character"] for flags in ((), ("--eval_chunk=10",), ("--eval_chunk=20",))
    )
    assert own == same != other


def test_evaluating_changes_nothing_in_the_run(json_of, characters_run):
    def tree():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in characters_run.rglob("*")}

    before = tree()
    json_of(characters_run, "--eval_chunk=50", "--evaluation_batch_size=3")
    json_of(characters_run, "--dynamic", "--search_temperature", "--dynamic_batches=1")
    assert tree() == before


def test_a_text_that_has_moved_is_found_where_corpus_says_and_gives_the_same_figure(json_of, tmp_path):
    run_dir = make_run(tmp_path, {1: None})
    found = json_of(run_dir)
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(ValueError, match=r"text\.txt does not exist"):
        json_of(run_dir)
    moved = json_of(run_dir, f"--corpus={tmp_path / 'moved.txt'}")
    assert moved | {"seconds": 0} == found | {"seconds": 0}


def test_of_a_run_with_texts_of_its_own_for_each_split_corpus_may_say_where_they_are(json_of, run, tmp_path):
    for name, part in (("train", TEXT[:3000]), ("test", TEXT[3000:])):
        (tmp_path / f"{name}.txt").write_text(part, "utf-8")
    run_dir = make_run(tmp_path, {1: None}, train=str(tmp_path / "train.txt"), test=str(tmp_path / "test.txt"))
    config, _ = run_directory.read(run_dir)
    found, prepared = json_of(run_dir), resolve(config.corpus)
    (tmp_path / "train.txt").unlink()
    moved = json_of(run_dir, f"--corpus={prepared}")
    assert moved | {"seconds": 0} == found | {"seconds": 0}


def test_a_split_that_the_corpus_has_not_is_refused_with_those_that_it_has(tmp_path):
    run_dir = make_run(tmp_path, {1: None}, valid_fraction=0.0)
    with pytest.raises(ValueError, match=r"has no valid split, only train, test$"):
        evaluate.main(["evaluate", f"--run_dir={run_dir}", "--split=valid"])
    with pytest.raises(ValueError, match=r"has no valid split, only train, test$"):
        evaluate.main(["evaluate", f"--run_dir={run_dir}", "--search_temperature"])


# Dynamic evaluation, and the softmax temperature.

DYNAMIC = ("--dynamic", "--dynamic_batches=1")


def test_a_dynamic_score_is_the_static_one_of_one_piece_where_nothing_is_learned(json_of, characters_run):
    still, expected = (*DYNAMIC, "--dynamic_learning_rate=0", "--dynamic_decay=0"), json_of(characters_run)
    found = json_of(characters_run, *still)
    assert found.keys() == KEYS | {field.name for field in dataclasses.fields(DynamicEvaluationConfig)}
    assert found["dynamic_learning_rate"] == 0
    for name in ("bits_per_character", "bits_per_byte"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)


def test_a_dynamic_score_is_another_one_and_the_same_on_one_device_and_on_two(json_of, characters_run, monkeypatch):
    make_mesh, found = distributed.make, []
    for count in (1, 2):
        monkeypatch.setattr(distributed, "make", lambda devices=None, n=count: make_mesh(devices or jax.devices()[:n]))
        found.append(json_of(characters_run, *DYNAMIC)["bits_per_character"])
    assert found[0] == found[1] != pytest.approx(json_of(characters_run)["bits_per_character"], abs=1e-4)


@pytest.mark.parametrize("more", [(), DYNAMIC], ids=["static", "dynamic"])
def test_the_temperature_is_that_of_validation_whatever_split_is_scored(
    more, json_of, run, characters_run, monkeypatch
):
    monkeypatch.setattr(evaluate, "TEMPERATURES", (0.5, 2.0, 1.0))  # the model is random, and much too bold
    test, valid, plain = (
        json_of(characters_run, *flags, *more)
        for flags in (("--search_temperature",), ("--search_temperature", "--split=valid"), ("--split=valid",))
    )
    assert test["temperature"] == valid["temperature"] == 2
    assert valid["bits_per_character"] == pytest.approx(plain["bits_per_character"], abs=1e-6)
    assert valid["bits_per_character_at_temperature"] < valid["bits_per_character"]
    assert test["bits_per_byte_at_temperature"] < test["bits_per_character_at_temperature"]
    for found, where in ((test, "the validation split"), (valid, "this very split")):
        name = f"{found['split']}{', dynamic' if more else ''}"
        _, line = run(characters_run, "--search_temperature", f"--split={found['split']}", *more).splitlines()
        assert line == (
            f"{name}: {found['bits_per_character_at_temperature']:.4f} bits per character "
            f"({found['bits_per_byte_at_temperature']:.4f} per byte) at temperature {found['temperature']:.3f}, "
            f"the best on {where}"
        )


def test_no_temperature_is_searched_on_the_split_that_is_scored():
    best = {"valid": 0.5, "test": 2.0}
    asked = []

    def score(split, temperatures):
        asked.append((split, len(temperatures)))
        return {"": [Score(1 + abs(math.log(t / best[split])), 1, 1, 1) for t in temperatures]}

    temperature, scores = evaluate.search(score, "test")
    assert temperature == 0.5 and [s.bits for s in scores[""]] == pytest.approx([1 + math.log(2), 1 + math.log(4)])
    assert asked == [("valid", len(evaluate.TEMPERATURES)), ("test", 2)]


def test_a_temperature_that_is_the_last_of_those_tried_is_said_to_be(run, characters_run, monkeypatch):
    monkeypatch.setattr(evaluate, "TEMPERATURES", (0.5, 1.0, 1.01))
    out = run(characters_run, "--search_temperature", "--split=valid")
    assert out.endswith("at temperature 1.010, the best on this very split and the last one tried\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--dynamic", "--eval_chunk=10"), "eval_chunk=10 has no part in a dynamic score, of one stream: leave it out"),
        (("--dynamic_window=9",), "dynamic_window=9 has no part in a static score: give --dynamic as well"),
    ],
)
def test_a_flag_that_has_no_part_in_the_score_is_refused(arguments, sentence, characters_run):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        evaluate.main(["evaluate", f"--run_dir={characters_run}", *arguments])


def test_the_time_left_is_told_from_when_all_is_compiled_once_a_minute(monkeypatch, capsys):
    done = [(0.0, 0), (100.0, 10), (110.0, 20), (150.0, 60), (175.0, 85), (190.0, 100)]
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    told = progress.shown("reading")
    for now, much in done:  # noqa: B007
        told(much, 100)
    assert capsys.readouterr().err == "reading: 10 of 100\nreading, 15s left: 85 of 100\n"


# The program as a process.


def test_stdout_has_the_result_alone_and_another_number_of_devices_gives_the_same_figure(json_of, characters_run):
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    command = [
        sys.executable,
        "-m",
        "launch.evaluate",
        f"--run_dir={characters_run}",
        "--format=json",
        "--eval_chunk=50",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    here, there = json_of(characters_run, "--eval_chunk=50"), json.loads(done.stdout)
    for name in ("bits_per_symbol", "bits_per_character", "bits_per_byte"):
        assert there.pop(name) == pytest.approx(here.pop(name), abs=1e-6)
    assert there | {"seconds": 0} == here | {"seconds": 0}
