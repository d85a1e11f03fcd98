"""What surrounds a cell: the autodiff path beside plain autodiff, and each option where it must change nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.config.model import ModelConfig
from charlstm.inference.generate import generate
from charlstm.inference.sampling import Sampling
from charlstm.model import language_model, layer
from charlstm.model.dropout import DropoutKey
from charlstm.model.ops import autodiff_scan
from charlstm.types import CellParams
from tests.model.cells.test_cells import DERIVED, equations

V, B, T, H, E = 9, 4, 6, 6, 5
OPTIONS = {"state_dropout": 0.2, "zoneout": 0.2, "zoneout_cell": 0.4, "mogrifier_rounds": 3, "mogrifier_rank": 2}
EVERYTHING = OPTIONS | {"cell": "lstm", "weight_norm": True, "train_initial_state": True}
GENERAL = pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING | {"cap_input_gate": True, "last_hidden_size": 4},
        {"cell": "mlstm", "mogrifier_rounds": 2, "train_initial_state": True},
        {"cell": "gru", "zoneout": 0.3, "state_dropout": 0.3},
        {"cell": "layer_norm_lstm", "state_dropout": 0.3, "train_initial_state": True},
    ],
    ids=["lstm with everything", "mlstm", "gru", "layer_norm_lstm"],
)

# What is around a cell is the same code for all: every option with one cell, and the cell with most parameters.
ONE_EACH = pytest.mark.parametrize(
    "changes",
    [
        each if id in ("lstm with everything", "layer_norm_lstm") else pytest.param(each, marks=pytest.mark.long)
        for each, id in zip(GENERAL.args[1], GENERAL.kwargs["ids"], strict=True)
    ],
    ids=GENERAL.kwargs["ids"],
)


def make(**changes) -> ModelConfig:
    return ModelConfig(**({"num_layers": 2, "hidden_size": H, "embedding_size": E} | changes))


def dropout_key(step=0, rows=range(B)) -> DropoutKey:
    return DropoutKey(jax.random.fold_in(jax.random.key(3), step), jnp.asarray(rows, jnp.int32))


def drawn(config, dtype=np.float32, seed=1):
    """Parameters away from where gradients vanish, and a state."""
    random = np.random.default_rng(seed)
    params = language_model.init(config, V, jax.random.key(seed))
    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a) + 0.1 * random.normal(size=a.shape), dtype), params)
    state = jax.tree.map(
        lambda a: jnp.asarray(random.normal(size=a.shape), dtype), language_model.zero_state(config, B)
    )
    return params, state


def window(seed=0, length=T):
    random = np.random.default_rng(seed)
    return random.integers(0, V, (B, length), dtype=np.int32), random.random((B, length)) < 0.2


def value_and_gradient(config, params, state, given=None):
    def value(params, state):
        new, logits = language_model.apply(config, params, state, *window(), given)
        return jnp.sin(logits).sum() + sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(new))

    return jax.jit(jax.value_and_grad(value, (0, 1)))(params, state)


def assert_close(got, expected, tolerance=1e-11):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def plain_scan(step, params, constants, state, inputs, compute_dtype):
    """What `general.recurrence` must equal."""

    def read(state, symbol):
        state, _ = step(params, constants, state, symbol)
        return state, state.h

    return jax.lax.scan(read, state, inputs)


@pytest.mark.gpu
@ONE_EACH
def test_the_general_path_equals_plain_autodiff_in_value_and_every_gradient(changes, monkeypatch):
    config = make(num_layers=1, **changes)
    with jax.enable_x64(True):
        params, state = drawn(config, np.float64)
        got = value_and_gradient(config, params, state, dropout_key())
        monkeypatch.setattr(autodiff_scan, "recurrence", plain_scan)
        expected = value_and_gradient(config, params, state, dropout_key())
        assert all(leaf.any() for leaf in jax.tree.leaves(got)), "a gradient that is all zero proves nothing"
        assert_close(got, expected)


def test_every_choice_of_a_cell_is_one_and_has_a_hand_derived_backward_pass_if_it_is_sent_there():
    assert ModelConfig.__dataclass_fields__["cell"].metadata["choices"] == tuple(layer.CELLS), "one order"
    assert [name for name in layer.CELLS if ModelConfig(cell=name).has_custom_vjp] == list(DERIVED)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", [pytest.param(c, marks=() if c == "lstm" else pytest.mark.long) for c in DERIVED])
def test_the_general_path_equals_the_reverse_pass_by_hand(cell, monkeypatch):
    config = make(num_layers=1, cell=cell, state_dropout=0.3)
    with jax.enable_x64(True):
        params, state = drawn(config, np.float64)
        expected = value_and_gradient(config, params, state, dropout_key())
        monkeypatch.setattr(ModelConfig, "has_custom_vjp", False)
        assert_close(value_and_gradient(config, params, state, dropout_key()), expected)


def matrix_shaped(config, params, state):
    """(products shaped like a matrix of a cell, inside loops; loop carries so shaped), of the program of a gradient."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params.cells) if leaf.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    products = carried = 0
    for equation, in_scan in equations(jax.make_jaxpr(lambda *a: value_and_gradient(config, *a))(params, state).jaxpr):
        if equation.primitive.name == "dot_general" and in_scan:
            products += equation.outvars[0].aval.shape in shapes
        if equation.primitive.name == "scan":
            carried += sum(v.aval.shape in shapes for v in equation.outvars)
    return products, carried


def test_the_general_path_forms_no_gradient_of_a_matrix_in_the_loop(monkeypatch):
    config = make(num_layers=1, hidden_size=7, mogrifier_rounds=3, mogrifier_rank=2)
    params, state = drawn(config)
    assert matrix_shaped(config, params, state) == (0, 0)
    monkeypatch.setattr(autodiff_scan, "recurrence", plain_scan)
    assert min(matrix_shaped(config, params, state)) > 0, "the search finds what plain autodiff does in the loop"


@pytest.mark.gpu
@GENERAL
def test_long_windows_equal_short_ones_and_a_reset_leaves_the_other_streams_alone(changes):
    config = make(**changes)
    params, state = drawn(config)
    apply = jax.jit(lambda state, ids, reset: language_model.apply(config, params, state, ids, reset))
    ids, reset = window()
    final, logits = apply(state, ids, reset)
    pieces, carry = [], state
    for part in (slice(0, 3), slice(3, T)):
        carry, piece = apply(carry, ids[:, part], reset[:, part])
        pieces.append(piece)
    assert_close((carry, jnp.concatenate(pieces)), (final, logits), 1e-5)
    other = reset.copy()
    other[2, 4] ^= True
    changed, others = np.asarray(apply(state, ids, other)[1]), [0, 1, 3]
    np.testing.assert_array_equal(np.asarray(logits)[:, others], changed[:, others])
    np.testing.assert_array_equal(np.asarray(logits)[:4, 2], changed[:4, 2])
    assert (np.asarray(logits)[4:, 2] != changed[4:, 2]).any(1).all()


def test_a_mogrifier_of_zeros_changes_nothing():
    config, plain = make(mogrifier_rounds=5, mogrifier_rank=2), make()
    params, state = drawn(config)
    still = params._replace(
        cells=tuple(p._replace(rounds=jax.tree.map(jnp.zeros_like, p.rounds)) for p in params.cells)
    )
    bare = params._replace(cells=tuple(p._replace(rounds=None) for p in params.cells))
    expected = language_model.apply(plain, bare, state, *window())
    assert_close(language_model.apply(config, still, state, *window()), expected, 1e-5)
    assert np.abs(np.asarray(language_model.apply(config, params, state, *window())[1] - expected[1])).max() > 1e-3


def test_the_mogrifier_scales_the_input_first_and_then_the_state():
    config = make(mogrifier_rounds=2, num_layers=1)
    (p,) = language_model.init(config, V, jax.random.key(0)).cells
    random = np.random.default_rng(0)
    x, h = (jnp.asarray(random.normal(size=(B, width)), jnp.float32) for width in (E, H))
    assert [r.left.shape for r in p.rounds] == [(H, E), (E, H)]
    new_x = 2 / (1 + np.exp(-(h @ p.rounds[0].left + p.rounds[0].bias[None]))) * x
    new_h = 2 / (1 + np.exp(-(new_x @ p.rounds[1].left + p.rounds[1].bias[None]))) * h
    assert_close(layer.mogrifier.gate(p.rounds, x, h), (new_x, new_h), 1e-6)


def test_the_layer_normalised_lstm_normalises_both_products_over_all_gates_and_the_cell_state():
    params, states = drawn(make(cell="layer_norm_lstm"))
    p, state = params.cells[0], states[0]
    x = np.random.default_rng(0).normal(size=(B, E)).astype(np.float32)

    def norm(v, gain):
        return gain * (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)

    p, (h, c) = jax.tree.map(np.asarray, (p, state))
    a = norm(x @ p.w_x, p.norms.gain_x) + p.b_x + norm(h @ p.w_h, p.norms.gain_h) + p.b_h
    i, f, g, o = np.split(a, 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
    c = f * c + i * np.tanh(g)
    h = o * np.tanh(norm(c, p.norms.gain_c) + p.norms.b_c)
    assert_close(
        layer.layer_norm_lstm.step_projected(params.cells[0], state, x @ params.cells[0].w_x)[0],
        state._replace(h=h, c=c),
        1e-5,
    )


def one_layer(config, given):
    """What a layer makes of a window without resets, and what it began from."""
    params, (state,) = drawn(config)
    z_TBG = jnp.asarray(np.random.default_rng(0).normal(size=(T, B, 4 * config.hidden_size)), jnp.float32)
    final, h_TBH = layer.apply(config, params.cells[0], state, z_TBG, np.zeros((T, B), bool), given, 0, jnp.float32)
    return state, final, np.asarray(h_TBH)


def test_zoneout_keeps_units_as_they_were_by_row_and_symbol_and_its_mean_without_noise():
    wide = make(num_layers=1, hidden_size=64, zoneout=0.3)
    state, _, h_TBH = one_layer(wide, dropout_key())
    before = np.concatenate([np.asarray(state.h)[None], h_TBH[:-1]])
    kept = h_TBH == before
    assert abs(kept.mean() - 0.3) < 0.03
    assert len({kept[t, b].tobytes() for t in range(T) for b in range(B)}) == T * B
    assert (one_layer(wide, dropout_key(step=1))[2] != h_TBH).any()
    again = one_layer(wide, DropoutKey(dropout_key().key, jnp.asarray([0, 1, 7, 3], jnp.int32)))[2]
    np.testing.assert_array_equal(again[:, [0, 1, 3]], h_TBH[:, [0, 1, 3]])
    assert (again[:, 2] != h_TBH[:, 2]).any()
    # Without noise: a first symbol of .3 of the state and .7 of what the cell makes of it.
    plain = one_layer(dataclasses.replace(wide, zoneout=0.0), None)[2]
    np.testing.assert_allclose(one_layer(wide, None)[2][0], 0.3 * state.h + 0.7 * plain[0], rtol=1e-5, atol=1e-6)


def test_zoneout_of_the_cell_state_leaves_the_output_that_of_the_new_cell_state():
    config = make(num_layers=1, hidden_size=64, zoneout_cell=0.4)
    state, final, h_TBH = one_layer(config, dropout_key())
    plain = one_layer(dataclasses.replace(config, zoneout_cell=0.0), None)[2]
    np.testing.assert_allclose(h_TBH[0], plain[0], rtol=1e-5, atol=1e-6)
    assert (np.abs(h_TBH[1] - plain[1]) > 1e-3).any()
    assert final.c.shape == state.c.shape


def test_state_dropout_is_one_mask_a_window_of_each_layer_and_row_and_none_in_evaluation():
    config, plain = make(state_dropout=0.5), make()
    params, state = drawn(config)
    _, quiet = language_model.apply(config, params, state, *window())
    np.testing.assert_array_equal(quiet, language_model.apply(plain, params, state, *window())[1])
    _, whole = language_model.apply(config, params, state, *window(), dropout_key())
    assert (np.asarray(whole) != np.asarray(quiet)).any()
    two = jax.tree.map(lambda a: a[2:], state)
    ids, reset = window()
    _, half = language_model.apply(config, params, two, ids[2:], reset[2:], dropout_key(rows=[2, 3]))
    np.testing.assert_allclose(half, np.asarray(whole)[:, 2:], rtol=1e-5, atol=1e-6)


def test_weight_norm_starts_as_what_was_drawn_and_knows_directions_only():
    config = make(weight_norm=True)
    params, plain = (language_model.init(c, V, jax.random.key(1)) for c in (config, make()))
    _, state = drawn(config)
    assert_close(
        language_model.apply(config, params, state, *window()),
        language_model.apply(make(), plain, state, *window()),
        1e-5,
    )
    _, (gradient, _) = value_and_gradient(config, params, state)
    for p, dp in zip(params.cells, gradient.cells, strict=True):
        assert dp.gain.any()
        np.testing.assert_allclose((p.w_h * dp.w_h).sum(0), 0, atol=1e-4)
    longer = params._replace(cells=tuple(p._replace(w_h=3 * p.w_h) for p in params.cells))
    assert_close(
        language_model.apply(config, longer, state, *window()),
        language_model.apply(config, params, state, *window()),
        1e-5,
    )


@pytest.mark.gpu
def test_weight_norm_and_its_gradient_are_those_of_the_equation():
    random = np.random.default_rng(0)
    w_HG, d_HG, gain_G = (random.normal(size=shape) for shape in ((5, 7), (5, 7), (7,)))
    with jax.enable_x64():
        value, back = jax.vjp(lambda w, gain: layer.recurrent_weights(CellParams(w, w, w, w, gain)), w_HG, gain_G)
        plain, plain_back = jax.vjp(lambda w, gain: w * (gain / jnp.sqrt((w * w).sum(0)))[None], w_HG, gain_G)
        for found, expected in zip((value, *back(d_HG)), (plain, *plain_back(d_HG)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_trained_initial_state_begins_at_zero_and_is_what_a_reset_stream_starts_from(cell):
    config = make(cell=cell, train_initial_state=True)
    params, state = drawn(config)
    ids, reset = window()
    zero = language_model.reset_state(language_model.init(config, V, jax.random.key(0)), state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(zero))
    first = language_model.reset_state(params, state)
    assert all(leaf.any() for leaf in jax.tree.leaves(first))
    reset[:, 0] = False
    _, from_first = language_model.apply(config, params, first, ids, reset)
    reset[:, 0] = True
    _, from_reset = language_model.apply(config, params, state, ids, reset)
    np.testing.assert_array_equal(from_first, from_reset)


def test_a_sample_without_a_prompt_starts_from_the_trained_state():
    config = make(train_initial_state=True)
    params, _ = drawn(config)
    (made,) = generate(config, params, np.array([4]), Sampling(temperature=0), rows=1, length=1, seed=0)
    one = language_model.reset_state(params, language_model.zero_state(config, 1))
    _, logits = language_model.apply(config, params, one, np.array([[4]], np.int32), np.zeros((1, 1), bool))
    np.testing.assert_allclose(made.log_probabilities[0, 0], jax.nn.log_softmax(logits[0, 0]).max(), rtol=1e-5)


def parameters(config, vocabulary_size=205) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: counted(config, vocabulary_size))))


def counted(config, vocabulary_size):
    return language_model.init(config, vocabulary_size, jax.random.key(0))


def test_parameters_are_counted_as_the_published_models_have_them():
    # AWD-LSTM on enwik8: layers of 400-1840-1840-400, the softmax tied to the embedding.
    awd = ModelConfig(num_layers=3, hidden_size=1840, last_hidden_size=400, embedding_size=400, tie_embeddings=True)
    lstms = sum(4 * h * (d + h + 2) for d, h in ((400, 1840), (1840, 1840), (1840, 400)))
    assert parameters(awd) == lstms + 205 * 400 + 205 == 47_270_045
    small, plain = make(num_layers=1), parameters(make(num_layers=1))
    for changes, more in (
        ({"weight_norm": True}, 4 * H),
        ({"train_initial_state": True}, 2 * H),
        ({"cell": "mlstm"}, (E + H) * H),
        ({"cell": "layer_norm_lstm"}, 4 * H + 4 * H + H + H),
        ({"mogrifier_rounds": 3}, 3 * E * H + 2 * E + H),
        ({"mogrifier_rounds": 3, "mogrifier_rank": 2}, 3 * 2 * (E + H) + 2 * E + H),
        ({"last_hidden_size": 4}, parameters(make(num_layers=1, hidden_size=4)) - plain),
    ):
        assert parameters(dataclasses.replace(small, **changes)) == plain + more, changes


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"remat": True, "zoneout_cell": 0.1}, "remat reads a window in pieces, and zoneout_cell draws a mask for the"),
        (
            {"remat": True, "dropout_mask": "symbol", "layer_dropout": 0.1},
            "remat reads a window in pieces, and dropout_mask=symbol draws a mask",
        ),
        ({"nonlinearity": "relu"}, "nonlinearity=relu is one of cell=rnn, and this is cell=lstm"),
        ({"cap_input_gate": True, "cell": "gru"}, "cap_input_gate=True is an LSTM's, and this is cell=gru"),
        ({"zoneout_cell": 0.1, "cell": "rnn"}, "zoneout_cell=0.1 is an LSTM's, and this is cell=rnn"),
        ({"mogrifier_rounds": 2, "cell": "gru"}, "mogrifier_rounds=2 is an LSTM's"),
        ({"mogrifier_rounds": 2, "embedding_size": 0}, "mogrifier_rounds=2 scales the embedded symbol, and embedding"),
        ({"mogrifier_rank": 2}, "mogrifier_rank=2 does nothing with mogrifier_rounds=0"),
        ({"mogrifier_rounds": -1}, "mogrifier_rounds=-1 must be 0 or more"),
        (
            {"weight_norm": True, "cell": "layer_norm_lstm"},
            "weight_norm gives the weights lengths that cell=layer_norm",
        ),
        ({"weight_norm": True, "initializer": "normal", "init_scale": 0.0}, "weight_norm needs directions"),
        ({"zoneout": 1.0}, "zoneout=1.0 must be at least 0 and less than 1"),
        ({"state_dropout": -0.1}, "state_dropout=-0.1 must be at least 0 and less than 1"),
        ({"skip": True, "last_hidden_size": 3}, "skip adds the outputs of all layers: last_hidden_size=3 must be"),
        ({"tie_embeddings": True, "last_hidden_size": 3}, "to equal last_hidden_size=3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match="^.*" + re.escape(sentence)) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)
