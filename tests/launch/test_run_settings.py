"""A run keeps its settings: what may change as it goes on, what it starts from, and what --dry_run says of it."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm.distributed import make as make_mesh
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from launch import evaluate, train
from launch.support import cli
from launch.support.train_flags import TrainFlags
from tests.jobs import last_line
from tests.launch.conftest import SMALL, TINY, refusal, steps, tree
from tests.launch.test_flags import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    (path / "text.txt").write_text("".join(random.choice(list("abcdefgh \n"), 7700)))
    return path


@pytest.fixture(scope="module")
def arguments(folder) -> tuple[str, ...]:
    return (
        TINY,
        *SMALL,
        "--num_steps=2",
        "--checkpoint_every=1",
        f"--corpus={folder / 'text.txt'}",
        f"--cache_dir={folder / 'cache'}",
    )


@pytest.fixture(scope="module")
def trained(folder, arguments) -> Path:
    """A run of two steps.  To be copied, not changed."""
    run_dir = folder / "trained"
    run = [*arguments, "--document_separator= ", f"--run_dir={run_dir}"]
    assert train.main(["train", *run]) == cli.DONE
    return run_dir


def test_flags_txt_of_a_run_is_a_flagfile_that_makes_the_same_run(trained):
    chosen, config, _ = parse(f"--flagfile={trained / 'flags.txt'}")
    assert config_lib.fill_automatic(config, 8) == run_directory.read(trained)[0]
    assert chosen == TrainFlags(run_dir=str(trained))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", b"\xff", "is not a whole run: 'utf-8' codec"),
        ("config.json", b'{"version": 2}', "config.json is not the config of a run: section 'corpus' is missing"),
        ("identity.json", None, "is not a whole run: "),
        ("identity.json", b"{", "identity.json is damaged: "),
        ("identity.json", b"{}", "identity.json is damaged: no corpus_fingerprint"),
        (
            "identity.json",
            b'{"corpus_fingerprint": "f", "vocabulary": {"kind": "words"}}',
            "identity.json is damaged: ",
        ),
    ],
    ids=["binary", "empty config", "lost", "half", "empty identity", "strange vocabulary"],
)
def test_a_damaged_run_directory_is_refused_and_left_as_it_is(name, content, sentence, trained, arguments, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    if content is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_bytes(content)
    before = tree(run_dir)
    assert sentence in refusal(evaluate.main, f"--run_dir={run_dir}")
    assert sentence in refusal(train.main, *arguments, "--document_separator= ", f"--run_dir={run_dir}")
    assert tree(run_dir) == before


def test_a_run_goes_on_with_free_settings_changed_which_the_log_tells_and_config_json_keeps(
    trained, arguments, tmp_path
):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    before, _ = run_directory.read(run_dir)
    changed = ("--num_steps=4", "--log_every=1", "--document_separator= ")
    assert train.main(["train", *arguments, *changed, f"--run_dir={run_dir}"]) == cli.DONE
    said = (run_dir / "log.txt").read_text()
    for change in ("num_steps: 2 -> 4", "log_every: 10 -> 1"):
        assert f"changed since the run was started or last continued: {change}\n" in said
    after, _ = run_directory.read(run_dir)
    assert after == config_lib.replace(before, num_steps=4, log_every=1)
    assert after.optimizer.decay_steps == 2 and last_line(run_dir)["step"] == 4


def test_a_run_keeps_its_own_separator_whatever_its_corpus_records_and_however_it_is_written(
    folder, arguments, tmp_path
):
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "document {n} of many"}}\n' for n in range(400)))
    text = CorpusSettings(corpus=str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path))
    corpus = f"--corpus={prepare(text, tmp_path / 'prepared')}"
    for name, begun, resumed in (("a", r"--document_separator=\n", ""), ("b", "", r"--document_separator=\0")):
        run_dir = f"--run_dir={tmp_path / name}"
        assert train.main(["train", *arguments, corpus, run_dir, *filter(None, [begun])]) == cli.DONE
        assert train.main(["train", run_dir, "--num_steps=3", *filter(None, [resumed])]) == cli.DONE
        separator = run_directory.read(tmp_path / name)[0].corpus.document_separator
        assert separator == (r"\n" if begun else r"\x00")
        assert last_line(tmp_path / name)["step"] == 3


def test_a_prepared_directory_says_which_vocabulary_the_run_has(folder, arguments, tmp_path):
    text = CorpusSettings(corpus=str(folder / "text.txt"), vocabulary="characters", cache_dir=str(tmp_path))
    prepared = prepare(text, tmp_path / "prepared")
    run = [*arguments, f"--corpus={prepared}", "--valid_fraction=0.05", f"--run_dir={tmp_path / 'run'}"]
    assert train.main(["train", *run]) == cli.DONE
    config, identity = run_directory.read(tmp_path / "run")
    assert config.corpus.vocabulary == identity.vocabulary.kind == "characters"
    assert train.main(["train", *run, "--vocabulary=characters"]) == cli.DONE


# --initial_checkpoint and --dry_run.


def saved_state(run_dir: Path, step: int | None = None):
    config, identity = run_directory.read(run_dir)
    abstract = train_state.abstract(config, identity.vocabulary.size, make_mesh())
    with Checkpoints(run_dir / "checkpoints", writable=False, log=print) as checkpoints:
        return checkpoints.restore(abstract, step=step)[0]


@pytest.mark.parametrize(
    ("named", "step"),
    [pytest.param("{}", 2, marks=pytest.mark.long), ("{}/checkpoints/1", 1)],
    ids=["newest", "a step"],
)
def test_an_initial_checkpoint_gives_its_parameters_and_nothing_else(named, step, trained, arguments, tmp_path):
    # With a learning rate of 0 the parameters after a step are those before it.
    run = [*arguments, f"--run_dir={tmp_path / 'run'}", "--learning_rate=0", "--num_steps=1"]
    start = f"--initial_checkpoint={named.format(trained)}"
    assert train.main(["train", *run, start]) == cli.DONE
    assert f"starting from the parameters of step {step} of {trained}\n" in (tmp_path / "run" / "log.txt").read_text()
    ours, theirs = saved_state(tmp_path / "run"), saved_state(trained, step)
    for mine, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()
    assert int(ours.step) == int(ours.opt_state.updates) == 1
    if step == 2:
        return
    # The same command again goes on with what the run has itself.
    assert train.main(["train", *run, start, "--num_steps=2"]) == cli.DONE
    assert "continuing from the checkpoint of step 1\n" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (["--hidden_size=4"], "cannot become the model that is asked for: a layer of 8 -> 4 units would lose"),
        (
            ["--weight_norm"],
            "cannot become the model .*: weight_norm: False -> True is another model, not a larger one",
        ),
        (["--cap_input_gate"], "cap_input_gate: False -> True is another model"),  # whose arrays have the same shapes
        (["--initial_checkpoint={}/checkpoints/9"], "there is no checkpoint 9 in .*: choose one of 1, 2$"),
        (["--initial_checkpoint={}/checkpoints"], "^initial_checkpoint=.*/checkpoints is not a run"),
    ],
    ids=["narrower", "another model", "other equations", "no such step", "no run"],
)
def test_an_initial_checkpoint_that_does_not_fit_is_refused_and_nothing_is_written(
    flag, sentence, trained, arguments, tmp_path
):
    run = (f"--run_dir={tmp_path / 'run'}", f"--initial_checkpoint={trained}", *(f.format(trained) for f in flag))
    assert re.search(sentence, refusal(train.main, *arguments, *run))
    assert not (tmp_path / "run").exists() and steps(trained) == [1, 2]


def test_a_dry_run_prints_its_table_and_makes_no_run(arguments, capsys, tmp_path):
    E = 24  # with which four bytes more or less of a gradient are another digit
    flags = [f"--embedding_size={E}", "--dry_run", f"--run_dir={tmp_path / 'run'}"]
    assert train.main(["train", *arguments, *flags]) == cli.DONE
    table = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    model = 256 * E + (E + 8) * 32 + 2 * 32 + 8 * 256 + 256  # embedding, cell, biases, softmax
    assert table["parameters"] == f"{model:,}"
    arithmetic = 6 * (model - 256 * E) * 16 * 16  # the embedding is looked up
    assert (
        table["arithmetic"]
        == f"{arithmetic:.2g} FLOP an update, {2 * arithmetic:.2g} in all: 0s at 1e+13 FLOP/s (a GPU)"
    )
    assert table["bytes per all-reduce"].startswith(f"{4 * (model + 2) / 1000:.1f} KB, once a step")
    assert table["steps per epoch"] == "27" and table["steps"].startswith("2 (0.07 epochs)")
    assert re.fullmatch(r"[\d.]+ [KM]B \(.*temporaries\)", table["memory per device"])
    assert re.fullmatch(r"[\d.e-]+ s, [\d,]+ symbols/s \(\d+ steps timed\)", table["time per step"])
    # tiny.flags samples never; a run of 2 steps evaluates at its end and saves after each.
    assert re.fullmatch(r"\w+: steps \w+, evaluations \(1\) \w+, saves \(2\) \w+", table["ETA"])
    assert table["logical shards"] == "8, 1 a device"
    assert not list(tmp_path.iterdir())
