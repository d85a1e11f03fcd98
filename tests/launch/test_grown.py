"""--initial_checkpoint of a smaller model or of other symbols: the model is grown, and says how."""

import jax
import numpy as np
import pytest

from charlstm import api
from charlstm.run import run_directory
from charlstm.run.initial_checkpoint import shared_symbols
from data_pipeline.vocabulary import Vocabulary
from launch import train
from launch.support import cli
from tests.jobs import last_line
from tests.launch.conftest import refusal
from tests.launch.test_begun import Killed, dies_before_it_trains  # noqa: F401

BYTES, ABC = Vocabulary("bytes"), Vocabulary("characters", "abcé")


@pytest.mark.parametrize(
    ("there", "here", "pairs"),
    [
        (BYTES, BYTES, [(number, number) for number in range(256)]),
        (BYTES, ABC, [(1, 97), (2, 98), (3, 99)]),
        (ABC, BYTES, [(97, 1), (98, 2), (99, 3)]),
        (Vocabulary("characters", "bcz"), ABC, [(0, 0), (2, 1), (3, 2)]),
        (Vocabulary("characters", "ßé"), BYTES, []),
    ],
)
def test_the_symbols_that_two_vocabularies_share_are_those_of_one_meaning(there, here, pairs):
    assert list(zip(*map(list, shared_symbols(there, here)), strict=True)) == pairs


@pytest.fixture
def larger(arguments, trained, tmp_path) -> list[str]:
    """Starts a wider model of characters from a trained one of bytes, and learns at a rate of 0."""
    flags = ["--vocabulary=characters", "--hidden_size=12", "--embedding_size=6", "--learning_rate=0", "--num_steps=1"]
    return [*arguments, *flags, f"--initial_checkpoint={trained}", f"--run_dir={tmp_path / 'run'}"]


def test_a_larger_model_of_other_symbols_begins_with_the_logits_of_the_trained_one(larger, trained, tmp_path):
    assert train.main(["train", *larger]) == cli.DONE
    assert (
        "grown: layers of 8 units, embedding 4 -> 12 units, embedding 6, 10 of 11 symbols keep their parameters, those "
        r"of 1 (the unknown symbol) are drawn, and 246 ('\x00' '\x01' '\x02' '\x03'"
    ) in (log := (tmp_path / "run" / "log.txt").read_text())
    assert f"starting from the parameters of step 40 of {trained}\n" in log
    assert run_directory.read_initial(tmp_path / "run").grown in log
    small, large = api.load(trained, "latest"), api.load(tmp_path / "run")
    text = "abc hgf\nedd"
    logits = np.asarray(small(small.vocabulary.encode(text))[0])[:, list(large.vocabulary.characters.encode())]
    np.testing.assert_allclose(np.asarray(large(large.vocabulary.encode(text))[0])[:, 1:], logits, rtol=1e-6, atol=1e-6)


def test_a_trained_initial_state_may_be_all_that_is_added(trained, arguments, tmp_path):
    flags = ["--train_initial_state", "--learning_rate=0", "--num_steps=1", f"--initial_checkpoint={trained}"]
    assert train.main(["train", *arguments, *flags, f"--run_dir={tmp_path / 'run'}"]) == cli.DONE
    assert "grown: an initial state that is learned, from zero on\n" in (tmp_path / "run" / "log.txt").read_text()
    before, after = api.load(trained, "latest").params, api.load(tmp_path / "run").params
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(after.cells[0].first))
    kept = after._replace(cells=tuple(cell._replace(first=None) for cell in after.cells))
    jax.tree.map(np.testing.assert_array_equal, kept, before)


@pytest.mark.long
def test_killed_before_its_first_checkpoint_it_is_grown_in_the_same_way_again(
    larger, trained, tmp_path, monkeypatch, request
):
    straight = [*larger[:-1], f"--run_dir={tmp_path / 'straight'}"]
    assert train.main(["train", *straight]) == cli.DONE
    request.getfixturevalue("dies_before_it_trains")
    with pytest.raises(Killed):
        train.main(["train", *larger])
    assert train.main(["train", f"--run_dir={tmp_path / 'run'}"]) == cli.DONE
    assert f"starting again from the parameters of step 40 of {trained}" in (tmp_path / "run" / "log.txt").read_text()
    digests = {last_line(tmp_path / name)["state_digest"] for name in ("run", "straight")}
    assert len(digests) == 1
    params = {name: api.load(tmp_path / name).params for name in ("run", "straight")}
    jax.tree.map(np.testing.assert_array_equal, *params.values())


def test_what_has_no_symbol_in_common_is_refused(trained, arguments, tmp_path):
    (tmp_path / "text.txt").write_text("яжщ" * 2500)
    flags = [f"--corpus={tmp_path / 'text.txt'}", "--vocabulary=characters", f"--run_dir={tmp_path / 'run'}"]
    sentence = refusal(train.main, *arguments, *flags, f"--initial_checkpoint={trained}")
    assert "has a vocabulary of 256 bytes" in sentence and "they have no symbol in common" in sentence
    assert not (tmp_path / "run").exists()
