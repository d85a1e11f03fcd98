"""Dynamic evaluation against its slow twin and against the static score, and the softmax temperature."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import distributed
from charlstm.inference import dynamic_evaluation, evaluate
from charlstm.inference.dynamic_evaluation import DynamicEvaluationConfig
from charlstm.model import language_model
from launch.evaluate import search
from tests.inference.test_evaluate import Text, V, make, params

SETTINGS = DynamicEvaluationConfig(
    dynamic_learning_rate=0.01, dynamic_decay=0.05, dynamic_epsilon=0.003, dynamic_batches=2
)
ONE = {"hidden_size": 8, "num_layers": 1}


class Given(Text):
    def __init__(self, ids):
        self.ids = np.array(ids, np.uint8)


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def static(config, split, separator=(), devices=1, temperatures=(1.0,)):
    grid = distributed.make(jax.devices()[:devices])
    placed = distributed.put(grid, distributed.REPLICATED, params(config))
    return evaluate.at_temperatures(config, V, split, grid, separator, temperatures)(placed)


# The slow twin: one window after the other, one parameter after the other.


@partial(jax.jit, static_argnums=0)
def mean_nats(config, p, state, window, temperature):
    """Of the symbols after the first of the window; the state after reading all but the last."""
    reset = jnp.zeros((1, len(window) - 1), bool)
    state, logits = language_model.apply(config.model, p, state, window[None, :-1], reset)
    log_p = jax.nn.log_softmax(logits[:, 0] / temperature)
    return -sum(log_p[t, window[t + 1]] for t in range(len(window) - 1)) / (len(window) - 1), state


gradient = jax.jit(jax.grad(mean_nats, argnums=1, has_aux=True), static_argnums=0)


def windows_of(ids, first, stop, length):
    """Targets `first` .. `stop` - 1 in windows, each with the symbol before it."""
    for start in range(first, stop, length):
        if len(window := ids[max(start - 1, 0) : min(start + length, stop)]) > 1:
            yield window.astype(np.int32)


def twin_mean_square(config, p, ids):
    squares, piece = [], -(-len(ids) // 64)
    for begin in range(0, len(ids), piece):
        state = language_model.zero_state(config.model, 1, p.b_out.dtype)
        windows = list(windows_of(ids, begin, min(begin + piece, len(ids)), SETTINGS.dynamic_window))
        for window in windows[: SETTINGS.dynamic_batches]:
            g, state = gradient(config, p, state, window, 1.0)
            squares.append([np.square(leaf) for leaf in jax.tree.leaves(g)])
    return [np.mean(leaf, axis=0) for leaf in zip(*squares, strict=True)]


def twin_nats(config, trained, mean_square, ids, temperature=1.0):
    rate, decay, epsilon = (getattr(SETTINGS, f"dynamic_{name}") for name in ("learning_rate", "decay", "epsilon"))
    leaves, tree = jax.tree.flatten(trained)
    now, state, total = trained, language_model.zero_state(config.model, 1, trained.b_out.dtype), 0.0
    for window in windows_of(ids, 0, len(ids), SETTINGS.dynamic_window):
        total += float(mean_nats(config, now, state, window, temperature)[0]) * (len(window) - 1)
        g, state = gradient(config, now, state, window, 1.0)
        old = zip(jax.tree.leaves(now), leaves, mean_square, jax.tree.leaves(g), strict=True)
        new = [p - rate * dp / (np.sqrt(ms) + epsilon) + decay * (p0 - p) for p, p0, ms, dp in old]
        now = jax.tree.unflatten(tree, new)
    return total


@pytest.mark.gpu
def test_scores_and_gradients_are_those_of_the_plain_equations(monkeypatch):
    monkeypatch.setattr(dynamic_evaluation, "CHUNK", 4)  # calls of the device end within the text
    with jax.enable_x64(True):
        config, train, text = make(**ONE), Text(400), Given(Text().ids[400:463])
        trained = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params(config))
        usual = dynamic_evaluation.mean_square(config, SETTINGS, trained, train)
        expected = twin_mean_square(config, trained, train.ids)
        for found, wanted in zip(jax.tree.leaves(usual), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-10)
        scores = dynamic_evaluation.score(config, SETTINGS, trained, usual, text, temperatures=(1.0, 1.3))
        for temperature, score in zip((1.0, 1.3), scores, strict=True):
            nats = twin_nats(config, trained, expected, text.ids, temperature)
            assert score.bits == pytest.approx(nats / math.log(2) + math.log2(V), rel=1e-11)
        assert abs(scores[0].bits - static(config, text)[0].bits) > 0.1, "there is something to be learned"


# Against the static score.


@pytest.mark.parametrize("separator", [*(pytest.param(each, marks=pytest.mark.long) for each in ((), (3,))), (3, 4)])
def test_a_model_that_does_not_learn_has_the_static_score(separator):
    still = DynamicEvaluationConfig(dynamic_learning_rate=0, dynamic_decay=0)
    config, text = (
        make(eval_chunk=10**6, **ONE),
        Text(1403),
    )  # two calls of the device, a first and a last window of 4 and 3
    temperatures = (1.0, 0.9)
    found = dynamic_evaluation.score(config, still, params(config), ones(params(config)), text, separator, temperatures)
    for score, expected in zip(found, static(config, text, separator, temperatures=temperatures), strict=True):
        assert score.bits_per_symbol == pytest.approx(expected.bits_per_symbol, abs=1e-6)
        assert (score.symbols, score.bytes) == (1403, 1500)


def test_of_two_symbols_the_first_costs_log2_of_the_vocabulary():
    config, pair = make(eval_chunk=10**6, **ONE), Given([3, 4])
    (score,) = dynamic_evaluation.score(config, SETTINGS, params(config), ones(params(config)), pair)
    nats, _ = mean_nats(config, params(config), language_model.zero_state(config.model, 1), np.array([3, 4]), 1.0)
    assert score.bits == pytest.approx(float(nats) / math.log(2) + math.log2(V), rel=1e-6)


def knows_symbols(config, ids):
    """A model that has learned how often each symbol comes, and nothing else."""
    counts = np.bincount(ids, minlength=V) + 0.01
    p = params(config)
    return p._replace(w_out=0 * p.w_out, b_out=jnp.asarray(np.log(counts / counts.sum()), jnp.float32))


def test_a_word_that_is_new_and_comes_again_is_learned_and_the_trained_parameters_stay():
    config, random = make(**ONE), np.random.default_rng(0)
    usual = random.integers(0, 10, 2000)
    words = [[*random.integers(0, 10, 5), 15, 17, 16, 19] for _ in range(60)]
    trained, text = knows_symbols(config, usual), Given(np.concatenate(words))
    before = jax.tree.map(np.array, trained)
    squares = dynamic_evaluation.mean_square(config, DynamicEvaluationConfig(), trained, Given(usual))
    learning, still = (
        dynamic_evaluation.score(config, settings, trained, squares, text)[0].bits_per_symbol
        for settings in (DynamicEvaluationConfig(), DynamicEvaluationConfig(dynamic_learning_rate=0))
    )
    assert learning < 0.8 * still
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_learning_rate_that_leads_to_no_finite_loss_is_refused():
    config, wild = make(**ONE), DynamicEvaluationConfig(dynamic_learning_rate=1e38)
    with pytest.raises(ValueError, match=r"^with dynamic_learning_rate=1e\+38 the loss is not finite within 1,280"):
        dynamic_evaluation.score(config, wild, params(config), ones(params(config)), Text(1403))


def test_progress_is_told_from_none_to_all():
    config, text, told = make(**ONE), Text(1403), []
    dynamic_evaluation.score(
        config, SETTINGS, params(config), ones(params(config)), text, progress=lambda *done: told.append(done)
    )
    assert told == [(0, 1403), (1280, 1403), (1403, 1403)]
    told.clear()
    dynamic_evaluation.mean_square(config, SETTINGS, params(config), text, progress=lambda *done: told.append(done))
    assert told == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dynamic_window": 0}, "dynamic_window=0 must be at least 1"),
        ({"dynamic_decay": 1.5}, "dynamic_decay=1.5 must be from 0 to 1"),
        ({"dynamic_epsilon": 0.0}, "dynamic_epsilon=0.0 must be more than 0: use 2e-5"),
        ({"dynamic_learning_rate": math.nan}, "dynamic_learning_rate=nan is not a finite float32"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(ValueError) as caught:
        DynamicEvaluationConfig(**changes)
    assert str(caught.value) == sentence


# The softmax temperature.


def test_a_score_at_a_temperature_is_that_of_logits_divided_by_it_whatever_the_devices():
    config, temperatures = make(**ONE), (1.0, 0.7, 1.6)
    found = static(config, Text(), temperatures=temperatures)
    for temperature, score in zip(temperatures, found, strict=True):
        p = params(config)
        cooled = p._replace(w_out=p.w_out / temperature, b_out=p.b_out / temperature)
        expected = evaluate.make_evaluator(config, V, Text(), distributed.make(jax.devices()[:1]))(cooled)
        assert score.bits == pytest.approx(expected.bits, rel=1e-6)
    for score, other in zip(found, static(config, Text(), devices=2, temperatures=temperatures), strict=True):
        assert other.bits_per_symbol == pytest.approx(score.bits_per_symbol, abs=1e-6)


@pytest.mark.parametrize("power", [-20, 0, 33])
def test_logits_that_are_too_large_by_a_factor_are_best_divided_by_it(power):
    # A constant softmax is best where its logits are the logarithms of the frequencies: the score is the entropy.
    frequencies, factor = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8], np.float32), 2.0 ** (power / 64)
    text = Given([0] + [0] * 32 + [1] * 16 + [2] * 8 + [3] * 8)  # the first is not predicted
    p, grid = params(make(**ONE)), distributed.make(jax.devices()[:1])
    p = p._replace(w_out=0 * p.w_out[:, :4], b_out=jnp.asarray(factor * np.log(frequencies), jnp.float32))

    def score(split, temperatures):
        return {"": evaluate.at_temperatures(make(**ONE), 4, text, grid, (), temperatures)(p)}

    temperature, found = search(score, "valid")
    at_one, best = found[""]
    assert temperature == pytest.approx(factor)
    assert best.bits == pytest.approx(64 * 1.75 + math.log2(4), rel=1e-6)
    assert (at_one.bits > best.bits) == bool(power)
