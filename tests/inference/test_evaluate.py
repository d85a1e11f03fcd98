"""Evaluation: one figure, whatever the batch size, the devices and the window; training is not touched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.inference import evaluate
from charlstm.model import language_model, layer
from charlstm.training.loss import cross_entropy

V = 20


class Text:
    dtype = np.dtype(np.uint8)
    bytes, characters, unknown = 1500, 1000, 0

    def __init__(self, symbols=1000):
        # Markov enough for the carried state to matter.
        random = np.random.default_rng(0)
        self.ids = (np.cumsum(random.integers(0, 3, symbols)) % V).astype(np.uint8)

    def __len__(self):
        return len(self.ids)

    def read(self, start, stop):
        return self.ids[start:stop]


def make(**changes) -> Config:
    small = {
        "hidden_size": 16,
        "num_layers": 2,
        "window": 16,
        "eval_chunk": 100,
        "burn_in": 30,
        "evaluation_batch_size": 4,
    }
    return config_lib.replace(Config(), **(small | changes))


def params(config: Config):
    drawn = language_model.init(config.model, V, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.5, leaf * 1.5), drawn)  # trained initial states begin at 0


def score(config: Config, devices: int = 1, separator=(), shards: int = 1) -> evaluate.Score:
    grid = distributed.make(jax.devices()[:devices])
    score_split = evaluate.make_evaluator(config, V, Text(), grid, separator, shards)
    return score_split(distributed.put(grid, distributed.REPLICATED, params(config)))


def test_in_the_same_parts_it_has_the_same_bits_on_any_number_of_devices():
    config = make(hidden_size=40, num_layers=1)
    expected = score(config, 8)
    for devices in (4, 1):
        assert score(config, devices, shards=8 // devices) == expected


@pytest.mark.gpu
def test_the_figure_does_not_depend_on_batch_size_devices_or_window():
    expected = score(make()).bits_per_symbol
    assert abs(expected - math.log2(V)) > 0.005
    for changes, devices in (
        ({"evaluation_batch_size": 1}, 1),
        ({"evaluation_batch_size": 64}, 8),
        ({"evaluation_batch_size": 3}, 2),
        ({"window": 130}, 4),
        ({"window": 7}, 8),
    ):
        assert score(make(**changes), devices).bits_per_symbol == pytest.approx(expected, abs=1e-6)


KINDS = {name: {"cell": name} for name in layer.CELLS} | {
    "layer_norm_lstm": {"cell": "layer_norm_lstm", "zoneout": 0.1, "train_initial_state": True},
}


SHORT = ("lstm", "layer_norm_lstm")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if name in SHORT else pytest.mark.long) for name, kind in KINDS.items()],
    ids=KINDS,
)
def test_one_piece_is_the_plain_forward_pass_over_the_whole_split(kind):
    config, text = make(eval_chunk=10**6, **kind), Text()
    ids = text.ids.astype(np.int32)[None]
    state = language_model.reset_state(params(config), language_model.zero_state(config.model, 1))
    _, logits = language_model.apply(
        config.model, params(config), state, ids[:, :-1], np.zeros((1, len(text) - 1), bool)
    )
    nats = np.asarray(cross_entropy(logits, ids[:, 1:].T), np.float64).sum()
    expected = (nats / math.log(2) + math.log2(V)) / len(text)  # the first symbol is charged log2(V) bits
    found = score(config)
    assert found.bits_per_symbol == pytest.approx(expected, abs=1e-6)
    assert found.bits_per_byte == pytest.approx(expected * 1000 / 1500, abs=1e-6)
    assert (found.characters, found.bytes) == (1000, 1500)


def test_a_part_of_a_long_split_is_scored_as_such_and_a_cap_above_its_length_changes_no_bit():
    grid, config = distributed.make(jax.devices()[:1]), make()
    given = distributed.put(grid, distributed.REPLICATED, params(config))

    def capped(most, doing=None):
        return evaluate.make_evaluator(config, V, Text(), grid, most=most)(given, doing)

    seen = []
    whole, part = capped(0), capped(350, lambda *done: seen.append(done))
    assert capped(1000) == whole == score(config)
    assert (part.symbols, part.characters, part.bytes) == (300, 300, 450)
    assert 0 < abs(part.bits_per_symbol - whole.bits_per_symbol) < 0.2
    assert seen == [(window, 9) for window in range(10)]  # of 130 symbols in windows of 16


def test_burn_in_comes_close_to_carried_state():
    sequential, warm, cold = (
        score(make(eval_chunk=piece, burn_in=burn_in)).bits_per_symbol
        for piece, burn_in in ((10**6, 0), (100, 60), (100, 0))
    )
    assert abs(warm - sequential) < abs(cold - sequential) / 10


@pytest.mark.parametrize(
    "separator", [(3, 4), *(pytest.param(each, marks=pytest.mark.long) for each in ((3,), (4, 4, 5)))], ids=str
)
def test_a_separator_resets_the_state_in_evaluation_too_the_same_whatever_the_windows(separator):
    whole = {"eval_chunk": 10**6}
    text = Text().ids.astype(np.int32)
    ends = [tuple(text[max(q - len(separator) + 1, 0) : q + 1]) == separator for q in range(len(text) - 1)]
    config = make(**whole)
    _, logits = language_model.apply(
        config.model, params(config), language_model.zero_state(config.model, 1), text[None, :-1], np.array([ends])
    )
    expected = np.asarray(cross_entropy(logits, text[None, 1:].T), np.float64).sum() / math.log(2) + math.log2(V)
    assert sum(ends) > 3 and abs(score(config).bits - expected) > 1e-3
    for changes in ({}, {"window": 7}, {"window": 130}):
        assert score(make(**whole, **changes), separator=separator).bits == pytest.approx(expected, rel=1e-6)
    in_pieces = score(make(), separator=separator).bits
    for changes, devices in (({"evaluation_batch_size": 3}, 2), ({"window": 7, "evaluation_batch_size": 64}, 8)):
        assert score(make(**changes), devices, separator).bits == pytest.approx(in_pieces, rel=1e-6)


@pytest.mark.gpu
def test_evaluation_leaves_the_parameters_as_they_were():
    config, grid = make(), distributed.make(jax.devices()[:2])
    placed = distributed.put(grid, distributed.REPLICATED, params(config))
    before = jax.tree.map(np.array, placed)
    evaluator = evaluate.make_evaluator(config, V, Text(), grid)
    assert evaluator(placed) == evaluator(placed)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(a, b)
