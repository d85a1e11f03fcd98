"""The preset that a run without one is told of."""

import jax
import pytest

from charlstm import distributed
from charlstm.config import Config
from charlstm.run import presets


@pytest.mark.parametrize(
    ("symbols", "on_cpu", "devices", "name"),
    [
        (1_000_000, True, 2, "small"),
        (5_000_000, False, 8, "small"),
        (100_000_000, True, 2, "medium"),
        (100_000_000, False, 8, "medium"),
        (10**10, False, 1, "medium"),
        (10**10, True, 64, "medium"),
        (10**10, False, 8, "large"),
    ],
)
def test_the_preset_goes_by_the_size_of_the_text_and_the_devices(symbols, on_cpu, devices, name):
    assert presets.preset_for(symbols, on_cpu, devices) == name


def test_steps_are_those_of_the_preset_but_of_one_epoch_at_least_and_of_eight_at_most():
    small, a_step = Config.recipe("small"), 32 * 64
    own = small.training.num_steps
    assert presets.steps_for(small, own * a_step // 5) == own
    assert presets.steps_for(small, 2 * own * a_step) == 2 * own
    assert presets.steps_for(small, 100 * a_step) == 800
    assert presets.steps_for(small, 1) == 1


def test_one_sentence_names_preset_steps_epochs_and_time():
    mesh = distributed.make()
    told = presets.suggestion(Config(), 900_000, 256, mesh)
    assert f"for 900,000 symbols on {distributed.describe(mesh)}" in told
    assert "--flagfile=configs/small.flags --num_steps=3500 is meant (8 epochs, about " in told and "\n" not in told


@pytest.mark.parametrize("chosen", [{"hidden_size": 128}, {"num_steps": 20}])
def test_who_chose_a_model_or_a_length_is_told_nothing(chosen):
    assert presets.suggestion(Config(**chosen), 900_000, 256, distributed.make()) == ""


def test_more_arithmetic_is_expected_to_take_longer():
    times = [presets.seconds_per_step(Config(hidden_size=size, num_layers=4), 256, 1) for size in (16, 1024)]
    assert 0 < times[0] < times[1]


@pytest.mark.parametrize("tf32", [True, False])
def test_an_update_is_timed_in_the_precision_in_which_it_is_trained(tf32, monkeypatch):
    seen = []

    def one_symbol(_first, _last, body, h):
        seen.append(jax.config.jax_default_matmul_precision)
        return body(0, h)

    monkeypatch.setattr(presets.lax, "fori_loop", one_symbol)
    presets.seconds_per_step(Config(hidden_size=8, tf32=tf32), 256, 1)
    assert seen == [jax.config.jax_default_matmul_precision if tf32 else "highest"]
