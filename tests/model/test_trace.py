"""The textbook step with all that it computes: the model's own logits, gates that reproduce the states, held units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.model import language_model
from charlstm.model.layer import CELLS
from tests.model.test_layer import T, drawn, make, window

CASES = {
    "lstm": {"cell": "lstm", "cap_input_gate": True},
    "lstm, one-hot": {"cell": "lstm", "embedding_size": 0, "skip": True},
    "lstm, everything": {
        **{"cell": "lstm", "weight_norm": True, "train_initial_state": True, "mogrifier_rounds": 3, "zoneout": 0.2},
        **{"zoneout_cell": 0.4, "last_hidden_size": 4},
    },
    "gru": {"cell": "gru"},
    "rnn": {"cell": "rnn", "weight_norm": True},
    "relu": {"cell": "rnn", "nonlinearity": "relu"},
    "mlstm": {"cell": "mlstm"},
    "layer_norm_lstm": {"cell": "layer_norm_lstm"},
}
LONG = ("lstm", "rnn", "relu")  # whose parts the others have
EVERY_CASE = pytest.mark.parametrize(
    "changes", [pytest.param(c, marks=pytest.mark.long if n in LONG else ()) for n, c in CASES.items()], ids=CASES
)
SOME = {name: CASES[name] for name in ("lstm, everything", "layer_norm_lstm", "gru")}
SOME_CASES = pytest.mark.parametrize("changes", SOME.values(), ids=SOME)
IN_TYPES = [pytest.param("float64", name, marks=pytest.mark.long if name in LONG else ()) for name in CASES]
IN_TYPES += [pytest.param("float32", "lstm", marks=pytest.mark.long), ("bfloat16", "lstm"), ("bfloat16", "mlstm")]

traced = jax.jit(language_model.trace, static_argnums=(0, 5))
applied = jax.jit(language_model.apply, static_argnums=0)


@pytest.mark.parametrize(("dtype", "name"), IN_TYPES)
def test_its_logits_and_last_state_are_the_models(dtype, name):
    config = make(**CASES[name], compute_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 0.02}[dtype]
    with jax.enable_x64(dtype == "float64"):
        params, state = drawn(config, np.float64 if dtype == "float64" else np.float32)
        expected_state, expected = applied(config, params, state, *window())
        got_state, got, named = traced(config, params, state, *window())
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got_state, expected_state
    )
    for number, layer in enumerate(got_state, 1):
        for array, last in layer._asdict().items():
            assert last is None or np.array_equal(named[f"{number}.{array}"][-1], last)


@EVERY_CASE
def test_its_gates_reproduce_the_states(changes):
    if "zoneout" in changes:
        pytest.skip("zoneout mixes the states")
    config = make(**changes)
    with jax.enable_x64(True):
        params, state = drawn(config, np.float64)
        inputs_BT, reset_BT = window()
        _, _, named = traced(config, params, state, inputs_BT, np.zeros_like(reset_BT))
    for number, before in enumerate(state, 1):
        of = {name.partition(".")[2]: np.asarray(a) for name, a in named.items() if name.startswith(f"{number}.")}
        assert all(a.shape == (T, *before.h.shape) for a in of.values())
        h_before = np.concatenate([before.h[None], of["h"][:-1]])
        if "c" in of:
            c_before = np.concatenate([before.c[None], of["c"][:-1]])
            i = np.minimum(of["i"], 1 - of["f"]) if config.cap_input_gate else of["i"]
            np.testing.assert_allclose(of["c"], of["f"] * c_before + i * of["g"], atol=1e-12)
            if config.cell != "layer_norm_lstm":
                np.testing.assert_allclose(of["h"], of["o"] * np.tanh(of["c"]), atol=1e-12)
        elif config.cell == "gru":
            np.testing.assert_allclose(of["h"], (1 - of["u"]) * of["n"] + of["u"] * h_before, atol=1e-12)
        assert ("m" in of) == (config.cell == "mlstm")


@SOME_CASES
def test_a_held_unit_has_its_value_after_every_symbol_and_the_layers_above_and_the_logits_see_it(changes):
    config = make(**changes)
    params, state = drawn(config)
    array = "h" if config.cell in ("gru", "rnn") else "c"
    held = (((array, 2, 0.75),), ())
    _, free, _ = traced(config, params, state, *window())
    _, logits, named = traced(config, params, state, *window(), held)
    assert (np.asarray(named[f"1.{array}"])[:, :, 2] == 0.75).all()
    assert np.abs(np.asarray(logits - free)[0]).max() > 1e-6, "the first symbol's logits, too"
    if array == "c" and config.cell in ("lstm", "mlstm") and not config.zoneout:
        np.testing.assert_allclose(named["1.h"][:, :, 2], named["1.o"][:, :, 2] * np.tanh(0.75), rtol=1e-5)
    _, by_h, named = traced(config, params, state, *window(), ((), (("h", 1, -0.5),)))
    assert (np.asarray(named["2.h"])[:, :, 1] == -0.5).all() and np.abs(np.asarray(by_h - free)).max() > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        *({"cell": cell} for cell in CELLS),
        {"cell": "layer_norm_lstm", "embedding_size": 0},
        {"cell": "layer_norm_lstm", "mogrifier_rounds": 2},
        CASES["lstm, everything"],
    ],
    ids=lambda changes: ", ".join(map(str, changes.values()))[:40],
)
def test_the_derivative_by_the_scale_of_an_input_is_that_by_weights_scaled_for_one_symbol(changes):
    config, place = make(**changes), 3

    def scaled(params, factor):
        """Weights with which a symbol has another strength; where its projection is normalized, that is of the gain."""
        p, table = params.cells[0], params.embedding
        if p.norms is not None:
            p = p._replace(norms=p.norms._replace(gain_x=p.norms.gain_x * factor))
        if p.norms is None or config.mogrifier_rounds:
            p, table = (p._replace(w_x=p.w_x * factor), None) if table is None else (p, table * factor)
        return params._replace(embedding=table, cells=(p, *params.cells[1:]))

    with jax.enable_x64(True):
        params, state = drawn(config, np.float64)
        inputs_BT, reset_BT = window()

        def by_scale(scale_BT):
            return language_model.trace(config, params, state, inputs_BT, reset_BT, (), scale_BT)[1][:, 1].sum()

        @jax.jit
        def by_weights(factor):
            total, before = 0.0, state
            for parts, weights in (
                (slice(place), params),
                (slice(place, place + 1), scaled(params, factor)),
                (slice(place + 1, T), params),
            ):
                before, logits = language_model.apply(config, weights, before, inputs_BT[:, parts], reset_BT[:, parts])
                total += logits[:, 1].sum()
            return total

        got = np.asarray(jax.jit(jax.grad(by_scale))(jnp.ones(inputs_BT.shape)))
        expected = (by_weights(1 + 1e-5) - by_weights(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(got[1, place], expected, rtol=1e-5)
    assert not got[0].any() and np.abs(got[1]).min() > 1e-4
