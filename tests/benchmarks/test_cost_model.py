"""The arithmetic of the cost model."""

import dataclasses

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import MLSTM, V100, Machine, Work

MACHINE = Machine(inside=8e9, between=1e9, memory=4e11, latency=1e-3, gpus=4)
WORK = Work(seconds=1.0, streams=10, window=100, gradient=1e9, least=0.2)


def test_one_gpu_reduces_nothing_and_takes_what_was_measured():
    for reduction in ("fast", "exact"):
        assert cost_model.reducing(MACHINE, 1e9, 1, reduction) == 0
        assert cost_model.update(MACHINE, WORK, 1, 10, reduction) == 1.0
        assert cost_model.speedup(MACHINE, WORK, 1, reduction) == 1


def test_few_streams_take_the_least_time():
    assert cost_model.compute(WORK, 0) == pytest.approx(0.2)
    assert cost_model.compute(WORK, 5) == pytest.approx(0.6)


def test_a_replicated_update_stays_whole_on_every_gpu_and_a_sharded_one_is_divided():
    work = dataclasses.replace(WORK, updating=0.1, gradient=0.0)
    still = dataclasses.replace(MACHINE, latency=0.0)  # so that nothing is lost by reducing
    assert cost_model.update(still, work, 1, 10, "exact") == pytest.approx(1.0)  # it is part of what was measured
    assert cost_model.compute(work, 5) == pytest.approx(0.2 + 0.7 / 2)
    assert cost_model.update(still, work, 4, 5, "exact") == pytest.approx(0.2 + 0.7 / 2 + 0.1)
    assert cost_model.update(still, work, 4, 5, "exact", sharded=True) == pytest.approx(0.2 + 0.7 / 2 + 0.1 / 4)
    assert cost_model.speedup(still, work, 4, "exact") == pytest.approx(4)
    assert cost_model.speedup(still, work, 4, "exact", sharded=True) == pytest.approx(4 / (1 - 0.1 * 3 / 4))
    assert cost_model.speedup(still, work, 4, "exact", 10, sharded=True) == pytest.approx(1 / (0.2 + 0.7 / 4 + 0.1 / 4))


def test_within_a_node_both_reductions_move_the_same_bytes():
    # 4 GPUs: 2 * 3/4 GB at 8 GB/s; 2 * 2 messages, or 2 * 3, of a millisecond; and 4 GB of memory at 400 GB/s.
    assert cost_model.reducing(MACHINE, 1e9, 4, "fast") == pytest.approx(1.5 / 8 + 0.004)
    assert cost_model.reducing(MACHINE, 1e9, 4, "exact") == pytest.approx(1.5 / 8 + 0.006 + 0.01)


def test_between_nodes_an_all_to_all_has_one_adapter_and_the_rest_all_of_a_node():
    # 16 GPUs: 15/16 GB; all of a node's 4 adapters together make 4 GB/s, one 1 GB/s.
    assert cost_model.reducing(MACHINE, 1e9, 16, "fast") == pytest.approx(2 * 15 / 16 / 4 + 0.008)
    assert cost_model.reducing(MACHINE, 1e9, 16, "exact") == pytest.approx(15 / 16 * (1 + 1 / 4) + 0.030 + 0.01)


def test_a_batch_that_does_not_grow_gains_nothing_once_the_least_time_is_reached():
    speeds = [cost_model.speedup(MACHINE, WORK, n, "fast", total_streams=40) for n in (1, 4, 1024)]
    assert speeds[0] == 1 < speeds[1] < 4
    assert speeds[2] < (0.2 + 0.8 * 4) / 0.2
    assert cost_model.stops_at(MACHINE, WORK, "fast", total_streams=40) == 8


def test_where_nothing_is_lost_it_never_stops():
    mutable = dataclasses.replace(WORK, gradient=0.0)
    assert cost_model.stops_at(dataclasses.replace(MACHINE, latency=0.0), mutable, "exact") is None


def test_the_published_109_of_128_gpus_are_met_with_a_jitter_of_5_percent():
    assert cost_model.speedup(V100, MLSTM, 128, "fast") == pytest.approx(126, abs=1)
    assert cost_model.speedup(V100, dataclasses.replace(MLSTM, jitter=0.051), 128, "fast") == pytest.approx(109, abs=1)
