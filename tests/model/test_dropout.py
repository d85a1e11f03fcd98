"""Noise: masks are by row and name, lie where they should, and are no noise at rate 0 and out of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import textbook
from charlstm import config as config_lib
from charlstm import distributed, rng
from charlstm.config import Config
from charlstm.config.model import ModelConfig
from charlstm.inference import evaluate, generate
from charlstm.model import dropout, language_model
from charlstm.training import step, train_state
from charlstm.training.loss import cross_entropy
from data_pipeline.batch import Batch

V, B, T, H = 9, 4, 5, 6
RATES = {"input_dropout": 0.2, "layer_dropout": 0.3, "output_dropout": 0.4, "weight_drop": 0.25}
ROWS = dropout.DropoutKey(jax.random.key(5), jnp.arange(B, dtype=jnp.int32))


def make(**changes) -> ModelConfig:
    return ModelConfig(**({"num_layers": 2, "hidden_size": H} | changes))


def window() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    text = random.integers(0, V, (B, T + 1), dtype=np.int32)
    return text[:, :-1], text[:, 1:], random.random((B, T)) < 0.1


def of_rows(rows: list[int], step: int = 3) -> dropout.DropoutKey:
    return dropout.DropoutKey(jax.random.fold_in(jax.random.key(0), step), jnp.asarray(rows, jnp.int32))


def test_a_stream_has_one_mask_a_window_which_depends_on_the_key_the_name_and_the_global_row_alone():
    def drop(rows, name="layer_dropout.1", step=3):
        return dropout.drop(jnp.ones((T, len(rows), 64)), of_rows(rows, step), 0.5, name)

    @jax.jit
    def drawn():
        others = drop([0], "layer_dropout.2"), drop([0], "output_dropout"), drop([0], step=4)
        mask_BD = dropout.row_mask(of_rows([0, 1, 2, 3]), 0.5, "layer_dropout.1", 64)
        return drop([0, 1, 2, 3]), (drop([0, 1]), drop([2, 3])), others, mask_BD

    whole, halves, others, mask_BD = jax.tree.map(np.asarray, drawn())
    np.testing.assert_array_equal(np.concatenate(halves, 1), whole)
    assert (whole == mask_BD).all(), "the mask is constant over the window"
    assert set(np.unique(whole)) == {0.0, 2.0}
    assert len({mask.tobytes() for mask in (*mask_BD, *(other[0, 0] for other in others))}) == B + 3


def test_a_mask_for_each_symbol_differs_from_symbol_to_symbol_and_still_goes_with_the_row():
    @jax.jit
    def drawn():
        return [
            dropout.drop(jnp.ones((T, len(rows), 64)), of_rows(rows), 0.5, "x", each_symbol=True)
            for rows in ([0, 1, 2, 3], [2])
        ]

    whole, row = map(np.asarray, drawn())
    np.testing.assert_array_equal(row, whole[:, 2:3])
    assert len({mask.tobytes() for mask in whole.reshape(-1, 64)}) == T * B


def test_weights_and_rows_of_the_embedding_have_one_mask_for_all_streams():
    @jax.jit
    def drawn():
        ones, row, others = jnp.ones((64, 32)), of_rows([0]), of_rows([3, 1])
        weights = [dropout.drop_weights(ones, *draw) for draw in ((row, 0.5, "a"), (others, 0.5, "a"), (row, 0.5, "b"))]
        return weights, [dropout.drop_rows(ones, source, 0.5, "rows") for source in (row, others)]

    (a, same, b), (rows, same_rows) = jax.tree.map(np.asarray, drawn())
    np.testing.assert_array_equal(a, same)
    np.testing.assert_array_equal(rows, same_rows)
    assert (a != b).any()
    assert len({row.tobytes() for row in a}) == 64
    assert (rows == rows[:, :1]).all()
    assert 0 < (rows[:, 0] == 0).sum() < 64


@pytest.mark.gpu
@pytest.mark.parametrize(("rate", "dtype"), [(0.1, jnp.bfloat16), (0.4, jnp.float32)])
def test_the_mean_is_kept_by_every_kind_of_mask(rate, dtype):
    @jax.jit
    def drawn():
        source, x_TBD = of_rows(list(range(200))), jnp.ones((150, 200, 1), dtype)
        ids_TB = jnp.tile(jnp.arange(150, dtype=jnp.int32)[:, None], 200)
        return [
            dropout.drop(jnp.ones((2, 200, 150), dtype), source, rate, "a"),
            dropout.drop(x_TBD, source, rate, "b", each_symbol=True),
            dropout.drop_symbols(x_TBD, ids_TB, 150, source, rate, "c"),
            dropout.drop_symbols(x_TBD, ids_TB, 150, source, rate, "d", each_symbol=True),
            dropout.drop_weights(jnp.ones((200, 150), dtype), source, rate, "e"),
            dropout.drop_rows(jnp.ones((30_000, 1), dtype), source, rate, "f"),
        ]

    for dropped in drawn():
        assert dropped.dtype == dtype
        values, counts = np.unique(np.asarray(dropped, np.float32), return_counts=True)
        assert values.tolist() == [0, np.float32(1 / (1 - rate)).astype(dtype)]  # in bfloat16 the nearest there is
        assert abs(counts[0] / counts.sum() - rate) < 0.01


def twin(config, params, state, inputs_BT, reset_BT, source):
    """The model as its docstring and dropout.py's say it: products with one-hot symbols, and masks that multiply."""

    def bernoulli(name, rate, shape):
        return jax.random.bernoulli(rng.named(source.key, name), 1 - rate, shape).astype(float) / (1 - rate)

    def masked(x_TBD, name, rate):
        key, each = rng.named(source.key, name), config.dropout_mask == "symbol" and rate
        onehot = x_TBD.shape[2] == V
        shape = (x_TBD.shape[0], 1 if onehot else x_TBD.shape[2]) if each else (1, x_TBD.shape[2])
        masks = [jax.random.bernoulli(jax.random.fold_in(key, row), 1 - rate, shape) for row in source.rows_B]
        return x_TBD * jnp.stack(masks, 1).astype(float) / (1 - rate)

    x = jnp.eye(V)[inputs_BT.T]
    if params.embedding is not None:
        x = x @ (params.embedding * bernoulli("embedding_dropout", config.embedding_dropout, (V, 1)))
    new, total = [], 0.0
    for layer, (p, s) in enumerate(zip(params.cells, state, strict=True)):
        which = "layer_dropout" if layer else "input_dropout"
        x = masked(x, f"{language_model.MASK_NAMES[which]}.{layer}", getattr(config, which))
        p = p._replace(w_h=p.w_h * bernoulli(f"weight_drop.{layer}", config.weight_drop, p.w_h.shape))
        s, x = textbook.unroll(language_model.CELLS[config.cell], p, s, x, reset_BT.T)
        new.append(s)
        total = total + x
    top = masked(total if config.skip else x, "output_dropout", config.output_dropout)
    return tuple(new), top @ (params.embedding.T if params.w_out is None else params.w_out) + params.b_out[None, None]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"dropout_mask": "window", "skip": True, "cell": "mlstm"},
        {"dropout_mask": "symbol", "embedding_size": H, "embedding_dropout": 0.5, "tie_embeddings": True},
        pytest.param({"dropout_mask": "symbol", "skip": True}, marks=pytest.mark.long),
    ],
    ids=["window, one-hot, skip", "symbol, tied", "symbol, one-hot"],
)
def test_the_noisy_model_equals_its_twin_in_float64_in_value_and_gradient(changes):
    config = make(**RATES | changes)
    inputs, targets, reset = window()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(np.float64), language_model.init(config, V, jax.random.key(1)))
        random = np.random.default_rng(3)
        state = jax.tree.map(lambda a: random.normal(size=a.shape), language_model.zero_state(config, B, jnp.float64))

        def loss(apply, params, state):
            new, logits = apply(config, params, state, jnp.asarray(inputs), jnp.asarray(reset), ROWS)
            nats = cross_entropy(logits, jnp.asarray(targets).T).sum()
            return nats + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(new))

        (one, gradient), (other, expected) = (
            jax.jit(jax.value_and_grad(lambda p, s, f=f: loss(f, p, s), (0, 1)))(params, state)
            for f in (language_model.apply, twin)
        )
        np.testing.assert_allclose(one, other, rtol=1e-12)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10)


def test_no_noise_and_noise_of_rate_0_are_the_very_program_of_the_plain_model():
    inputs, _, reset = window()
    plain = make(embedding_size=5)
    noisy = make(embedding_size=5, embedding_dropout=0.5, **RATES)
    params, state = language_model.init(plain, V, jax.random.key(0)), language_model.zero_state(plain, B)
    programs = [
        jax.jit(lambda p, s, c=config, n=source: language_model.apply(c, p, s, inputs, reset, n))
        .lower(params, state)
        .as_text()
        for config, source in ((plain, None), (plain, ROWS), (noisy, None), (noisy, ROWS))
    ]
    assert programs[0] == programs[1] == programs[2] != programs[3]


def losses(**changes) -> np.ndarray:
    """Of 16 streams of one text, on 4 devices of two logical shards of two streams each."""
    small = {"batch_size": 16, "window": 4, "num_layers": 1, "hidden_size": 32, "embedding_size": 32}
    config = config_lib.replace(Config(), **small | {"logical_shards": 8, "decay_steps": 10} | changes)
    inputs, targets, _ = (np.repeat(a[:1, :4], 16, axis=0).astype(np.uint8) for a in window())
    mesh = distributed.make(jax.devices()[:4])
    state = train_state.place(mesh, train_state.init(config, V))
    batch = distributed.put(mesh, distributed.BY_STREAM, Batch(inputs, targets, np.zeros((16, 4), bool)))
    return np.asarray(step.make(config, V, mesh, 100)(state, batch)[1].loss_B)


def test_in_training_every_stream_of_every_shard_and_device_has_masks_of_its_own():
    assert len(set(losses(input_dropout=0.3).tolist())) == 16


def test_in_training_all_streams_of_all_shards_and_devices_share_the_masks_of_weights_and_embeddings():
    assert len(set(losses(embedding_dropout=0.3, weight_drop=0.3).tolist())) == 1


def test_evaluation_and_sampling_draw_no_mask(monkeypatch):
    def kept(*_):
        raise AssertionError("a mask was drawn")

    config = config_lib.replace(Config(), hidden_size=H, embedding_size=5, embedding_dropout=0.5, **RATES)
    inputs, targets, reset = window()
    params, state = (
        language_model.init(config.model, V, jax.random.key(0)),
        language_model.zero_state(config.model, B),
    )
    monkeypatch.setattr(dropout, "_kept", kept)
    with pytest.raises(AssertionError, match="a mask was drawn"):
        language_model.apply(config.model, params, state, inputs, reset, ROWS)
    score_window = evaluate.make_window(config, distributed.make(jax.devices()[:1]))
    jax.eval_shape(score_window, params, state, Batch(inputs, targets, reset), reset)
    prompt, sampling = np.arange(3), generate.Sampling()
    list(generate.generate(config.model, params, prompt, sampling, rows=2, length=2, seed=0, chunk=2, window=2))
