"""The learning rate over time, against numbers worked by hand, char-rnn's rule run as a loop, and optax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm.config.training import OptimizerConfig, TrainingConfig
from charlstm.training import plateau as plateau_lib
from charlstm.training import schedules

SCHEDULES = ("constant", "linear", "cosine", "exponential", "step", "plateau")
TURN = 2**24  # float32 cannot tell TURN and TURN + 1 apart


def rates(steps, steps_per_epoch: int = 10, num_steps: int = 100, **settings) -> np.ndarray:
    """The learning rate at each of `steps`, as the compiled schedule gives it."""
    schedule = schedules.make(OptimizerConfig(**settings), steps_per_epoch, num_steps)
    values = jax.jit(jax.vmap(schedule, (0, None)))(jnp.asarray(steps, jnp.int32), plateau_lib.start())
    assert values.dtype == jnp.float32
    return np.asarray(values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_a_float32_scalar_and_full_at_the_start(name):
    schedule = schedules.make(OptimizerConfig(schedule=name, learning_rate=0.002), 7, 100)
    for call in (schedule, jax.jit(schedule)):
        rate = call(jnp.int32(0), plateau_lib.start())
        assert rate.shape == () and rate.dtype == jnp.float32
        assert rate == np.float32(0.002)


def test_the_constant_rate_stays():
    np.testing.assert_array_equal(rates([0, 1, 99, 10**9], learning_rate=0.3), np.float32(0.3))


def test_linear_falls_by_equal_parts_to_its_final_fraction():
    values = rates(
        [0, 1, 5, 9, 10, 11, 10**9], schedule="linear", learning_rate=2.0, decay_steps=10, final_fraction=0.2
    )
    np.testing.assert_allclose(values, [2.0, 1.84, 1.2, 0.56, 0.4, 0.4, 0.4], rtol=1e-6)


def test_cosine_falls_along_half_a_wave_to_its_final_fraction():
    values = rates([0, 2, 4, 6, 8, 12, 13], schedule="cosine", learning_rate=2.0, decay_steps=12, final_fraction=0.5)
    half_wave = np.array([1, (1 + 0.75**0.5) / 2, 0.75, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose(values, 2 * (0.5 + 0.5 * half_wave), rtol=1e-6)


def test_step_decays_at_each_whole_period():
    values = rates([0, 9, 10, 19, 20, 30], schedule="step", learning_rate=8.0, decay_steps=10, decay_rate=0.5)
    np.testing.assert_allclose(values, [8, 8, 4, 4, 2, 1], rtol=1e-6)


@pytest.mark.parametrize("epochs", [(25, 35), (1,), (1, 2, 3), (3, 40)])
def test_step_drops_after_each_of_drop_epochs_as_pytorch_s_multi_step_lr_does(epochs):
    steps_per_epoch, rate, expected = 7, 2e-3, []
    for epoch in range(50):  # PyTorch's scheduler is told of the end of each epoch
        rate *= 0.1 if epoch in epochs else 1
        expected += [rate] * steps_per_epoch
    settings = dict(schedule="step", learning_rate=2e-3, decay_rate=0.1, drop_epochs=",".join(map(str, epochs)))
    for decay_steps in (0, 5):  # in place of which they are
        values = rates(range(len(expected)), steps_per_epoch, decay_steps=decay_steps, **settings)
        np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "text", ["25,25", "35,25", "0,3", "-1", "3,", ",", "a", "1.5", "25;35", "2147483648", "9" * 5000]
)
def test_drop_epochs_that_are_no_list_of_epochs_are_refused(text):
    with pytest.raises(ValueError, match=rf"^drop_epochs='{re.escape(text)}' is not a list of epochs"):
        OptimizerConfig(drop_epochs=text)


@pytest.mark.parametrize("start", [0, 1, 3, 10])
def test_exponential_is_the_rule_of_char_rnn(start):
    steps_per_epoch, rate, expected = 7, 2e-3, []
    for i in range(1, 25 * steps_per_epoch + 1):  # char-rnn counts iterations from 1 and decays after one
        if i == 1 and start == 0:
            rate *= 0.97  # an epoch 0 that decays is before its first iteration: our rule goes on where its stops
        expected.append(rate)
        if i % steps_per_epoch == 0 and i // steps_per_epoch >= start:
            rate *= 0.97
    values = rates(range(len(expected)), steps_per_epoch, schedule="exponential", decay_start_epoch=start)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_exponential_with_ten_epochs_decays_first_when_ten_epochs_are_read():
    values = rates([99, 100, 109, 110], 10, schedule="exponential", learning_rate=1.0, decay_rate=0.5)
    np.testing.assert_allclose(values, [1, 0.5, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_by_equal_parts_and_full_is_its_last_step(name):
    values = rates(range(6), 100, schedule=name, learning_rate=1.0, warmup_steps=4)
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    assert values[5] <= 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_begins_where_warm_up_ends_and_ends_at_decay_steps_all_the_same(name):
    settings = dict(schedule=name, learning_rate=1.0, final_fraction=0.1)
    warmed = rates(range(20, 130), decay_steps=120, warmup_steps=20, **settings)
    np.testing.assert_array_equal(warmed, rates(range(110), decay_steps=100, **settings))
    assert warmed[0] == 1 and warmed[99] > 0.1 and warmed[100] == np.float32(0.1)


@pytest.mark.parametrize("name", ["exponential", "step"])
def test_epochs_and_periods_are_counted_from_the_first_step_of_the_run(name):
    settings = dict(schedule=name, decay_steps=10, decay_start_epoch=2)
    np.testing.assert_array_equal(rates(range(15, 90), warmup_steps=15, **settings), rates(range(15, 90), **settings))


@pytest.mark.parametrize("name", ["linear", "cosine", "step"])
def test_decay_steps_of_zero_means_the_whole_run(name):
    np.testing.assert_array_equal(
        rates(range(200), num_steps=60, schedule=name), rates(range(200), num_steps=999, schedule=name, decay_steps=60)
    )


@pytest.mark.parametrize("warmup_steps", [30, 300])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_ends_in_its_warm_up_rises_all_the_way(name, warmup_steps):
    values = rates(range(31), 100, num_steps=30, schedule=name, learning_rate=1.0, warmup_steps=warmup_steps)
    np.testing.assert_allclose(values[:30], np.arange(1, 31) / warmup_steps, rtol=1e-6)
    assert np.isfinite(values[30])


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_and_cosine_and_step_equal_optax(final):
    steps, r = np.arange(500), 3e-3
    shared = dict(learning_rate=r, decay_steps=400, final_fraction=final)
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for the strict one
        linear, cosine, stairs, warmed = (
            np.array([schedule(s) for s in steps])
            for schedule in (
                optax.linear_schedule(r, r * final, 400),
                optax.cosine_decay_schedule(r, 400, alpha=final),
                optax.exponential_decay(r, 60, 0.8, staircase=True),
                optax.warmup_cosine_decay_schedule(0.0, r, 50, 400, end_value=r * final),
            )
        )
    # optax's rounding, near the end, is of the full rate
    np.testing.assert_allclose(rates(steps, schedule="linear", **shared), linear, rtol=1e-6, atol=2e-7 * r)
    np.testing.assert_allclose(rates(steps, schedule="cosine", **shared), cosine, rtol=1e-6, atol=2e-7 * r)
    ours = rates(steps, schedule="step", learning_rate=r, decay_steps=60, decay_rate=0.8)
    np.testing.assert_allclose(ours, stairs, rtol=1e-6)
    ours = rates(steps[50:], schedule="cosine", warmup_steps=50, **shared)
    np.testing.assert_allclose(ours, warmed[50:], rtol=1e-6, atol=2e-7 * r)


def test_a_decay_falls_on_its_very_step_where_float32_has_no_odd_numbers():
    values = rates([TURN, TURN + 1], schedule="step", learning_rate=1.0, decay_steps=TURN + 1, decay_rate=0.5)
    np.testing.assert_allclose(values, [1, 0.5], rtol=1e-6)
    values = rates([TURN, TURN + 1], TURN + 1, schedule="exponential", learning_rate=1.0, decay_start_epoch=1)
    np.testing.assert_allclose(values, [1, 0.97], rtol=1e-6)
    values = rates([TURN, TURN + 1], TURN + 1, schedule="step", learning_rate=1.0, drop_epochs="1", decay_rate=0.5)
    np.testing.assert_allclose(values, [1, 0.5], rtol=1e-6)


def test_the_last_steps_of_a_long_decay_keep_their_digits():
    N = 3 * 10**7 + 1
    values = rates([N - 3, N - 2, N - 1, N], schedule="linear", learning_rate=1.0, decay_steps=N)
    np.testing.assert_allclose(values, np.array([3, 2, 1, 0]) / N, rtol=1e-6)
    values = rates([N - 3, N - 2, N - 1, N], schedule="cosine", learning_rate=1.0, decay_steps=N)
    np.testing.assert_allclose(values, np.sin(np.pi / 2 * np.array([3, 2, 1, 0]) / N) ** 2, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_step_that_an_int32_holds_has_a_rate(name):
    settings = dict(schedule=name, learning_rate=1.0, final_fraction=0.5, decay_rate=0.999, warmup_steps=3)
    (last,) = rates([2**31 - 1], steps_per_epoch=2**40, **settings, decay_steps=2**31 - 1)
    assert 0.5 <= last <= 1


@pytest.mark.parametrize("step", [0, 3, 10**9])
def test_plateau_is_the_full_rate_until_it_has_dropped_whatever_the_step(step):
    schedule = schedules.make(OptimizerConfig(schedule="plateau", decay_rate=0.1, learning_rate=2.0), 7, 100)
    before = plateau_lib.start()
    assert schedule(jnp.int32(step), before) == 2
    np.testing.assert_allclose(schedule(jnp.int32(step), before._replace(dropped=jnp.array(True))), 0.2, rtol=1e-6)


def test_a_decay_rate_of_zero_means_a_tenth_where_the_rate_drops_seldom_and_else_three_percent_less():
    exponential = dict(schedule="exponential", decay_start_epoch=1)
    for settings in (exponential, dict(schedule="step", decay_steps=10), exponential | dict(drop_epochs="1")):
        np.testing.assert_allclose(rates([9, 10], learning_rate=1.0, **settings), [1, 0.97], rtol=1e-6)
    np.testing.assert_allclose(rates([9, 10], schedule="step", learning_rate=1.0, drop_epochs="1"), [1, 0.1], rtol=1e-6)
    plateau = schedules.make(OptimizerConfig(schedule="plateau", learning_rate=1.0), 10, 100)
    dropped = plateau(jnp.int32(3), plateau_lib.start()._replace(dropped=jnp.array(True)))
    np.testing.assert_allclose(dropped, 0.1, rtol=1e-6)


def test_a_decay_rate_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"decay_rate=-0.5 must be 0 or more"):
        OptimizerConfig(decay_rate=-0.5)


# What is said of a schedule that a run of this length does not see.

PLATEAU = dict(schedule="plateau", plateau_patience=3)


def remarks(num_steps=100, evaluate_every=10, stop_after=0, resumed=False, **settings) -> list[str]:
    training = TrainingConfig(num_steps=num_steps, evaluate_every=evaluate_every, stop_after=stop_after)
    return list(schedules.remarks(OptimizerConfig(**settings), training, 10, resumed))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            dict(schedule="cosine", decay_steps=6),
            "the learning rate is 0 from step 6 on, for 94% of the 100 steps, which learn nothing, as decay_steps=6: "
            "--decay_steps=0 is the whole run",
        ),
        (
            dict(schedule="linear", decay_steps=80, final_fraction=0.5, learning_rate=0.01, resumed=True),
            "the learning rate is 0.005 from step 80 on, for 20% of the 100 steps, as decay_steps=80: for a decay "
            "over 100 steps begin a new run, in another run_dir",
        ),
        (
            dict(warmup_steps=400, learning_rate=0.01),
            "the learning rate comes to 25% of 0.01 and no further, as warmup_steps=400 and num_steps=100",
        ),
        (
            dict(schedule="exponential"),
            "the learning rate never drops: with schedule=exponential it would first drop at step 100, and "
            "num_steps=100",
        ),
        (
            dict(schedule="step"),
            "the learning rate never drops: with schedule=step it would first drop at step 100, and num_steps=100",
        ),
        (
            dict(schedule="step", drop_epochs="12,14", decay_steps=5),
            "the learning rate never drops: with schedule=step it would first drop at step 120, and num_steps=100",
        ),
        (
            PLATEAU | dict(evaluate_every=30),
            "the learning rate never drops: schedule=plateau waits for 4 evaluations or more, and the run has 3, as "
            "evaluate_every=30 and num_steps=100",
        ),
        (
            dict(average="asgd", average_latest=10),  # the evaluation after the last step is too late
            "the average never begins: average=asgd waits for 10 evaluations or more, and the run has 9, as "
            "evaluate_every=10 and num_steps=100",
        ),
        (
            PLATEAU | dict(stop_after=3, plateau_latest=10),
            "the learning rate never drops: schedule=plateau waits for 3 evaluations without gain, and stop_after=3 "
            "ends the run no later",
        ),
        (
            dict(average="asgd", average_patience=4, stop_after=2),
            "the average never begins: average=asgd waits for 4 evaluations without gain, and stop_after=2 ends the "
            "run no later",
        ),
    ],
)
def test_what_a_run_does_not_see_of_its_schedule_is_said(settings, said):
    assert remarks(**settings) == [said]


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(decay_steps=5),
        dict(schedule="cosine"),
        dict(schedule="cosine", decay_steps=100, warmup_steps=100),
        dict(schedule="linear", decay_steps=500),
        dict(schedule="exponential", decay_start_epoch=9),
        dict(schedule="step", decay_steps=99),
        dict(schedule="step", drop_epochs="9,20"),
        PLATEAU | dict(evaluate_every=24),
        PLATEAU | dict(evaluate_every=30, plateau_latest=3),
        PLATEAU | dict(stop_after=4),
        PLATEAU | dict(stop_after=3, plateau_latest=9),
        PLATEAU | dict(stop_after=3, resumed=True),
        dict(average="asgd", average_patience=0, evaluate_every=0),
        dict(average="ema", evaluate_every=1000),
    ],
)
def test_of_a_schedule_that_a_run_sees_nothing_is_said(settings):
    assert remarks(**settings) == []


@pytest.mark.parametrize("settings", [dict(schedule="exponential"), dict(schedule="step", drop_epochs="3")])
def test_the_step_of_the_first_drop_is_that_of_the_schedule(settings):
    settings = settings | dict(learning_rate=1.0, decay_start_epoch=4, decay_rate=0.5)
    first = schedules._first_drop(OptimizerConfig(**settings), 10, 100)
    np.testing.assert_array_equal(rates([first - 1, first], **settings), np.float32([1, 0.5]))
