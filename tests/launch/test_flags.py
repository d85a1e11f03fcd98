"""Flags are the settings and nothing else; flagfiles and config.json hold to them, and say what a run may change."""

import dataclasses
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.model.layer import CELLS
from launch import evaluate, sample, train, tune
from launch.support import cli, flags, train_flags
from launch.support.cluster import JobFlags
from launch.support.event_files import TensorboardFlags
from launch.support.prometheus import MonitorFlags
from launch.support.train_flags import TrainFlags
from launch.support.watchdog import WatchdogFlags
from tests.conftest import ROOT
from tests.fuzzing import fuzzed
from tests.launch.conftest import process

CONFIGS = sorted((ROOT / "configs").glob("*.flags"))

# For each setting another value than its default, all of which go together.
OTHER = {
    "on_divergence": "skip",
    "spike_factor": 2.5,
    "max_skips": 4,
    "max_rollbacks": 5,
    "check_replicas_every": 6,
    "max_failed_saves": 7,
    "corpus": "my texts/",
    "vocabulary": "characters",
    "min_count": 2,
    "valid_fraction": 0.1,
    "test_fraction": 1e-05,
    "split": "columns:50x50",
    "file_separator": r"\0",
    "input_kind": "jsonl",
    "text_field": "body",
    "bad_documents": "drop",
    "include": "*.txt,*.md",
    "exclude": "*.png",
    "binary": "allow",
    "train": "a.txt",
    "valid": "b.txt",
    "test": "*.txt",
    "cache_bytes": 123,
    "remote_patience": 12.5,
    "cache_dir": "cache",
    "batch_size": 128,
    "window": 64,
    "reverse": True,
    "rotate_streams": False,
    "reset_probability": 0.5,
    "reset_state": "document",
    "document_separator": " ",
    "mixture": "a:0.6,b:0.4",
    "mixture_from": "9:a:1",
    "segment": 4096,
    "shuffle_segments": False,
    "vocabulary_of": "data/other",
    "reader_threads": 2,
    "read_ahead": 4,
    "cell": "gru",
    "num_layers": 3,
    "hidden_size": 16,
    "embedding_size": 16,
    "tie_embeddings": True,
    "skip": True,
    "input_dropout": 0.1,
    "layer_dropout": 0.2,
    "output_dropout": 0.3,
    "dropout_mask": "symbol",
    "embedding_dropout": 0.4,
    "weight_drop": 0.5,
    "forget_bias": -1.5,
    "initializer": "normal",
    "init_scale": 0.1,
    "compute_dtype": "bfloat16",
    "tf32": False,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "momentum": 0.9,
    "rms_decay": 0.9,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 2e-10,
    "weight_decay": 0.2,
    "l2": 1e-6,
    "activation_penalty": 2.0,
    "activation_change_penalty": 1.0,
    "schedule": "cosine",
    "warmup_steps": 10,
    "decay_steps": 20,
    "drop_epochs": "3,5",
    "decay_rate": 0.5,
    "decay_start_epoch": 3,
    "final_fraction": 0.1,
    "clip_norm": 1.0,
    "clip_value": 5.0,
    "seed": 7,
    "num_steps": 30,
    "logical_shards": 4,
    "reduction": "fast",
    "log_every": 2,
    "evaluate_every": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "evaluate_symbols": 0,
    "sample_every": 5,
    "sample_prompt": "a",
    "sample_length": 7,
    "sample_temperature": 0.5,
    "eval_chunk": 100,
    "burn_in": 5,
    "evaluation_batch_size": 8,
}
# Those that do not go with the cell above, each with what it needs.
APART: tuple[dict[str, object], ...] = (
    {"nonlinearity": "relu", "cell": "rnn"},
    {"last_hidden_size": 8, "remat": True},
    {"cap_input_gate": True, "cell": "mlstm", "embedding_size": 8, "mogrifier_rounds": 5, "mogrifier_rank": 3}
    | {"zoneout": 0.1, "zoneout_cell": 0.5, "state_dropout": 0.2, "weight_norm": True, "train_initial_state": True},
    {"window_deviation": 3, "short_window_probability": 0.1, "window": 40},
    {"average": "ema", "ema_decay": 0.9},
    {"lstm_backend": "auto"},
    {"stop_after": 3},
    {"average": "asgd", "average_patience": 2, "schedule": "plateau", "plateau_patience": 3, "plateau_latest": 9}
    | {"average_latest": 8},
)


def parse(*arguments: str) -> tuple[TrainFlags, Config, list[str]]:
    chosen, _, _, config, given_ = train_flags.parse(["train", *arguments])
    return chosen, config, given_


def values(config: Config) -> dict[str, object]:
    return {name: getattr(getattr(config, section), name) for name, (section, _) in config_lib.flatten(config).items()}


# Settings and flags.


def test_every_setting_of_the_config_is_a_flag_and_reaches_it():
    default = values(Config())
    assert {name for group in (OTHER, *APART) for name in group} == default.keys()
    for group in (OTHER, *APART):
        assert not [name for name, value in group.items() if default[name] == value]
        _, config, given_ = parse(*(f"--{name}={flags._text(value)}" for name, value in group.items()))
        assert values(config) == default | group
        assert len(given_) == len(group)
    assert parse()[1:] == (Config(), [])


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "-h"])
@pytest.mark.parametrize("module", [train, evaluate, sample, tune], ids=["train", "evaluate", "sample", "tune"])
def test_help_has_every_flag_once_in_sections_with_its_default(module, flag):
    with pytest.raises(flags.Help) as caught:
        module.main(["program", "--run_dir=x", flag])
    text = str(caught.value)
    assert text.startswith((module.__doc__ or "").splitlines()[0])
    named = re.findall(r"^  --(\w+)=", text, re.MULTILINE)
    assert len(named) == len(set(named)) > 5
    assert max(map(len, text.splitlines())) <= 120
    if module is train:
        assert set(named) == {
            f.name
            for own in (TrainFlags, JobFlags, WatchdogFlags, MonitorFlags, TensorboardFlags)
            for f in dataclasses.fields(own)
        } | {*values(Config())}
        for section in dataclasses.fields(Config):
            title = (type(getattr(Config(), section.name)).__doc__ or "").splitlines()[0]
            assert text.count(f"\n\n{title}\n\n") == 1
        assert "--learning_rate=0.002 " in text and "--rotate_streams=true " in text
        assert f"One of {', '.join(CELLS)}." in text


def test_the_program_prints_its_help_and_exits_with_0():
    helped = process(sys.executable, "-m", "launch.train", "--helpshort", "--num_stepss=1")
    assert (helped.returncode, helped.stderr) == (cli.DONE, "")
    assert "--num_steps=1000" in helped.stdout


# Flagfiles.


@pytest.mark.parametrize("order", [lambda line: line, lambda line: line[::-1]], ids=["first", "last"])
@pytest.mark.parametrize("form", [["--flagfile={}"], ["--flagfile", "{}"], ["-flagfile={}"]])
def test_the_command_line_overrides_the_flagfile_wherever_it_stands_and_that_the_defaults(order, form, tmp_path):
    path = tmp_path / "my.flags"
    path.write_text("# two layers\n--hidden_size=32\n\n  --num_layers=4  \n--norotate_streams\n--skip\n")
    flagfile = [part.format(path) for part in form]
    line = order([["--hidden_size=64", "--noskip"], flagfile])
    _, config, given_ = parse(*(part for parts in line for part in parts))
    assert (config.model.hidden_size, config.model.num_layers, config.model.skip) == (64, 4, False)
    assert config == config_lib.replace(Config(), hidden_size=64, num_layers=4, rotate_streams=False)
    assert sorted(given_) == ["--hidden_size=64", "--num_layers=4", "--rotate_streams=false", "--skip=false"]


def test_a_later_flagfile_overrides_an_earlier_one_and_any_the_flagfiles_that_it_names(tmp_path):
    inner, outer, later = (tmp_path / name for name in ("inner", "outer", "later"))
    inner.write_text("--hidden_size=1\n--num_layers=1\n--seed=1\n")
    outer.write_text(f"--hidden_size=2\n--num_layers=2\n--flagfile={inner}\n")
    later.write_text("--hidden_size=3\n")
    _, config, _ = parse(f"--flagfile={outer}", f"--flagfile={later}")
    assert (config.model.hidden_size, config.model.num_layers, config.training.seed) == (3, 2, 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_parses_and_says_how_it_is_run(path):
    _, config, given_ = parse(f"--flagfile={path}")
    assert config != Config() and len(given_) >= 5
    assert f"python -m launch.train --flagfile=configs/{path.name}" in path.read_text()
    assert re.search("^# (Expected: |Reached here:)", path.read_text(), re.MULTILINE)


def test_there_are_config_files():
    assert {"large.flags", "tiny.flags", "tinyshakespeare.flags"} <= {path.name for path in CONFIGS}


@fuzzed()
@given(st.text(st.characters(exclude_characters="\0"), max_size=8), st.floats(1e-300, 1e38))
def test_what_was_given_is_a_flagfile_that_gives_it_again(tmp_path_factory, text, number):
    _, config, given_ = parse(f"--corpus={text}", f"--learning_rate={number!r}", "--noskip", "--document_separator= ")
    path = tmp_path_factory.getbasetemp() / "given.flags"
    path.write_bytes("\n".join(given_).encode() + b"\n")
    assert parse(f"--flagfile={path}")[1:] == (config, given_)


# config.json


def test_config_json_is_read_as_it_was_written():
    for config in (Config(), config_lib.replace(Config(), **OTHER)):
        assert config_lib.from_json(config_lib.to_json(config), "here") == config


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda tree: [], "is not the config of a run: not a json object"),
        (lambda tree: tree.pop("model") and tree, "is not the config of a run: section 'model' is missing"),
        (lambda tree: tree | {"model": 3}, "section 'model' is missing"),
        (lambda tree: tree | {"extra": {}}, "unknown section 'extra'"),
        (lambda tree: tree | {"model": {"hiden_size": 3}}, "unknown setting 'hiden_size' in section 'model'"),
        (lambda tree: tree | {"model": {"hidden_size": "3"}}, "model.hidden_size='3' is not an int"),
        (lambda tree: tree | {"model": {"hidden_size": True}}, "model.hidden_size=True is not an int"),
        (lambda tree: tree | {"model": {"skip": 1}}, "model.skip=1 is not a bool"),
        (
            lambda tree: tree | {"model": {"cell": "lstn"}},
            f"cell='lstn' is not one of {', '.join(CELLS)}",
        ),
        (lambda tree: tree | {"optimizer": {"learning_rate": float("nan")}}, "learning_rate=nan is not a finite"),
        (lambda tree: tree | {"training": {"num_steps": 10**400}}, "must be at most 2147483647"),
    ],
    ids=range(11),
)
def test_a_config_json_that_is_not_as_it_was_written_is_refused(damage, sentence):
    text = json.dumps(damage(json.loads(config_lib.to_json(Config()))))
    with pytest.raises(ValueError, match=r"^/there/config.json.*" + re.escape(sentence)):
        config_lib.from_json(text, "/there/config.json")


@pytest.mark.parametrize("text", ["", "{", "\0", "[" * 100_000, '{"model": 1' + "0" * 5000 + "}"], ids=range(5))
def test_what_is_not_json_at_all_is_refused(text):
    with pytest.raises(ValueError, match=r"^/there/config.json is not json: "):
        config_lib.from_json(text, "/there/config.json")


# What may change.


def test_free_settings_change_and_others_do_not():
    mutable = {name for name, (_, field) in config_lib.flatten(Config()).items() if field.metadata["mutable"]}
    assert mutable == {
        *(
            "mixture",
            "mixture_from",
            "vocabulary_of",
            "corpus",
            "binary",
            "cache_dir",
            "cache_bytes",
            "remote_patience",
        ),
        *("reader_threads", "read_ahead", "num_steps", "log_every", "evaluate_every"),
        *("checkpoint_every", "keep_checkpoints", "eval_chunk", "burn_in", "evaluation_batch_size"),
        *("reduction", "train", "valid", "test", "on_divergence", "spike_factor", "max_skips", "max_rollbacks"),
        *("check_replicas_every", "max_failed_saves", "lstm_backend", "tf32"),
        *("stop_after", "evaluate_symbols", "sample_every", "sample_prompt", "sample_length", "sample_temperature"),
    }
    forbidden, changed = config_lib.diff(Config(), config_lib.replace(Config(), **OTHER))
    apart = {"lstm_backend", "stop_after"}
    assert {line.partition(":")[0] for line in changed} == mutable - apart
    assert {line.partition(":")[0] for line in forbidden} == OTHER.keys() - mutable
    assert "num_steps: 1000 -> 30" in changed and "cell: lstm -> gru" in forbidden
    assert config_lib.diff(Config(), Config()) == ([], [])


def test_zeros_that_mean_the_obvious_number_are_filled_in_once_and_are_no_difference_later():
    run = config_lib.fill_automatic(Config(), 8)
    assert (run.training.logical_shards, run.optimizer.decay_steps) == (8, 1000)
    for flags_, rate in (({}, 0.97), ({"schedule": "plateau"}, 0.1), ({"schedule": "step", "drop_epochs": "2"}, 0.1)):
        assert config_lib.fill_automatic(config_lib.replace(Config(), **flags_), 8).optimizer.decay_rate == rate
    assert config_lib.fill_automatic(run, 2) == run
    longer = config_lib.replace(Config(), num_steps=5000)
    assert config_lib.diff(run, longer) == ([], ["num_steps: 1000 -> 5000"])
    assert config_lib.diff(run, config_lib.replace(longer, logical_shards=4))[0] == ["logical_shards: 8 -> 4"]
    assert config_lib.diff(run, config_lib.replace(longer, decay_steps=500))[0] == ["decay_steps: 1000 -> 500"]
    assert config_lib.diff(run, config_lib.replace(longer, decay_rate=0.5))[0] == ["decay_rate: 0.97 -> 0.5"]
