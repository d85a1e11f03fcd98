"""The seed programs and `charlstm` are one line: from the same weights, on the same text, they do the same.

The model has a bias on either side of the gates, as PyTorch and char-rnn; here the recurrent one is held at 0.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm import rng as rng_lib
from charlstm.config import Config
from charlstm.inference import generate
from charlstm.model import language_model
from charlstm.reference import min_char_rnn, numpy_lstm
from charlstm.training import step, train_state
from charlstm.training.loss import cross_entropy
from charlstm.types import CellParams, CellState, ModelParams
from data_pipeline.batch import Batch
from data_pipeline.streams import StreamPlan
from tests.conftest import ROOT
from tests.model.cells.test_cells import equations

V, H, T, UPDATES = 7, 9, 6, 100
RATE = 0.05


def make_config(cell: str, B: int, **changes) -> Config:
    small = {
        "cell": cell, "num_layers": 1, "hidden_size": H, "batch_size": B, "window": T, "rotate_streams": False,
        "reset_probability": 0.0, "learning_rate": RATE, "logical_shards": 1, "decay_steps": 1,
    }  # fmt: skip
    return config_lib.replace(Config(), **(small | changes))


class MinCharRnn:
    """The plain network, which reads one stream, behind the same three words as the LSTM."""

    config = make_config(
        "rnn",
        B=1,
        # Of the sum over the window, not of the mean: see configs/tinyshakespeare.flags.
        optimizer="adagrad",
        epsilon=1e-8 / T,
        clip_value=5 / T,
    )

    def __init__(self) -> None:
        drawn = min_char_rnn.initialize(np.random.default_rng(0), V, H)
        self.weights = {name: 30 * w for name, w in drawn.items()}  # so that every weight matters from the start
        self.squares = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.state = np.zeros(H)

    def reset(self) -> None:
        self.state = np.zeros(H)

    def loss_and_gradients(self, x_TB, y_TB):
        loss, gradients, self.state = min_char_rnn.loss_and_gradients(self.weights, x_TB[:, 0], y_TB[:, 0], self.state)
        return loss / T, {name: g / T for name, g in gradients.items()}

    def update(self, gradients) -> None:
        min_char_rnn.adagrad(self.weights, {k: g * T for k, g in gradients.items()}, self.squares, RATE)

    def sample(self, rng, x, length):
        return min_char_rnn.sample(self.weights, rng, x, length)

    def params(self, dtype) -> ModelParams:
        return model_params(self.weights | {"b": self.weights["b_h"]}, dtype)


class NumpyLstm:
    """The LSTM, on three streams."""

    config = make_config("lstm", B=3, optimizer="adam")

    def __init__(self) -> None:
        self.lstm = numpy_lstm.Lstm(np.random.default_rng(0), V, H)
        self.weights = self.lstm.weights

    def reset(self) -> None:
        self.state = self.lstm.zero_state(3)

    def loss_and_gradients(self, x_TB, y_TB):
        p_TBV, self.state, tape = self.lstm.forward(x_TB, self.state)
        return numpy_lstm.mean_loss(p_TBV, y_TB), self.lstm.backward(y_TB, tape)

    def update(self, gradients) -> None:
        self.lstm.update(gradients, RATE)

    def sample(self, rng, x, length):
        return self.lstm.sample(rng, x, length)

    def params(self, dtype) -> ModelParams:
        return model_params(self.weights, dtype)


PROGRAMS = pytest.mark.parametrize("program", [MinCharRnn, NumpyLstm])


def model_params(w: dict[str, np.ndarray], dtype) -> ModelParams:
    cell = CellParams(w["w_x"], w["w_h"], w["b"], np.zeros_like(w["b"]))
    return jax.tree.map(lambda a: np.array(a, dtype), ModelParams(None, (cell,), w["w_out"], w["b_out"]))


def text(B: int, windows: int = 10) -> np.ndarray:
    """Of whole windows, and the one symbol more that the last of them predicts; not uniform, so there is to learn."""
    rng = np.random.default_rng(5)
    jumps = rng.choice([1, 1, 1, 2, 4], B * windows * T + 1)
    return np.cumsum(jumps) % V


class InMemory(np.ndarray):
    def read(self, start, stop):
        return np.asarray(self[start:stop])


def batches(ids: np.ndarray, B: int, count: int) -> list[Batch]:
    """What `charlstm` reads."""
    plan = StreamPlan(len(ids), B, T, rotate=False)
    return [plan.read(ids.view(InMemory), number, range(B)) for number in range(count)]


def trained(config: Config, params: ModelParams, read: list[Batch]) -> tuple[ModelParams, list[float]]:
    """The parameters after an update on each of the batches, and the loss of each."""
    mesh = distributed.make(jax.devices()[:1])
    state, losses = train_state.place(mesh, train_state.init(config, V)._replace(params=params)), []
    train_step = step.make(config, V, mesh, steps_per_epoch=10)
    for batch in read:
        state, metrics = train_step(state, distributed.put(mesh, distributed.BY_STREAM, batch))
        losses.append(float(metrics.loss))
        (cell,) = state.params.cells
        state = state._replace(params=state.params._replace(cells=(cell._replace(b_h=jnp.zeros_like(cell.b_h)),)))
    return jax.tree.map(np.asarray, state.params), losses


@PROGRAMS
def test_a_seed_program_and_the_model_have_the_same_losses_and_weights_over_100_updates(program):
    seed, config = program(), program.config
    B = config.streams.batch_size
    ids = text(B)
    params, losses = trained(config, seed.params(np.float32), batches(ids, B, UPDATES))
    x_WTB, y_WTB = numpy_lstm.windows(ids, B, T)
    expected = []
    for number in range(UPDATES):
        window = number % len(x_WTB)
        if window == 0:
            seed.reset()
        loss, gradients = seed.loss_and_gradients(x_WTB[window], y_WTB[window])
        seed.update(gradients)
        expected.append(loss)
    assert np.mean(expected[-10:]) < 0.75 * expected[0], "nothing was learned"
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(seed.params(np.float64)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@PROGRAMS
def test_a_seed_programs_gradients_are_the_models_to_1e_10_in_float64(program):
    seed, config = program(), program.config
    B = config.streams.batch_size
    x_WTB, y_WTB = numpy_lstm.windows(text(B), B, T)
    seed.reset()
    seed.loss_and_gradients(x_WTB[0], y_WTB[0])
    carried = jax.tree.map(np.copy, seed.state)
    _, expected = seed.loss_and_gradients(x_WTB[1], y_WTB[1])
    with jax.enable_x64(True):
        h, c = (carried[None], None) if program is MinCharRnn else carried
        state = (CellState(h, c),)

        def mean_loss(params):
            _, logits = language_model.apply(config.model, params, state, x_WTB[1].T, np.zeros((B, T), bool))
            return cross_entropy(logits, y_WTB[1]).mean()

        gradient = jax.jit(jax.grad(mean_loss))(seed.params(np.float64))
    (cell,) = gradient.cells
    ours = {"w_x": cell.w_x, "w_h": cell.w_h, "w_out": gradient.w_out, "b_out": gradient.b_out}
    ours["b_h" if "b_h" in expected else "b"] = cell.b_h
    assert ours.keys() == expected.keys()
    for name, g in expected.items():
        assert np.abs(g).max() > 1e-3
        np.testing.assert_allclose(ours[name], g, atol=1e-10, rtol=0, err_msg=name)


class SameDraws:
    """In place of a NumPy generator: the noise that `generate` gives its first row, symbol after symbol."""

    def __init__(self, seed: int) -> None:
        self.row, self.position = jax.random.fold_in(rng_lib.named(jax.random.key(seed), "sample"), 0), 0

    def gumbel(self, size: int) -> np.ndarray:
        noise = jax.random.gumbel(jax.random.fold_in(self.row, self.position), (size,))
        self.position += 1
        return np.asarray(noise)


@PROGRAMS
def test_a_seed_program_and_the_model_make_the_same_text_of_the_same_draws(program):
    seed, config = program(), program.config
    chunks = generate.generate(
        config.model, seed.params(np.float32), np.array([3]), generate.Sampling(), rows=1, length=60, seed=8
    )
    ours = np.concatenate([chunk.ids[0] for chunk in chunks]).tolist()
    assert ours == seed.sample(SameDraws(8), 3, 60)
    assert len(set(ours)) == V, "a text that says little of the draws"


# What was wrong in the program that this one grew from.


def test_every_stream_carries_its_own_state_h_and_c_each_from_its_own():
    config, params = NumpyLstm.config, NumpyLstm().params(np.float32)
    inputs, reset = np.random.default_rng(0).integers(V, size=(3, T)).astype(np.int32), np.zeros((3, T), bool)
    (state,), _ = language_model.apply(config.model, params, language_model.zero_state(config.model, 3), inputs, reset)
    lstm = NumpyLstm().lstm
    for row in range(3):
        _, (h, c), _ = lstm.forward(inputs[row : row + 1].T, lstm.zero_state(1))
        np.testing.assert_allclose(state.h[row], h[0], atol=1e-6)
        np.testing.assert_allclose(state.c[row], c[0], atol=1e-6)
    assert np.abs(state.h[:-1] - state.h[-1:]).max(1).min() > 1e-3, "the streams are alike: a copy would not be seen"


def test_the_cell_state_is_not_squashed_and_counts_beyond_1():
    config = make_config("lstm", B=1, forget_bias=20.0)
    params = language_model.init(config.model, V, jax.random.key(0))
    (cell,) = params.cells
    a_i, a_f, a_g, a_o = np.split(np.asarray(cell.b_x), 4)
    open_wide = cell._replace(b_x=np.concatenate([a_i + 20, a_f, a_g + 20, a_o]))
    params = params._replace(cells=(open_wide,))
    inputs = np.zeros((1, T), np.int32)
    (state,), _ = language_model.apply(
        config.model, params, language_model.zero_state(config.model, 1), inputs, inputs > 0
    )
    np.testing.assert_allclose(state.c, T, atol=1e-3)
    lstm = numpy_lstm.Lstm(np.random.default_rng(0), V, H)
    lstm.weights["b"] = open_wide.b_x.astype(np.float64)
    np.testing.assert_allclose(lstm.forward(inputs.T, lstm.zero_state(1))[1][1], T, atol=1e-3)


def test_a_row_of_the_next_batch_goes_on_with_the_text_of_the_same_row():
    ids = np.arange(3 * 10 * T + 1)
    x_WTB, y_WTB = numpy_lstm.windows(ids, 3, T)
    for number, batch in enumerate(batches(ids, 3, 10)):
        np.testing.assert_array_equal(batch.inputs, x_WTB[number].T)
        np.testing.assert_array_equal(batch.targets, y_WTB[number].T)
        np.testing.assert_array_equal(batch.inputs[:, 0], [b * 10 * T + number * T for b in range(3)])


def test_a_process_with_other_hashes_makes_the_same_vocabulary():
    program = (
        "from data_pipeline.vocabulary import Vocabulary\n"
        "seen = set('the quick brown fox')\n"
        "print(Vocabulary.from_counts(dict.fromkeys(map(ord, seen), 1), 1).characters, ''.join(seen), sep='\\n')"
    )
    said = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.splitlines())
    (one, hashed), (other, hashed_otherwise) = said
    assert one == other
    assert hashed != hashed_otherwise, "the two sets have one order, and show nothing"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_longer_window_is_no_longer_program(cell, monkeypatch):
    monkeypatch.setattr(
        "charlstm.model.ops.compiler.options", dict
    )  # a step within another program can have none of its own

    def length(T: int) -> int:
        config = make_config(cell, B=2, window=T)
        mesh = distributed.make(jax.devices()[:1])
        ids = jax.ShapeDtypeStruct((2, T), np.uint8)
        batch = Batch(ids, ids, jax.ShapeDtypeStruct((2, T), np.bool_))
        train_step = step.make(config, V, mesh, steps_per_epoch=10)
        program = jax.make_jaxpr(train_step)(jax.eval_shape(lambda: train_state.init(config, V)), batch)
        return sum(1 for _ in equations(program.jaxpr))

    assert length(8) == length(64)
