"""The window by cuDNN's LSTM, given the reference that JAX's authors hold cuDNN to: no GPU is asked for.

`jax.experimental.rnn.lstm_ref` takes apart the same vector of weights, and computes in JAX what cuDNN computes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from charlstm import model
from charlstm.cells import cudnn, lstm
from charlstm.model_config import ModelConfig
from charlstm.noise import Noise
from tests.cells.test_cells import equations

V, B, T, H = 9, 4, 7, 6
SETTINGS = {
    "one-hot": {"input_dropout": 0.3, "between_dropout": 0.3},
    "a mask a symbol": {"input_dropout": 0.3, "between_dropout": 0.3, "dropout_mask": "symbol"},
    "embedded, with skip": {"embedding_size": 5, "input_dropout": 0.3, "skip": True, "weight_drop": 0.4},
    "weight norm, another last width": {"embedding_size": 5, "weight_norm": True, "last_hidden_size": 3},
    "remat": {"embedding_size": 5, "between_dropout": 0.3, "remat": True},
}
RESETS = {"none": [], "at first": [(0, 1)], "inside": [(0, 0), (3, 2)]}  # symbol, stream


@pytest.fixture
def reference(monkeypatch):
    """Puts the reference in cuDNN's place; what it returns is multiplied by the number here."""
    spoiled = [1.0]

    def lstm(
        x, h_0, c_0, weights, seq_lengths, input_size, hidden_size, num_layers, dropout, bidirectional, precision=None
    ):
        sizes = input_size, hidden_size, num_layers
        taken_apart = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
        y, h, c = rnn.lstm_ref(x, h_0, c_0, *taken_apart, seq_lengths, *sizes, dropout, bidirectional)
        return y * spoiled[0], h, c

    monkeypatch.setattr(rnn, "lstm", lstm)
    return spoiled


def value_and_gradients(recurrence: str, resets, **settings):
    config = ModelConfig(**({"num_layers": 2, "hidden_size": H, "recurrence": recurrence} | settings))
    random = np.random.default_rng(1)
    params, state = model.init(config, V, jax.random.key(1)), model.initial_state(config, B)
    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a) + 0.1 * random.normal(size=a.shape)), params)
    state = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), state)
    inputs_BT, reset_BT = random.integers(0, V, (B, T), dtype=np.int32), np.zeros((B, T), bool)
    for t, b in resets:
        reset_BT[b, t] = True
        if t == 0:  # what must not survive
            state = jax.tree.map(lambda a, b=b: a.at[b].set(np.nan), state)
    noise = Noise(jax.random.key(3), jnp.arange(B, dtype=jnp.int32))

    def value(params, state):
        new, features_TBH = model.features(config, params, state, inputs_BT, reset_BT, noise)
        return jnp.sin(features_TBH).sum() + sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(new))

    return jax.jit(jax.value_and_grad(value, (0, 1)))(params, state)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
def test_the_weights_are_laid_out_so_that_cudnn_computes_our_equations(reference, settings, resets):
    with jax.enable_x64(True):
        got, expected = (value_and_gradients(way, resets, **settings) for way in ("cudnn", "scan"))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=jax.tree_util.keystr(path))


def test_a_window_with_a_reset_inside_is_read_by_the_loop_and_any_other_by_cudnn(reference):
    reference[0] = np.nan
    with jax.enable_x64(True):  # of a width of its own: JAX keeps what it has traced
        values = {name: value_and_gradients("cudnn", resets, hidden_size=4)[0] for name, resets in RESETS.items()}
    assert {name: bool(np.isfinite(value)) for name, value in values.items()} == {
        "none": False, "at first": False, "inside": True
    }  # fmt: skip


def row_major(equation):
    layout = equation.params.get("layout")
    return layout is not None and layout.major_to_minor == tuple(range(equation.outvars[0].aval.ndim))


def test_what_cudnn_is_given_and_gives_is_row_major(monkeypatch):
    """In the program with JAX's own calls of cuDNN, which is traced, not compiled: no CPU knows them."""
    monkeypatch.setattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes", lambda *_: (8, 8), raising=False)
    params, state = lstm.init(jax.random.key(1), 3, 5, "glorot", 1.0, 1.0), lstm.initial_state(B, 5)
    window = jnp.zeros((T, B, 3)), jnp.zeros((T, B), bool)

    def value(*args):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(cudnn.recurrence(*args, window[1])))

    program = jax.make_jaxpr(jax.grad(value, (0, 1, 2)))(params, state, window[0])
    found = [equation for equation, _ in equations(program.jaxpr)]
    calls = [equation for equation in found if equation.primitive.name in ("rnn_fwd", "rnn_bwd")]
    assert [call.primitive.name for call in calls] == ["rnn_fwd", "rnn_bwd"]
    for call in calls:
        for given in (v for v in call.invars if v.aval.ndim > 1):
            assert any(row_major(equation) for equation in found if given in equation.outvars), f"{given} of {call}"
        for result in (v for v in call.outvars if v.aval.ndim > 1):
            users = [equation for equation in found if any(v is result for v in equation.invars)]
            assert users and all(map(row_major, users)), f"{result} of {call}"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cell": "gru"}, "cell=gru"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype=bfloat16"),
        ({"cap_input_gate": True}, "cap_input_gate=True"),
        ({"train_initial_state": True}, "train_initial_state=True"),
        ({"state_dropout": 0.1}, "state_dropout=0.1"),
        ({"zoneout": 0.1}, "zoneout=0.1"),
        ({"zoneout_cell": 0.1}, "zoneout_cell=0.1"),
        ({"mogrifier_rounds": 2, "embedding_size": 5}, "mogrifier_rounds=2"),
    ],
)
def test_what_cudnn_does_not_compute_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=f"recurrence=cudnn does not know {named}: use auto or scan"):
        ModelConfig(recurrence="cudnn", **settings)
    assert ModelConfig(recurrence="auto", **settings).beyond("cudnn") == named
