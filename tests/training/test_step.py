"""The training step: the same bits on any number of devices, one reduction, the right gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import collectives
from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.model import language_model
from charlstm.training import step
from charlstm.training.loss import cross_entropy
from data_pipeline.batch import Batch

V = 11
QUIET = dict.fromkeys(("input_dropout", "layer_dropout", "output_dropout", "weight_drop"), 0.0)
LSTM = {"cell": "lstm", "cap_input_gate": True}
# All that the general path does, with trained initial states.
GENERAL = {
    "cell": "layer_norm_lstm", "num_layers": 1, "embedding_size": 6, "zoneout": 0.1, "zoneout_cell": 0.3,
    "mogrifier_rounds": 2, "mogrifier_rank": 2, "train_initial_state": True, "on_divergence": "skip",
}  # fmt: skip
KINDS = pytest.mark.parametrize(
    "kind",
    [
        LSTM,
        {"cell": "gru"},
        {"cell": "rnn"},
        {"cell": "mlstm", "weight_norm": True},
        GENERAL,
    ],
    ids=["lstm", "gru", "rnn", "mlstm", "general"],
)


def make_config(**changes) -> Config:
    small = {
        "batch_size": 16, "window": 7, "hidden_size": 12, "num_layers": 2, "logical_shards": 8, "decay_steps": 10,
        "input_dropout": 0.1, "layer_dropout": 0.25, "output_dropout": 0.25, "weight_drop": 0.2, "clip_norm": 0.5,
        "activation_penalty": 0.1, "activation_change_penalty": 0.1, "l2": 1e-4,
    }  # fmt: skip
    return config_lib.replace(Config(), **(small | changes))


def batch(config: Config, number: int) -> Batch:
    B, T = config.streams.batch_size, config.streams.window
    random = np.random.default_rng(number)
    text = random.integers(0, V, (B, T + 1), dtype=np.uint8)
    return Batch(text[:, :-1], text[:, 1:], random.random((B, T)) < 0.05)


@functools.cache
def compiled(config: Config, devices: int):
    mesh = distributed.make(jax.devices()[:devices])
    return mesh, step.make(config, V, mesh, 100)


def run(config: Config, devices: list[int], steps: int = 4) -> tuple[step.TrainState, list]:
    """The state after `steps`, each step made on the next of `devices` (a count of them), and all metrics."""
    state, metrics = step.init(config, V), []
    for number in range(steps):
        mesh, train_step = compiled(config, devices[number % len(devices)])
        state = step.place(mesh, jax.tree.map(np.asarray, state))
        state, reported = train_step(state, distributed.put(mesh, distributed.BY_STREAM, batch(config, number)))
        metrics.append(jax.tree.map(np.asarray, reported))
    return jax.tree.map(np.asarray, state), metrics


def assert_equal_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (LSTM, "float32"),
        pytest.param(LSTM, "bfloat16", marks=pytest.mark.long),
        pytest.param(LSTM | {"remat": True}, "float32", marks=pytest.mark.long),
        ({"cell": "gru"}, "bfloat16"),
        pytest.param({"cell": "rnn"}, "float32", marks=pytest.mark.long),
        pytest.param({"cell": "mlstm", "weight_norm": True}, "float32", marks=pytest.mark.long),
        pytest.param(GENERAL, "bfloat16", marks=pytest.mark.long),
    ],
    ids=["lstm", "lstm-bfloat16", "lstm-remat", "gru-bfloat16", "rnn", "mlstm", "general-bfloat16"],
)
def test_any_number_of_devices_that_divides_the_shards_gives_the_same_bits(kind, dtype):
    config = make_config(compute_dtype=dtype, state_dropout=0.2, **kind)
    state, metrics = run(config, [8])
    for devices in ([4], [1], [8, 2, 4, 1]):
        other, other_metrics = run(config, devices)
        assert_equal_bits(state, other)
        assert_equal_bits(metrics, other_metrics)


@pytest.mark.long
def test_shards_that_are_no_power_of_two_give_the_same_bits():
    config = make_config(batch_size=24, logical_shards=6, embedding_size=5)
    state, _ = run(config, [6], steps=3)
    for devices in ([3], [2], [1]):
        assert_equal_bits(state, run(config, devices, steps=3)[0])


def test_the_fast_reduction_is_within_1e_5_of_the_exact_one_on_any_number_of_devices():
    state, _ = run(make_config(), [8])
    for devices in (8, 4, 1):
        fast, _ = run(make_config(reduction="fast"), [devices])
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(fast.params), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_the_fast_reduction_takes_a_count_that_does_not_divide_the_shards():
    config = make_config(batch_size=24, logical_shards=8, reduction="fast")
    state, _ = run(config, [8], steps=3)
    other, _ = run(config, [3], steps=3)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


@KINDS
def test_the_gradient_is_reduced_once_an_update_and_never_in_a_loop(kind):
    # The exact reduction of each cell, and the fast one, which is the same for all, of one.
    reduction = "fast" if kind["cell"] == "gru" else "exact"
    expected = {"all-reduce": 1} if reduction == "fast" else {"all-to-all": 1, "all-gather": 1}
    config = make_config(reduction=reduction, **({"embedding_size": 6} | kind))
    mesh = distributed.make(jax.devices()[:4])
    state = step.abstract(config, V, mesh)
    rows = distributed.abstract(mesh, distributed.BY_STREAM, batch(config, 0))
    text = step.make(config, V, mesh, 100).lower(state, rows).compile().as_text()
    # The gradient, the loss and the count of poisoned rows, in float32; cut into equal pieces for 4 devices, and twice.
    floats = sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 2
    size = 4 * floats if reduction == "fast" else 2 * 4 * (floats + -floats % 4)
    assert collectives.in_program(text) == {"collectives": expected, "collectives_in_loops": 0, "bytes": size}


def test_windows_of_other_lengths_scale_the_rate_compile_once_each_and_have_the_same_bits_on_any_number_of_devices():
    config = make_config(learning_rate=0.7, num_layers=1)
    widths = [7, 5, 7, 5]

    def after(devices):
        mesh, train_step = compiled(config, devices)
        state, metrics = step.init(config, V), []
        for number, width in enumerate(widths):
            rows = Batch(*(np.ascontiguousarray(a[:, :width]) for a in batch(config, number)))
            placed = step.place(mesh, jax.tree.map(np.asarray, state))
            state, reported = train_step(placed, distributed.put(mesh, distributed.BY_STREAM, rows))
            metrics.append(jax.tree.map(np.asarray, reported))
        return jax.tree.map(np.asarray, state), metrics

    state, metrics = after(8)
    assert compiled(config, 8)[1]._cache_size() == 2
    assert_equal_bits((state, metrics), after(4))
    for width, reported in zip(widths, metrics, strict=True):
        assert reported.learning_rate == pytest.approx(0.7 * width / 7)
        assert reported.symbols == 16 * width
        assert reported.loss == pytest.approx(reported.loss_B.sum() / (16 * width), rel=1e-5)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_the_update_is_that_of_the_mean_loss_over_all_symbols_by_plain_autodiff(reduction):
    config = make_config(**QUIET, optimizer="sgd", learning_rate=0.5, clip_norm=0.0, l2=0.0, reduction=reduction)
    rows = batch(config, 0)
    start = jax.tree.map(np.asarray, step.init(config, V))

    def mean_loss(params):
        state = language_model.zero_state(config.model, 16)
        _, h_TBH = language_model.features(config.model, params, state, rows.inputs.astype(np.int32), rows.reset)
        logits = language_model.logits(config.model, params, h_TBH)
        loss = cross_entropy(logits, rows.targets.astype(np.int32).T).mean()
        change_TBH = jnp.where(rows.reset.T[1:, :, None], 0, h_TBH[1:] - h_TBH[:-1])
        return loss + 0.1 * (h_TBH**2).mean() + 0.1 * (change_TBH**2).mean(), loss

    (_, loss), gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(start.params)
    state, metrics = run(config, [4], steps=1)
    np.testing.assert_allclose(metrics[0].loss, loss, rtol=1e-6)
    for p, g, new in zip(*map(jax.tree.leaves, (start.params, gradient, state.params)), strict=True):
        np.testing.assert_allclose(new, p - 0.5 * g, rtol=1e-5, atol=1e-7)


def test_every_device_holds_the_same_parameters():
    config = make_config()
    mesh = distributed.make()
    state = step.place(mesh, step.init(config, V))
    state, _ = step.make(config, V, mesh, 100)(state, distributed.put(mesh, distributed.BY_STREAM, batch(config, 0)))
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8
        for copy in copies[1:]:
            assert_equal_bits(copies[0], copy)


def test_the_recurrent_state_is_split_by_stream_and_carried():
    config = make_config()
    mesh = distributed.make()
    state = step.place(mesh, step.init(config, V))
    h = state.recurrent_state[0].h
    assert h.addressable_shards[0].data.shape == (2, 12)
    assert not np.asarray(h).any()
    state, _ = step.make(config, V, mesh, 100)(state, distributed.put(mesh, distributed.BY_STREAM, batch(config, 0)))
    assert np.asarray(state.recurrent_state[0].h).any(1).all()
    assert int(state.step) == 1


def test_a_stream_that_is_not_finite_is_named_by_its_row():
    config = make_config(**QUIET)
    mesh = distributed.make()
    start = step.init(config, V)
    poisoned = start.recurrent_state[1].h.at[5, 3].set(jnp.nan)
    layers = (start.recurrent_state[0], start.recurrent_state[1]._replace(h=poisoned))
    rows = batch(config, 0)
    rows.reset[:] = False
    state = step.place(mesh, start._replace(recurrent_state=layers))
    _, metrics = step.make(config, V, mesh, 100)(state, distributed.put(mesh, distributed.BY_STREAM, rows))
    assert np.flatnonzero(~np.asarray(metrics.finite_B)).tolist() == [5]
    assert not np.isfinite(metrics.loss)


def test_a_poisoned_stream_and_a_run_gone_back_start_from_the_trained_state():
    config = make_config(compute_dtype="bfloat16", state_dropout=0.2, **GENERAL)  # compiled above
    state, _ = run(config, [8], steps=2)
    first = language_model.reset_state(state.params, state.recurrent_state)
    assert all(leaf.any() for leaf in jax.tree.leaves(first)), "resets have trained them"
    layers = jax.tree.map(np.array, state.recurrent_state)
    layers[0].h[5, 3] = np.nan
    mesh, train_step = compiled(config, 8)
    rows = batch(config, 2)
    rows.reset[:] = False
    placed = step.place(mesh, state._replace(recurrent_state=layers))
    after, metrics = train_step(placed, distributed.put(mesh, distributed.BY_STREAM, rows))
    assert not metrics.accepted and np.flatnonzero(~np.asarray(metrics.finite_B)).tolist() == [5]
    back = step.roll_back(mesh, after, 1).recurrent_state
    for found, went_back, expected in zip(*map(jax.tree.leaves, (after.recurrent_state, back, first)), strict=True):
        np.testing.assert_array_equal(found[5], expected[5])
        np.testing.assert_array_equal(went_back, expected)
        assert (np.asarray(found[4]) != expected[4]).any()
