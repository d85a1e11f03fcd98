"""Windows of random lengths: every symbol once and in order, borders from the step alone, few lengths, their law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import open_windows
from data_pipeline.settings import StreamSettings
from data_pipeline.streams import StreamPlan
from tests.data_pipeline.test_loader import equal
from tests.data_pipeline.test_streams import Endless, Text, numbered


@st.composite
def plans(draw):
    short, deviation = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])), draw(st.integers(0, 3))
    window = draw(st.integers((2 if short else 1) * (2 * deviation + 1), 30))
    batch_size = draw(st.integers(1, 4))
    symbols = batch_size * window + draw(st.integers(0, 600))
    return StreamPlan(symbols, batch_size, window, draw(st.integers(0, 99)), True, 0.2, deviation, short)


@settings(deadline=None, max_examples=50)
@given(plans(), st.integers(0, 3))
def test_an_epoch_reads_every_symbol_of_every_stream_once_and_in_order(plan, epoch):
    text, rows = numbered(plan.symbols), range(plan.batch_size)
    first = epoch * plan.steps_per_epoch
    windows = [plan.read(text, first + w, rows) for w in range(plan.steps_per_epoch)]
    inputs = np.concatenate([batch.inputs for batch in windows], axis=1).astype(int)
    assert len(np.unique(inputs)) == inputs.size
    assert ((inputs[:, 1:] - inputs[:, :-1]) % plan.symbols == 1 % plan.symbols).all()
    assert inputs[0, 0] == plan.offset(epoch)
    left_out = plan.symbols // plan.batch_size - inputs.shape[1]
    # One more window would not surely fit: windows of half the length may come a window earlier or later.
    assert 0 <= left_out < plan.window + (plan.window - plan.window // 2) * bool(plan.short_probability)
    for batch in windows:
        np.testing.assert_array_equal(batch.targets, (batch.inputs.astype(int) + 1) % plan.symbols)


def test_an_epoch_that_ends_where_the_split_does_reads_every_symbol_exactly_once():
    plan = StreamPlan(4 * 10 * 30, 4, 10, deviation=2)
    for epoch in range(6):
        inputs = plan.read(numbered(1200), epoch * 30, range(4), windows=30).inputs
        assert sorted(inputs.ravel()) == [*range(1200)]


@settings(deadline=None, max_examples=50)
@given(plans(), st.data())
def test_windows_read_together_are_those_read_one_by_one(plan, data):
    text, rows = numbered(plan.symbols), range(plan.batch_size)
    first = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    count = data.draw(st.integers(1, plan.steps_per_epoch - first))
    step = 2 * plan.steps_per_epoch + first
    together = plan.read(text, step, rows, windows=count)
    singly = [plan.read(text, s, rows) for s in range(step, step + count)]
    for name in together._fields:
        joined = np.concatenate([getattr(batch, name) for batch in singly], axis=1)
        np.testing.assert_array_equal(getattr(together, name), joined)


RECIPE = StreamPlan(128 * 200 * 4001, 128, 200, seed=1, deviation=5, short_probability=0.05)  # AWD's


def lengths(plan: StreamPlan, epoch: int = 0) -> np.ndarray:
    return np.diff([plan.start(epoch, window) for window in range(plan.steps_per_epoch + 1)])


def test_lengths_have_their_mean_their_deviation_and_their_part_of_short_ones_and_are_ten():
    found = np.concatenate([lengths(RECIPE, epoch) for epoch in range(3)])
    assert set(found) == {*range(190, 215, 5), *range(90, 115, 5)}
    short = found < 150
    assert short.mean() == pytest.approx(0.05, abs=1e-3)
    for part, mean in ((found[short], 100), (found[~short], 200)):
        assert part.mean() == pytest.approx(mean, abs=4 * 5 / len(part) ** 0.5)
        assert part.std() == pytest.approx(5, rel=4 / (2 * len(part)) ** 0.5)
    sixteenths = [(found == length).sum() / (~short).sum() * 16 for length in range(190, 215, 5)]
    np.testing.assert_allclose(sixteenths, [1, 4, 6, 4, 1], atol=0.3)
    assert max(found) == StreamSettings(window=200, window_deviation=5).longest_window


def test_lengths_are_those_of_the_seed_and_the_step_in_every_version():
    assert lengths(RECIPE)[:12].tolist() == [205, 95, 195, 200, 210, 195, 205, 195, 205, 200, 190, 205]
    assert (lengths(RECIPE)[:99] != lengths(RECIPE, 1)[:99]).any()
    other = StreamPlan(RECIPE.symbols, 128, 200, seed=2, deviation=5, short_probability=0.05)
    assert (lengths(RECIPE)[:99] != lengths(other)[:99]).any()


def test_without_a_deviation_and_short_windows_all_are_equal_and_as_before():
    plan = StreamPlan(1003, 8, 10)
    assert set(lengths(plan)) == {10} and plan.steps_per_epoch == 1003 // 80


def test_a_far_step_is_found_without_adding_up_those_before():
    plan = StreamPlan(2**60, 4, 200, deviation=5, short_probability=0.05)
    step = 10**15 + 3
    before, after = (plan.read(Endless(2**60), s, range(4)) for s in (step, step + 1))
    np.testing.assert_array_equal(before.targets[:, -1], after.inputs[:, 0])
    assert (after.inputs.shape[1] - 200) % 5 == 0


@pytest.mark.parametrize("start", [0, 40, 121])
def test_read_ahead_from_any_step_they_are_the_windows_of_the_plan(start):
    plan = StreamPlan(3 * 6000, 3, 100, 5, deviation=4, short_probability=0.1)  # runs of 163 windows, epochs of 63
    text = Text(np.random.default_rng(7).integers(0, 5, plan.symbols).astype(np.uint8))
    with open_windows(text, plan, rows=range(1, 3), start_step=start, separator=(2,)) as windows:
        for step in range(start, start + 30):
            assert equal(next(windows), plan.read(text, step, range(1, 3), separator=(2,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 16, "window_deviation": 8}, "window_deviation=8 .* of 16 symbols .* use at most 7, .* than 16"),
        (
            {"window": 16, "window_deviation": 4, "short_window_probability": 0.1},
            "window_deviation=4 .* of 8 symbols .* use at most 3,",
        ),
        ({"window": 1, "short_window_probability": 0.1}, "of 0 symbols .* or a longer window than 1"),
        ({"short_window_probability": 1.5}, "short_window_probability=1.5 must be from 0 to 1"),
        ({"window_deviation": -1}, "window_deviation=-1 must be 0 or more"),
    ],
)
def test_settings_that_leave_a_window_nothing_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        StreamSettings(**changes)
