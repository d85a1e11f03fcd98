"""How streams and logical shards are divided over devices, and how many devices of a CPU take part."""

import re

import jax
import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.training import placement


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"batch_size": 100}, 8, "batch_size=100 cannot be split over 8 devices: use 96 or 104"),
        ({"batch_size": 4}, 8, "batch_size=4 cannot be split over 8 devices: use 8"),
        ({"batch_size": 24, "logical_shards": 16}, 8, "batch_size=24 cannot be split into logical_shards=16"),
        (
            {"batch_size": 24, "logical_shards": 8},
            3,
            "logical_shards=8 cannot be split exactly over 3 devices: use 1, 2, 4, 8",
        ),
    ],
)
def test_counts_that_do_not_divide_are_refused_with_both_numbers_and_the_remedy(changes, devices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        placement.shards_per_device(config_lib.replace(Config(), **({"logical_shards": 8} | changes)), devices)


@pytest.mark.parametrize(
    ("settings", "devices"),
    [
        ({"batch_size": 64}, 8),
        ({"batch_size": 63}, 7),
        ({"batch_size": 50}, 5),  # of 6, which would have 8 streams each, none could
        ({"batch_size": 24}, 3),
        ({"batch_size": 5}, 1),
        ({"batch_size": 64, "logical_shards": 4}, 4),
        ({"batch_size": 60, "logical_shards": 6}, 6),
        ({"batch_size": 64, "logical_shards": 3}, 1),  # which the training step refuses by name
        ({"batch_size": 60, "logical_shards": 1, "reduction": "fast"}, 6),
    ],
)
def test_as_many_cores_compute_as_the_streams_and_the_logical_shards_can_be_split_over(settings, devices, monkeypatch):
    assert len(jax.devices()) == 8
    monkeypatch.setenv("XLA_FLAGS", "")
    assert placement.choose_mesh(config_lib.replace(Config(), **settings)).size == devices


@pytest.mark.parametrize("given", ["XLA_FLAGS", "JAX_NUM_CPU_DEVICES"])
def test_a_number_of_devices_that_the_user_has_set_is_not_lowered(given, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv(given, "--xla_force_host_platform_device_count=8" if given == "XLA_FLAGS" else "8")
    assert placement.choose_mesh(config_lib.replace(Config(), batch_size=5)).size == 8
