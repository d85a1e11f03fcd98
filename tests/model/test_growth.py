"""A grown model computes what the trained one did, what is new learns, and what cannot be exact is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.config.model import ModelConfig
from charlstm.model import growth, language_model
from charlstm.model.growth import Kept
from charlstm.training.loss import cross_entropy

V, T, B = 7, 9, 3
IDS = np.random.default_rng(0).integers(0, V, (B, 2 * T))
ALL = Kept(np.arange(V), np.arange(V))
LSTM = {"num_layers": 2, "hidden_size": 5, "embedding_size": 4}
SKIP = LSTM | {"skip": True}
RELU = LSTM | {"cell": "rnn", "nonlinearity": "relu"}
WIDER = {"hidden_size": 8}


def trained(config: ModelConfig, seed: int = 1):
    """Parameters as training leaves them: none is what it began with."""
    params = language_model.init(config, V, jax.random.key(seed))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(a + 0.1 * random.normal(size=a.shape), np.float32), params)


def logits(config: ModelConfig, params, ids=IDS) -> np.ndarray:
    """Of two windows, the state carried over."""
    state = language_model.reset_state(params, language_model.zero_state(config, B))
    found, run = [], jax.jit(language_model.apply, static_argnums=0)
    for window in np.split(ids, 2, axis=1):
        state, out_TBV = run(config, params, state, jnp.asarray(window), jnp.zeros((B, T), bool))
        found.append(np.asarray(out_TBV))
    return np.concatenate(found)


def grown(old: ModelConfig, new: ModelConfig, kept: Kept = ALL, size: int = V):
    params = trained(old)
    assert growth.refusal(old, new) == ""
    return params, growth.grow(params, new, kept, language_model.init(new, size, jax.random.key(2)))


CASES = {
    "lstm, wider": (LSTM, WIDER),
    "lstm, the last layer alone": (LSTM | {"last_hidden_size": 3}, {"last_hidden_size": 6}),
    "lstm, a wider embedding": (LSTM, {"embedding_size": 9, "hidden_size": 6}),
    "lstm, tied": (LSTM | {"embedding_size": 5, "tie_embeddings": True}, {"embedding_size": 8, "hidden_size": 8}),
    "lstm, one-hot": (LSTM | {"embedding_size": 0}, WIDER),
    "lstm, weight norm": (LSTM | {"weight_norm": True}, WIDER),
    "lstm, a trained state": (LSTM | {"train_initial_state": True}, WIDER),
    "lstm, a state to be trained": (LSTM, {"hidden_size": 8, "train_initial_state": True}),
    "capped, mogrifier": (LSTM | {"cap_input_gate": True, "mogrifier_rounds": 3}, WIDER),
    "mogrifier, low rank": (LSTM | {"mogrifier_rounds": 4, "mogrifier_rank": 2}, WIDER | {"embedding_size": 6}),
    "mlstm, wider": (LSTM | {"cell": "mlstm"}, WIDER),
    "gru, wider": (LSTM | {"cell": "gru"}, WIDER),
    "rnn, wider": (LSTM | {"cell": "rnn"}, WIDER),
    "relu, wider and deeper": (RELU, WIDER | {"num_layers": 4}),
    "relu, deeper, weight norm": (RELU | {"weight_norm": True}, {"num_layers": 3}),
    "lstm, deeper": (SKIP, {"num_layers": 4}),
    "lstm, deeper and wider": (SKIP, {"num_layers": 3, "hidden_size": 8}),
    "lstm, deeper, weight norm": (SKIP | {"weight_norm": True}, {"num_layers": 3}),
    "lstm, deeper, mogrifier": (SKIP | {"mogrifier_rounds": 2}, {"num_layers": 3}),
    "lstm, deeper, from one layer": (LSTM | {"num_layers": 1}, {"num_layers": 2, "skip": True}),
    "mlstm, deeper": (SKIP | {"cell": "mlstm"}, {"num_layers": 3}),
    "gru, deeper": (SKIP | {"cell": "gru"}, {"num_layers": 3}),
    "rnn, deeper": (SKIP | {"cell": "rnn"}, {"num_layers": 3}),
    "layer norm, deeper": (SKIP | {"cell": "layer_norm_lstm"}, {"num_layers": 3, "embedding_size": 6}),
}  # fmt: skip


# What is like another case in how it grows is in `make long`.
ALIKE = {
    "lstm, the last layer alone", "lstm, weight norm", "lstm, a state to be trained", "capped, mogrifier",
    "lstm, deeper and wider", "lstm, deeper, weight norm", "lstm, deeper, mogrifier", "relu, deeper, weight norm",
    "mlstm, deeper", "rnn, deeper", "rnn, wider",
}  # fmt: skip
# The kinds of zeros that have to move.
LEARNS = ("lstm, wider", "lstm, deeper", "gru, deeper", "relu, wider and deeper", "mogrifier, low rank")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.long) if c in ALIKE else c for c in CASES])
def test_a_larger_model_has_the_logits_of_the_smaller_one(case):
    old, new = (ModelConfig(**settings) for settings in (CASES[case][0], CASES[case][0] | CASES[case][1]))
    before, after = grown(old, new)
    expected, found = logits(old, before), logits(new, after)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("case", [c if c in LEARNS else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_all_that_is_new_learns(case):
    """After a few steps of gradient descent no array is what it was: none of them is dead."""
    old, new = (ModelConfig(**settings) for settings in (CASES[case][0], CASES[case][0] | CASES[case][1]))
    _, after = grown(old, new)
    resets, ids = jnp.zeros((B, 2 * T - 1), bool), jnp.asarray(IDS)

    def loss(params):
        state = language_model.reset_state(params, language_model.zero_state(new, B))
        _, out_TBV = language_model.apply(new, params, state, ids[:, :-1], resets)
        return cross_entropy(out_TBV, ids[:, 1:].T).mean()

    step = jax.jit(lambda params: jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params)))
    learned = after
    for _ in range(new.num_layers - old.num_layers + 2):  # a layer's zeros move when those below it have
        learned = step(learned)
    for path, moved in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.not_equal, learned, after)):
        # Rectified units may be off for all of a short text; a matrix of which less than half moves is dead.
        assert moved.mean() > 0.5, f"{jax.tree_util.keystr(path)}: {moved.mean():.2f} has moved"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learned))


@pytest.mark.parametrize(
    "embedding", [{"embedding_size": 4}, {"embedding_size": 0}, {"embedding_size": 5, "tie_embeddings": True}]
)
def test_symbols_in_common_keep_their_logits_and_the_others_are_drawn(embedding):
    config = ModelConfig(**(LSTM | embedding))
    kept = Kept(np.array([1, 2, 5, 8]), np.array([6, 3, 0, 1]))
    params, after = grown(config, config, kept, 9)
    ids = np.random.default_rng(3).integers(0, 4, (B, 2 * T))
    there = logits(config, params, kept.there[ids])[:, :, kept.there]
    here = logits(config, after, kept.here[ids])
    np.testing.assert_allclose(here[:, :, kept.here], there, rtol=1e-6, atol=1e-6)
    drawn = language_model.init(config, 9, jax.random.key(2))
    others = [0, 3, 4, 6, 7]
    np.testing.assert_array_equal(after.b_out[others], drawn.b_out[jnp.array(others)])
    table = "embedding" if config.embedding_size else "w_x"
    mine, fresh = (p.embedding if config.embedding_size else p.cells[0].w_x for p in (after, drawn))
    np.testing.assert_array_equal(mine[others], np.asarray(fresh)[others], err_msg=table)


def test_symbols_and_units_may_grow_at_once():
    old = ModelConfig(**(LSTM | {"embedding_size": 0}))
    new = ModelConfig(**(LSTM | {"embedding_size": 0, "hidden_size": 8}))
    kept = Kept(np.array([1, 2, 5, 8]), np.array([6, 3, 0, 1]))
    params, after = grown(old, new, kept, 9)
    ids = np.random.default_rng(3).integers(0, 4, (B, 2 * T))
    there = logits(old, params, kept.there[ids])[:, :, kept.there]
    np.testing.assert_allclose(logits(new, after, kept.here[ids])[:, :, kept.here], there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "change", "why"),
    [
        (LSTM, {"cell": "gru"}, "cell: lstm -> gru is another model"),
        (LSTM, {"hidden_size": 4}, "a layer of 5 -> 4 units would lose"),
        (SKIP, {"num_layers": 1}, "num_layers: 2 -> 1 would leave layers out"),
        (LSTM, {"num_layers": 3}, "is exact where the softmax reads the sum of all layers \\(the trained model has no"),
        (LSTM | {"num_layers": 1}, {"num_layers": 2}, "give --skip"),
        (LSTM, {"skip": True}, "changes what the softmax reads of 2 layers"),
        (LSTM, {"embedding_size": 0}, "embedding_size: 4 -> 0"),
        (LSTM, {"weight_norm": True}, "weight_norm: False -> True"),
        (LSTM | {"mogrifier_rounds": 2, "mogrifier_rank": 2}, {"mogrifier_rank": 1}, "mogrifier_rank: 2 -> 1"),
        (LSTM | {"train_initial_state": True}, {"train_initial_state": False}, "train_initial_state"),
        (LSTM | {"cell": "layer_norm_lstm"}, {"hidden_size": 8}, "takes the mean of all units"),
        (SKIP | {"cell": "rnn", "nonlinearity": "relu"}, {"num_layers": 3}, "would get no gradient"),
        (RELU | {"zoneout": 0.2}, {"num_layers": 3}, "with zoneout=0.2 mixes it with old h"),
        (
            LSTM | {"cell": "rnn", "nonlinearity": "relu", "last_hidden_size": 3},
            {"num_layers": 3, "last_hidden_size": 8},
            "different widths",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(old, change, why):
    assert re.search(why, growth.refusal(ModelConfig(**old), ModelConfig(**(old | change))))
