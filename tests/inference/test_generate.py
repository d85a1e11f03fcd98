"""Sampled text against full passes of the model, and what it must not depend on."""

import contextlib
import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import distributed
from charlstm.config.model import ModelConfig
from charlstm.inference import generate as generate_lib
from charlstm.inference.generate import generate
from charlstm.inference.sampling import Sampling, by_rows, choose
from charlstm.model import language_model, layer

V = 11
CONFIG = ModelConfig(hidden_size=12, initializer="normal", init_scale=0.7)
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], np.uint8)
GREEDY = Sampling(temperature=0)


@functools.cache
def make_params(config=CONFIG, vocabulary_size=V):
    return language_model.init(config, vocabulary_size, jax.random.key(1))


def sampled(sampling=GREEDY, *, config=CONFIG, params=None, prompt=PROMPT, rows=3, length=40, seed=7, **options):
    """All that `generate` makes: ids and log-probabilities, [rows, length] each."""
    params = make_params(config) if params is None else params
    chunks = list(generate(config, params, prompt, sampling, rows=rows, length=length, seed=seed, **options))
    ids, log_probabilities = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    assert ids.shape == log_probabilities.shape == (rows, length)
    return ids, log_probabilities


def ends(ids_RT, separator):
    """Whether each symbol is the last of a separator, looked up one by one."""
    k, (R, T) = len(separator), ids_RT.shape
    return np.array(
        [[k > 0 and tuple(ids_RT[r, max(t - k + 1, 0) : t + 1]) == separator for t in range(T)] for r in range(R)]
    )


def full_pass(ids_RT, config=CONFIG, separator=()):
    """Log-softmax of the symbol after each of `ids`, [R, T, V], by one call of the model."""
    reset_RT = ends(ids_RT, separator)

    @jax.jit
    def log_softmax(params, inputs_RT):
        _, logits_TRV = language_model.apply(
            config, params, language_model.zero_state(config, len(ids_RT)), inputs_RT, reset_RT
        )
        return jax.nn.log_softmax(logits_TRV, axis=2)

    return np.asarray(log_softmax(make_params(config), ids_RT.astype(np.int32))).swapaxes(0, 1)


def with_prompt(ids):
    return np.concatenate([np.tile(PROMPT, (len(ids), 1)), ids], axis=1)


@pytest.mark.parametrize(
    ("rows", "sampling"),
    [
        (1, GREEDY),
        (7, Sampling(top_k=5)),
        pytest.param(1, Sampling(top_k=5), marks=pytest.mark.long),
        pytest.param(7, GREEDY, marks=pytest.mark.long),
    ],
    ids=["1 greedy", "7 drawn", "1 drawn", "7 greedy"],
)
def test_the_text_does_not_depend_on_how_many_devices_the_rows_are_split_over(sampling, rows):
    expected = sampled(sampling, rows=rows)
    for devices in (2, 4):
        mesh = distributed.make(jax.devices()[:devices])
        params = distributed.put(mesh, distributed.REPLICATED, make_params())
        for got, of_one in zip(sampled(sampling, params=params, rows=rows), expected, strict=True):
            np.testing.assert_array_equal(got, of_one)


@pytest.mark.gpu
def test_greedy_text_is_the_argmax_of_a_full_pass_over_it():
    ids, _ = sampled(GREEDY)
    best = full_pass(with_prompt(ids)).argmax(2)
    assert len(set(ids[0])) > 2, "a text this monotonous would prove little"
    np.testing.assert_array_equal(ids, best[:, len(PROMPT) - 1 : -1])


SEPARATORS = ((), (5,), (8, 5))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cell", "separator"),
    [
        pytest.param(
            *(cell, separator),
            marks=() if cell == "lstm" or separator == SEPARATORS[number % 3] else pytest.mark.long,
            id=f"{cell}, {len(separator)} symbols",
        )
        for number, cell in enumerate(layer.CELLS)
        for separator in SEPARATORS
    ],
)
def test_log_probabilities_are_the_models_own_by_a_full_pass(cell, separator):
    scale = 0.3 if cell == "rnn" else CONFIG.init_scale  # larger ones make chaos of its rounding
    config = dataclasses.replace(CONFIG, cell=cell, init_scale=scale)
    sampling = Sampling(temperature=1.7, top_k=8, top_p=0.95)
    ids, log_probabilities = sampled(sampling, config=config, length=150, separator=separator, unknown_id=0)
    assert not separator or ends(ids, separator).any()
    expected = full_pass(with_prompt(ids), config, separator)[:, len(PROMPT) - 1 : -1]
    expected = np.take_along_axis(expected, ids[:, :, None], axis=2)[:, :, 0]
    tolerance = 1e-3 if cell == "layer_norm_lstm" else 1e-4  # whatever the weights' scale, which it divides out
    np.testing.assert_allclose(log_probabilities, expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.long), 7])
def test_the_text_does_not_depend_on_the_chunk_size(chunk):
    ids, log_probabilities = sampled(Sampling(), chunk=16)
    other_ids, other_log_probabilities = sampled(Sampling(), chunk=chunk)
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_allclose(log_probabilities, other_log_probabilities, rtol=1e-5, atol=1e-6)


def test_where_the_rows_are_very_many_one_call_makes_fewer_symbols_of_the_same_text(monkeypatch):
    ids, _ = sampled(Sampling(), rows=5)
    monkeypatch.setattr(generate_lib, "MOST_NOISE", 3 * 5 * V)
    chunks = list(generate(CONFIG, make_params(), PROMPT, Sampling(), rows=5, length=40, seed=7))
    assert {chunk.ids.shape for chunk in chunks} == {(5, 3), (5, 1)}
    np.testing.assert_array_equal(np.concatenate([chunk.ids for chunk in chunks], axis=1), ids)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_row_has_the_same_bits_however_many_rows_are_beside_it(rows):
    ids, log_probabilities = sampled(Sampling(), length=100)
    other_ids, other_log_probabilities = sampled(Sampling(), rows=rows, length=100)
    common = min(rows, 3)
    np.testing.assert_array_equal(ids[:common], other_ids[:common])
    np.testing.assert_array_equal(log_probabilities[:common], other_log_probabilities[:common])


@pytest.mark.optimized
@pytest.mark.parametrize("cell", layer.CELLS)
def test_a_row_of_every_cell_has_the_bits_that_it_has_alone(cell):
    """Compiled as users do, XLA:CPU sums along a row in another order where there are many rows."""
    config = dataclasses.replace(CONFIG, cell=cell, hidden_size=24)
    alone, beside = (sampled(Sampling(), config=config, rows=rows) for rows in (1, 32))
    for one, many in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(many[0], one[0])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 4])
def test_a_prompt_read_in_windows_is_a_prompt_read_at_once(window):
    separator = (3, 5, 8)  # straddles two windows of either length
    ids, log_probabilities = sampled(Sampling(), separator=separator, window=len(PROMPT))
    other_ids, other_log_probabilities = sampled(Sampling(), separator=separator, window=window)
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_allclose(log_probabilities, other_log_probabilities, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(temperature=1e-6),
        Sampling(temperature=1e-300, top_k=3, top_p=1e-300),
    ],
    ids=str,
)
def test_the_narrowest_choices_are_greedy(sampling):
    ids, log_probabilities = sampled(sampling)
    expected_ids, expected_log_probabilities = sampled(GREEDY)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(log_probabilities, expected_log_probabilities, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_first_symbols_are_distributed_as_the_softmax_at_the_temperature(temperature):
    rows = 4096
    ids, _ = sampled(Sampling(temperature=temperature), rows=rows, length=1)
    p = np.exp(full_pass(PROMPT[None])[0, -1].astype(np.float64) / temperature)
    expected = rows * p / p.sum()
    assert expected.min() > 5, "too few for the statistic"
    chi_square = ((np.bincount(ids[:, 0], minlength=V) - expected) ** 2 / expected).sum()
    assert chi_square < 29.6  # exceeded once in 1000 seeds with V - 1 = 10 degrees of freedom


def test_successive_symbols_are_drawn_independently():
    """A model that has learned nothing: all pairs of neighbors are as frequent, down a row and across rows."""
    flat = jax.tree.map(jnp.zeros_like, make_params())
    ids, _ = sampled(Sampling(), params=flat, rows=4096, length=16)
    for first, second in ((ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:])):
        pairs = np.bincount((first * V + second).ravel(), minlength=V * V)
        expected = pairs.sum() / V**2
        assert ((pairs - expected) ** 2 / expected).sum() < 173.6  # 1 in 1000 with 120 degrees of freedom


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.6), {1, 3}),
        (Sampling(top_p=0.75), {1, 3, 4}),
        # The order matters.  0.4 + 0.3 falls short of 0.8, but not of 0.8 of the three that top_k leaves.
        (Sampling(top_p=0.8), {1, 3, 4}),
        (Sampling(top_k=3, top_p=0.8), {1, 3}),
        # Likewise 0.4 falls short of 0.55, but not after the temperature has sharpened it.
        (Sampling(top_p=0.55), {1, 3}),
        (Sampling(temperature=0.5, top_p=0.55), {1}),
    ],
    ids=str,
)
def test_top_k_and_top_p_leave_the_right_symbols_in_proportion(sampling, expected):
    rows = 4096
    logits_RV = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (rows, 1))
    gumbel_RV = jax.random.gumbel(jax.random.key(3), logits_RV.shape)
    chosen = np.asarray(choose(logits_RV, gumbel_RV, by_rows([sampling] * rows, np.float32)))
    assert set(chosen.tolist()) == expected
    p = np.where(np.isin(np.arange(5), list(expected)), PROBABILITIES ** (1 / sampling.temperature), 0)
    np.testing.assert_allclose(np.bincount(chosen, minlength=5) / rows, p / p.sum(), atol=0.03)


def test_of_equally_probable_symbols_top_k_and_greedy_take_the_first():
    logits_RV = jnp.zeros((64, 5)).at[:, 0].set(-1.0)
    gumbel_RV = jax.random.gumbel(jax.random.key(0), logits_RV.shape)
    for sampling, expected in ((GREEDY, {1}), (Sampling(top_k=1), {1}), (Sampling(top_k=2), {1, 2})):
        assert set(choose(logits_RV, gumbel_RV, by_rows([sampling] * 64, np.float32)).tolist()) == expected


def test_rows_side_by_side_choose_each_by_its_own_settings():
    settings = [GREEDY, Sampling(), Sampling(0.7), Sampling(top_k=3), Sampling(0.5, 0, 0.6), Sampling(0, 2, 0.5)] * 8
    logits_RV = jax.random.normal(jax.random.key(1), (len(settings), 40)) * 2
    gumbel_RV = jax.random.gumbel(jax.random.key(2), logits_RV.shape)
    together = choose(logits_RV, gumbel_RV, by_rows(settings, np.float32))
    for row, sampling in enumerate(settings):
        one = slice(row, row + 1)
        alone = choose(logits_RV[one], gumbel_RV[one], by_rows([sampling], np.float32))
        assert int(together[row]) == int(alone[0]), sampling


def test_other_settings_compile_nothing_anew():
    def compiled(sampling):
        with jax.log_compiles(), warnings_of("jax") as said:
            sampled(sampling, length=3, chunk=3)
        return [line for line in said if "Finished XLA compilation" in line]

    assert compiled(Sampling())
    for sampling in (GREEDY, Sampling(0.5), Sampling(top_k=4), Sampling(0.9, 5, 0.8)):
        assert not compiled(sampling)


@contextlib.contextmanager
def warnings_of(name):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3, top_p=0.9)], ids=str)
def test_the_unknown_symbol_is_never_drawn_however_probable(sampling):
    params = make_params()
    params = params._replace(b_out=params.b_out.at[0].set(100.0))
    assert (sampled(sampling, params=params)[0] == 0).all()
    ids, log_probabilities = sampled(sampling, params=params, unknown_id=0)
    assert (ids != 0).all()
    assert (log_probabilities < -50).all()  # the model's own opinion of what was drawn


def test_without_a_prompt_each_row_begins_after_a_symbol_of_its_own_and_never_the_unknown_one():
    params = make_params(vocabulary_size=2)
    options = {"params": params, "rows": 16, "length": 20}
    after_0, after_1 = (sampled(Sampling(), prompt=np.array([i]), **options)[1] for i in (0, 1))
    _, got = sampled(Sampling(), prompt=np.array([]), **options)
    is_0, is_1 = (got == after_0).all(1), (got == after_1).all(1)
    assert (is_0 ^ is_1).all() and is_0.any() and is_1.any()
    known = sampled(Sampling(), prompt=np.array([]), unknown_id=0, **options)[1]
    np.testing.assert_array_equal(known, sampled(Sampling(), prompt=np.array([1]), unknown_id=0, **options)[1])


def test_what_precedes_a_document_separator_is_forgotten_where_documents_are_apart():
    other = np.concatenate([[1, 2, 3], PROMPT])
    for separator, same in (
        ((int(PROMPT[0]),), True),
        ((3, 1), True),
        ((2, 6, 5), True),
        ((9, 7, 9), True),
        ((), False),
        ((3, 4), False),
    ):
        first = sampled(Sampling(), separator=separator)[1]
        second = sampled(Sampling(), separator=separator, prompt=other)[1]
        assert np.allclose(first, second, rtol=1e-5) == same


def test_another_seed_makes_another_text():
    texts = {sampled(Sampling(), seed=seed)[0].tobytes() for seed in (0, 1, 2, 2**32 - 1)}
    assert len(texts) == 4


def test_bfloat16_and_embeddings_and_skip_connections_sample_too():
    config = dataclasses.replace(CONFIG, embedding_size=12, tie_embeddings=True, skip=True, compute_dtype="bfloat16")
    ids, log_probabilities = sampled(GREEDY, config=config)
    expected = full_pass(with_prompt(ids), config)[:, len(PROMPT) - 1 : -1]
    np.testing.assert_allclose(log_probabilities, expected.max(2), atol=0.1)


def test_chunks_come_as_they_are_made_and_the_last_is_short():
    chunks = generate(CONFIG, make_params(), PROMPT, Sampling(), rows=3, length=20, seed=0, chunk=7)
    assert [chunk.ids.shape for chunk in chunks] == [(3, 7), (3, 7), (3, 6)]
    assert list(generate(CONFIG, make_params(), PROMPT, Sampling(), rows=3, length=0, seed=0)) == []
    endless = generate(CONFIG, make_params(), PROMPT, Sampling(), rows=3, length=2**31 - 1, seed=0, chunk=7)
    assert next(endless).ids.shape == (3, 7)


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}]
    + [{"top_p": p} for p in (0.0, -0.5, 1.01, float("nan"))], ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)
