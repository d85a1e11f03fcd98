"""The average of the parameters: identities in float64, the same bits on any number of devices, skips left out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm import config as config_lib
from charlstm.config.training import OptimizerConfig
from charlstm.training import averaging, plateau, train_state
from charlstm.types import ModelParams
from tests.training.test_divergence import SKIP, advance, beyond
from tests.training.test_step import V, assert_equal_bits, make_config

pytestmark = pytest.mark.optimized

TURN = 4  # the update after which averaging begins, where it waits


def course_of(number: int) -> list[ModelParams]:
    """Parameters after each of `number` updates, float64."""
    random = np.random.default_rng(3)
    return [ModelParams(random.normal(size=(4, 3)), (), None, random.normal(size=5)) for _ in range(number)]


def averages(settings: OptimizerConfig, updates: list[ModelParams], turn: int | None = None) -> list[ModelParams]:
    """The average after each of the updates, in float64; after update `turn`, validation has long not improved."""
    with jax.enable_x64(True):
        first = jax.tree.map(lambda p: jnp.full_like(p, 7.0), updates[0])
        average, told, found = averaging.start(settings, first), plateau.start(), []
        compiled = jax.jit(lambda average, told, params: averaging.update(settings, average, told, params))
        for number, params in enumerate(updates, 1):
            average, told = compiled(average, told, jax.tree.map(jnp.asarray, params))
            found.append(jax.tree.map(np.asarray, average))
            if number == turn:
                told = jax.tree.map(np.asarray, told)._replace(best=np.float32(1), patience_count=np.int32(99))
                told = plateau.update(settings, told, 9.0)
        return found


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), one, other)


def test_ema_of_decay_0_is_the_parameters_to_the_bit():
    updates = course_of(5)
    for average, params in zip(averages(OptimizerConfig(average="ema", ema_decay=0.0), updates), updates, strict=True):
        assert_equal_bits(average, params)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_ema_is_optax_s_with_its_bias_taken_out(decay):
    updates = course_of(30)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rule = optax.ema(decay, debias=True)
        state, expected = rule.init(updates[0]), []
        for params in updates:
            average, state = rule.update(params, state)
            expected.append(average)
    for one, other in zip(averages(OptimizerConfig(average="ema", ema_decay=decay), updates), expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one, other)  # optax: 1 - decay^n


def test_asgd_from_the_start_is_the_mean_of_the_parameters_after_all_updates():
    updates = course_of(12)
    found = averages(OptimizerConfig(average="asgd", average_patience=0), updates)
    for n in range(1, 13):
        assert_close(found[n - 1], jax.tree.map(lambda *p: np.mean(p, axis=0), *updates[:n]))


def test_asgd_is_the_parameters_until_it_begins_and_then_the_mean_of_those_evaluated_and_all_after_them():
    updates = course_of(12)
    found = averages(OptimizerConfig(average="asgd", average_patience=3), updates, turn=TURN)
    for n in range(1, 13):
        if n <= TURN:
            assert_equal_bits(found[n - 1], updates[n - 1])
        else:
            assert_close(found[n - 1], jax.tree.map(lambda *p: np.mean(p, axis=0), *updates[TURN - 1 : n]))


EMA, ASGD = (
    config_lib.replace(SKIP, average=average, average_patience=0, ema_decay=0.9) for average in ("ema", "asgd")
)


def test_where_none_is_kept_nothing_is_paid_for_it():
    before = train_state.init(SKIP, V)
    assert before.average == ()
    state, _ = advance(SKIP, before, [0])
    assert (state.average, int(state.plateau.averaged)) == ((), 0)


@pytest.mark.parametrize(
    ("config", "others"), [(EMA, (1,)), pytest.param(ASGD, (), marks=pytest.mark.long)], ids=["ema", "asgd"]
)
def test_the_average_has_the_same_bits_on_any_number_of_devices_and_leaves_training_alone(config, others):
    straight, _ = advance(SKIP, train_state.init(SKIP, V), range(3))
    state, _ = advance(config, train_state.init(config, V), range(3))
    assert_equal_bits((state.params, state.opt_state), (straight.params, straight.opt_state))
    for devices in others:
        assert_equal_bits(state, advance(config, train_state.init(config, V), range(3), devices)[0])


@pytest.mark.parametrize("config", [EMA, pytest.param(ASGD, marks=pytest.mark.long)], ids=["ema", "asgd"])
def test_an_update_that_is_skipped_is_not_averaged(config):
    before, _ = advance(config, train_state.init(config, V), [0, 1])
    after, (metrics,) = advance(config, before, [beyond(config, 2)])
    assert not metrics.accepted
    assert_equal_bits((after.average, after.plateau), (before.average, before.plateau))
    assert int(before.plateau.averaged) == 2


def test_a_run_that_starts_from_other_parameters_starts_their_average():
    config = make_config(average="ema")
    state = train_state.init(config, V)
    other = jax.tree.map(lambda p: p + 1, state.params)
    begun = train_state.with_params(config, state, other)
    assert_equal_bits((begun.params, begun.average), (other, other))
    assert train_state.with_params(make_config(), state, other).average == ()
