"""Small models of every cell with drawn weights, and the interpreter of `make interop`, which others read them with."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

import charlstm as cl
from charlstm.api import Model
from charlstm.model import language_model
from data_pipeline.vocabulary import Vocabulary
from tests.jobs import ROOT

INTEROP_PYTHON = "CHARLSTM_INTEROP_PYTHON"
BYTES = Vocabulary("bytes")
CHARACTERS = Vocabulary("characters", "".join(sorted("\n abcdefghij'äß😀")))

# Name -> settings of a model, of those that say what it computes.  Each is two layers of 8 if it says nothing else.
MODELS: dict[str, dict] = {
    "lstm": {"embedding_size": 5},
    "lstm one-hot": {},
    "lstm of one layer": {"num_layers": 1, "embedding_size": 5},
    "lstm of one last layer": {"num_layers": 1, "embedding_size": 5, "last_hidden_size": 6},
    "lstm tied": {"embedding_size": 8, "tie_embeddings": True},
    "lstm weight norm": {"embedding_size": 5, "weight_norm": True},
    "lstm capped": {"embedding_size": 5, "cap_input_gate": True},
    "lstm skip": {"embedding_size": 5, "num_layers": 3, "skip": True},
    "lstm last layer": {"num_layers": 3, "embedding_size": 6, "last_hidden_size": 6, "tie_embeddings": True},
    "lstm zoneout": {"zoneout": 0.2, "zoneout_cell": 0.3},
    "lstm initial state": {"train_initial_state": True},
    "gru": {"embedding_size": 5},
    "gru one-hot": {},
    "gru last layer": {"embedding_size": 5, "num_layers": 3, "last_hidden_size": 6},
    "gru initial state": {"train_initial_state": True, "zoneout": 0.1},
    "rnn": {"embedding_size": 5},
    "rnn relu": {"nonlinearity": "relu"},
    "mlstm": {"embedding_size": 5, "weight_norm": True},
    "mlstm capped": {"cap_input_gate": True, "zoneout": 0.2},
    "layer_norm_lstm": {"embedding_size": 5, "cap_input_gate": True},
    "layer_norm_lstm one-hot": {"last_hidden_size": 6},
    "lstm mogrifier": {"embedding_size": 5, "mogrifier_rounds": 5, "cap_input_gate": True, "skip": True},
    "lstm mogrifier rank": {"embedding_size": 5, "mogrifier_rounds": 4, "mogrifier_rank": 2, "num_layers": 3},
    "mlstm mogrifier": {"embedding_size": 5, "mogrifier_rounds": 2, "train_initial_state": True},
    "layer_norm_lstm mogrifier": {"embedding_size": 5, "mogrifier_rounds": 3},
}

# Of all MODELS, those that together have everything.
SHORT = (
    "lstm last layer",
    "lstm zoneout",
    "gru initial state",
    "rnn relu",
    "mlstm capped",
    "layer_norm_lstm mogrifier",
)


def each(names: Iterable[str], short: tuple[str, ...] = SHORT) -> list:
    """The names as parameters of a test; those that are not in `short` are for `make long`."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in names]


def drawn(name: str, vocabulary: Vocabulary = CHARACTERS, **settings) -> Model:
    """One of MODELS, in which no weight is zero or one: biases, gains and first states are drawn, too."""
    settings = {"cell": name.split()[0], "num_layers": 2, "hidden_size": 8} | MODELS[name] | settings
    config = cl.Config(**settings, vocabulary=vocabulary.kind)
    params = language_model.init(config.model, vocabulary.size, jax.random.key(0))
    random = np.random.default_rng(len(name))
    moved = jax.tree.map(lambda a: a + np.float32(0.3) * random.standard_normal(a.shape, np.float32), params)
    return Model(config, vocabulary, moved, 7)


def windows_of(model: Model, batch: int = 1, length: int = 20, count: int = 3) -> np.ndarray:
    """Ids `[count, batch, length]`: what is read window by window, with carried state."""
    return np.random.default_rng(1).integers(0, model.vocabulary.size, (count, batch, length))


def logits_of(model: Model, ids_NBT: np.ndarray) -> np.ndarray:
    """The model's own logits of all windows, one after the other, `[count, batch, length, V]`."""
    state, found = None, []
    for ids_BT in ids_NBT:
        logits, state = model(ids_BT, state)
        found.append(np.asarray(logits))
    return np.stack(found)


def assert_close(got, expected, relative: float = 1e-5) -> None:
    """Equal to so small a part of the largest logit of the same symbol."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    error = np.abs(got - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() <= relative, f"differs by {error.max():.1e} of the largest logit"


def run(python: str | Path, *arguments: str | Path, cwd: Path) -> str:
    """What a program prints that another interpreter runs in `cwd`, without a way to this project."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def other_python() -> str:
    """The interpreter that `make interop` made: it has torch, onnxruntime and the like, and not JAX.

    A test that uses it is marked `interop`; it asks for a package that may be absent by `needs`.
    """
    python = os.environ.get(INTEROP_PYTHON) or str(ROOT / ".venv-interop" / "bin" / "python")
    if not os.access(python, os.X_OK):
        pytest.skip(f"there is no {python}: `make interop` makes it, {INTEROP_PYTHON} names another")
    assert subprocess.run([python, "-c", "import jax"], capture_output=True).returncode, f"{python} has JAX"
    return python


def needs(python: str, *packages: str) -> None:
    """Skips the test where the other interpreter lacks a package."""
    for package in packages:
        asked = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
        if subprocess.run([python, "-c", asked]).returncode:
            pytest.skip(f"{python} has no {package}")
