"""The model: its fast paths equal their twins, windows join, rows are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import textbook
from charlstm.config.model import ModelConfig
from charlstm.config.training import OptimizerConfig
from charlstm.model import language_model
from charlstm.model.dropout import DropoutKey
from charlstm.model.ops.matmul import dense, lookup
from charlstm.training.loss import activation_penalties, cross_entropy

V, B, T, H = 9, 4, 6, 6


def make(**changes) -> ModelConfig:
    return ModelConfig(**({"num_layers": 2, "hidden_size": H} | changes))


def double(tree):
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)


def window(seed=0, length=T):
    random = np.random.default_rng(seed)
    text = random.integers(0, V, (B, length + 1), dtype=np.int32)
    return text[:, :-1], text[:, 1:], random.random((B, length)) < 0.1


def slow_apply(config, params, state, inputs_BT, reset_BT):
    """The model as its docstring says it, one-hot symbols and all, for plain autodiff."""
    onehot_TBV = jnp.eye(V)[inputs_BT.T]
    x = onehot_TBV if params.embedding is None else onehot_TBV @ params.embedding
    new, total = [], 0.0
    for p, s in zip(params.cells, state, strict=True):
        s, x = textbook.unroll(language_model.CELLS[config.cell], p, s, x, reset_BT.T)
        new.append(s)
        total = total + x
    top = total if config.skip else x
    return tuple(new), top @ (params.embedding.T if params.w_out is None else params.w_out) + params.b_out[None, None]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cell", "changes"),
    [
        ("lstm", {"embedding_size": 4, "skip": True}),
        pytest.param("lstm", {"embedding_size": 5}, marks=pytest.mark.long),
        ("gru", {"embedding_size": H, "tie_embeddings": True}),
        pytest.param("rnn", {"embedding_size": 5}, marks=pytest.mark.long),
        ("mlstm", {}),
    ],
    ids=[
        "lstm, embedding projected at each place, skip", "lstm, each symbol's embedding projected once", "gru, tied",
        "rnn, each symbol's embedding projected once", "mlstm, one-hot",
    ],
)  # fmt: skip
def test_the_model_equals_its_textbook_twin_in_float64_in_value_and_gradient(cell, changes):
    config = make(cell=cell, **changes)
    inputs, targets, reset = window()
    with jax.enable_x64(True):
        params = double(language_model.init(config, V, jax.random.key(1)))
        random = np.random.default_rng(3)
        state = jax.tree.map(lambda a: random.normal(size=a.shape), language_model.zero_state(config, B, jnp.float64))

        def fast(params, state):
            new, logits = language_model.apply(config, params, state, jnp.asarray(inputs), jnp.asarray(reset))
            nats = cross_entropy(logits, jnp.asarray(targets).T).sum()
            return nats + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(new))

        def slow(params, state):
            new, logits = slow_apply(config, params, state, jnp.asarray(inputs), jnp.asarray(reset))
            nats = -jnp.sum(jax.nn.log_softmax(logits) * jnp.eye(V)[targets.T])
            return nats + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(new))

        results = [jax.jit(jax.value_and_grad(f, (0, 1)))(params, state) for f in (fast, slow)]
        (one, gradient), (other, expected) = results
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-12)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10)


def gradient_of(config, length):
    """A function (params, state) -> (nats, gradient) of a window of `length` with every mask there is."""
    inputs, targets, reset = (jnp.asarray(a) for a in window(length=length))
    dropout_key = DropoutKey(jax.random.key(5), jnp.arange(B))

    def nats(params, state):
        new, logits = language_model.apply(config, params, state, inputs, reset, dropout_key)
        return cross_entropy(logits, targets.T).sum() + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(new))

    return jax.jit(jax.value_and_grad(nats, (0, 1)))


@pytest.mark.parametrize(
    ("embedding_size", "symbols", "dropped", "once"),
    [(5, B * T, False, True), (5, V - 1, False, False), (4, B * T, False, False), (5, B * T, True, False)],
    ids=["once", "fewer places than symbols", "more symbols than twice the embedding", "with dropout of the input"],
)
def test_each_symbol_is_projected_once_where_that_is_less_arithmetic_and_nothing_is_dropped_between(
    embedding_size, symbols, dropped, once
):
    config = make(embedding_size=embedding_size, input_dropout=0.5)
    params = language_model.init(config, V, jax.random.key(1))
    ids = jnp.zeros((1, symbols), jnp.int32)
    drawn = DropoutKey(jax.random.key(0), jnp.arange(1)) if dropped else None
    program = jax.jit(
        lambda p: language_model.features(config, p, language_model.zero_state(config, 1), ids, ids == 1, drawn)[1]
    )
    projected_once = f"tensor<1x{V}x{4 * H}xf32>"
    assert (projected_once in program.lower(params).as_text()) == once


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ({"cell": "lstm", "state_dropout": 0.2, "weight_drop": 0.2, "skip": True}, 23),
        pytest.param(
            {"cell": "gru", "embedding_size": 5, "embedding_dropout": 0.2, "num_layers": 1}, 1, marks=pytest.mark.long
        ),
        (
            {"cell": "lstm", "embedding_size": 5, "mogrifier_rounds": 2, "train_initial_state": True, "num_layers": 1},
            9,
        ),
        pytest.param({"cell": "gru", "embedding_size": 5, "embedding_dropout": 0.2}, 12, marks=pytest.mark.long),
    ],
    ids=["lstm, of 23", "gru, of 1", "general, of 9", "gru, of 12"],
)
def test_a_window_computed_again_in_pieces_has_the_value_and_gradient_of_one_that_is_kept(kind, length):
    kind = kind | {"input_dropout": 0.1, "layer_dropout": 0.3}
    with jax.enable_x64(True):
        params = double(language_model.init(make(**kind), V, jax.random.key(1)))
        random = np.random.default_rng(3)
        state = jax.tree.map(
            lambda a: random.normal(size=a.shape), language_model.zero_state(make(**kind), B, jnp.float64)
        )
        kept, again = (gradient_of(make(remat=remat, **kind), length)(params, state) for remat in (False, True))
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-12)


def test_a_window_computed_again_takes_a_third_of_the_memory():
    def bytes_of(remat: bool) -> int:
        config = make(hidden_size=64, num_layers=3, remat=remat)
        like = jax.eval_shape(
            lambda: (language_model.init(config, V, jax.random.key(1)), language_model.zero_state(config, B))
        )
        return gradient_of(config, 100).lower(*like).compile().memory_analysis().temp_size_in_bytes

    assert 3 * bytes_of(remat=True) < bytes_of(remat=False)


def test_the_penalties_of_activations_are_of_the_dropped_and_their_changes_of_the_undropped():
    random = np.random.default_rng(0)
    settings = OptimizerConfig(activation_penalty=2.0, activation_change_penalty=3.0)
    h, dropped = random.normal(size=(2, T, B, H))
    reset_TB = np.zeros((T, B), bool)
    reset_TB[4, 1] = True
    squares = [(h[t, b] - h[t - 1, b]) ** 2 for t in range(1, T) for b in range(B) if (t, b) != (4, 1)]
    mean = 2 * (dropped**2).mean() + 3 * np.sum(squares) / ((T - 1) * B * H)
    with jax.enable_x64(True):
        total = activation_penalties(settings, jnp.asarray(h), jnp.asarray(dropped), jnp.asarray(reset_TB))
        np.testing.assert_allclose(total / (T * B), mean, rtol=1e-12)
        one = activation_penalties(settings, *(jnp.asarray(a[:1]) for a in (h, dropped, reset_TB)))
        np.testing.assert_allclose(one / B, 2 * (dropped[0] ** 2).mean(), rtol=1e-12)


@pytest.mark.gpu
def test_projections_and_loss_equal_their_plain_twins_in_float64():
    random = np.random.default_rng(0)
    ids = random.integers(0, V, (T, B), dtype=np.int32)
    with jax.enable_x64(True):
        x, w, b, table = (jnp.asarray(random.normal(size=s)) for s in ((T, B, 3), (3, 5), (5,), (V, 5)))
        weight = jnp.asarray(random.normal(size=(T, B, 5)))
        for fast, slow, arguments in (
            (lambda x, w, b: dense(x, w, b, jnp.float64), lambda x, w, b: x @ w + b[None, None], (x, w, b)),
            (lambda t: lookup(t, jnp.asarray(ids), t.dtype), lambda t: jnp.eye(V)[ids] @ t, (table,)),
        ):
            np.testing.assert_allclose(fast(*arguments), slow(*arguments), rtol=1e-12)
            which = tuple(range(len(arguments)))
            one, other = (jax.grad(lambda *a, f=f: (f(*a) * weight).sum(), which)(*arguments) for f in (fast, slow))
            for a, b_ in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b_, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_long_window_equals_short_windows_with_carried_state(cell):
    config = make(cell=cell)
    inputs, _, reset = window()
    params, state = language_model.init(config, V, jax.random.key(0)), language_model.zero_state(config, B)
    final, logits = language_model.apply(config, params, state, inputs, reset)
    pieces = []
    for start in range(0, T, 3):
        part = slice(start, start + 3)
        state, piece = language_model.apply(config, params, state, inputs[:, part], reset[:, part])
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces), logits, atol=1e-6)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_resetting_one_stream_leaves_the_others_bit_identical(cell):
    config = make(cell=cell)
    inputs, _, _ = window()
    params, state = language_model.init(config, V, jax.random.key(0)), language_model.zero_state(config, B)
    state, _ = language_model.apply(config, params, state, inputs, np.zeros((B, T), bool))
    reset = np.zeros((B, T), bool)
    _, plain = language_model.apply(config, params, state, inputs, reset)
    reset[2, 5] = True
    _, logits = language_model.apply(config, params, state, inputs, reset)
    others = [0, 1, 3]
    np.testing.assert_array_equal(np.asarray(plain)[:, others], np.asarray(logits)[:, others])
    np.testing.assert_array_equal(np.asarray(plain)[:5, 2], np.asarray(logits)[:5, 2])
    assert (np.asarray(plain)[5:, 2] != np.asarray(logits)[5:, 2]).any(1).all()


def test_bfloat16_computes_in_bfloat16_and_keeps_state_logits_and_gradients_in_float32():
    config = make(compute_dtype="bfloat16", hidden_size=32)
    inputs, targets, reset = window()
    params, state = language_model.init(config, V, jax.random.key(0)), language_model.zero_state(config, B)

    def loss(params):
        new, logits = language_model.apply(config, params, state, inputs, reset)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((new, logits)))
        return cross_entropy(logits, targets.T).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    text = jax.jit(loss).lower(params).as_text()
    assert "bf16" in text
    assert float(value) == pytest.approx(float(np.log(V)), rel=0.1)


def test_the_char_rnn_model_has_240321_parameters():
    params = jax.eval_shape(
        lambda: language_model.init(ModelConfig(num_layers=2, hidden_size=128), 65, jax.random.key(0))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 240_321
