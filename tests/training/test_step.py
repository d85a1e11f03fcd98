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
from charlstm.training import step, train_state
from charlstm.training.loss import cross_entropy
from charlstm.types import Metrics
from data_pipeline.batch import Batch

pytestmark = pytest.mark.optimized

V = 11
QUIET = dict.fromkeys(("input_dropout", "layer_dropout", "output_dropout", "weight_drop"), 0.0)
LSTM = {"cell": "lstm", "cap_input_gate": True}
# All that the autodiff path does, with trained initial states.
GENERAL = {
    "cell": "layer_norm_lstm", "num_layers": 1, "embedding_size": 6, "zoneout": 0.1, "zoneout_cell": 0.3,
    "mogrifier_rounds": 2, "mogrifier_rank": 2, "train_initial_state": True, "on_divergence": "skip",
}  # fmt: skip


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


# Without masks, by plain gradient descent; 24 streams can be split over 3 devices, too.
PLAIN = make_config(**QUIET, batch_size=24, num_layers=1, optimizer="sgd", learning_rate=0.5, clip_norm=0.0, l2=0.0)
FAST = config_lib.replace(PLAIN, reduction="fast")
MASKED = make_config(state_dropout=0.2, **LSTM)
# A shard for each of 4 devices: without a loop over shards XLA simplifies more.
ALONE = make_config(
    **QUIET | {"weight_drop": 0.3}, logical_shards=4, hidden_size=16, num_layers=1, optimizer="sgd", l2=0.0
)
NORMED = config_lib.replace(ALONE, weight_norm=True, activation_change_penalty=0.0)
LAYER_NORM = config_lib.replace(ALONE, cell="layer_norm_lstm")
# Products of one row, and no loop over symbols either.
OF_A_SYMBOL = make_config(
    **QUIET, cell="mlstm", batch_size=2, window=1, logical_shards=2, hidden_size=16, num_layers=1, optimizer="sgd"
)


@functools.cache
def compiled(config: Config, devices: int):
    mesh = distributed.make(jax.devices()[:devices])
    return mesh, step.make(config, V, mesh, 100)


def run(config: Config, devices: list[int], steps: int = 4) -> tuple[step.TrainState, list]:
    """The state after `steps`, each step made on the next of `devices` (a count of them), and all metrics."""
    state, metrics = train_state.init(config, V), []
    for number in range(steps):
        mesh, train_step = compiled(config, devices[number % len(devices)])
        state = train_state.place(mesh, jax.tree.map(np.asarray, state))
        state, reported = train_step(state, distributed.put(mesh, distributed.BY_STREAM, batch(config, number)))
        metrics.append(jax.tree.map(np.asarray, reported))
    return jax.tree.map(np.asarray, state), metrics


def assert_equal_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (MASKED, (4, 1)),
        (ALONE, (4, 1)),
        (NORMED, (4, 1)),
        (LAYER_NORM, (4, 1)),
        (OF_A_SYMBOL, (2, 1)),
        pytest.param(MASKED, (8, 2, 4, 1), marks=pytest.mark.long),
        pytest.param(config_lib.replace(MASKED, remat=True), (8, 1), marks=pytest.mark.long),
        pytest.param(
            make_config(state_dropout=0.2, cell="gru", compute_dtype="bfloat16"), (4, 1), marks=pytest.mark.long
        ),
        pytest.param(make_config(state_dropout=0.2, cell="mlstm", weight_norm=True), (4, 1), marks=pytest.mark.long),
        pytest.param(
            make_config(state_dropout=0.2, compute_dtype="bfloat16", **GENERAL), (4, 1), marks=pytest.mark.long
        ),
        pytest.param(make_config(batch_size=24, logical_shards=6, embedding_size=5), (3, 2), marks=pytest.mark.long),
    ],
    ids=[
        "lstm",
        "a shard a device",
        "weight norm",
        "layer norm",
        "a symbol a shard",
        "every count",
        "remat",
        "gru-bfloat16",
        "mlstm",
        "general-bfloat16",
        "shards that are no power of two",
    ],
)
def test_any_number_of_devices_that_divides_the_shards_gives_the_same_bits(config, counts):
    first, *others = ([count] for count in counts)
    state, metrics = run(config, first)
    for devices in (*others, list(counts)):
        other, other_metrics = run(config, devices)
        assert_equal_bits(state, other)
        assert_equal_bits(metrics, other_metrics)


@pytest.mark.parametrize(
    "devices", [pytest.param(4, marks=pytest.mark.long), 3], ids=["divides the shards", "does not"]
)
def test_the_fast_reduction_is_within_1e_5_of_the_exact_one_on_any_number_of_devices(devices):
    state, _ = run(PLAIN, [4])
    fast, _ = run(FAST, [devices])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(fast.params), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


@pytest.mark.parametrize(
    "config",
    [MASKED, FAST, pytest.param(make_config(**GENERAL), marks=pytest.mark.long)],
    ids=["exact", "fast", "general"],
)
def test_the_gradient_is_reduced_once_an_update_and_never_in_a_loop(config):
    fast = config.training.reduction == "fast"
    mesh, train_step = compiled(config, 4)
    state = train_state.abstract(config, V, mesh)
    rows = distributed.abstract(mesh, distributed.BY_STREAM, batch(config, 0))
    text = train_step.lower(state, rows).compile().as_text()
    expected = {"all-reduce": 1} if fast else {"all-to-all": 1, "all-gather": 1}
    # The gradient, the loss and the count of poisoned rows, in float32; cut into equal pieces for 4 devices, and twice.
    floats = sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 2
    size = 4 * floats if fast else 2 * 4 * (floats + -floats % 4)
    assert collectives.in_program(text) == {"collectives": expected, "collectives_in_loops": 0, "bytes": size}


def test_windows_of_other_lengths_scale_the_rate_compile_once_each_and_have_the_same_bits_on_any_number_of_devices():
    widths = [7, 5, 7, 5]
    B = PLAIN.streams.batch_size

    def after(devices):
        mesh, train_step = compiled(PLAIN, devices)
        state, metrics = train_state.init(PLAIN, V), []
        for number, width in enumerate(widths):
            rows = Batch(*(np.ascontiguousarray(a[:, :width]) for a in batch(PLAIN, number)))
            placed = train_state.place(mesh, jax.tree.map(np.asarray, state))
            state, reported = train_step(placed, distributed.put(mesh, distributed.BY_STREAM, rows))
            metrics.append(jax.tree.map(np.asarray, reported))
        return jax.tree.map(np.asarray, state), metrics

    state, metrics = after(4)
    assert compiled(PLAIN, 4)[1]._cache_size() == 2
    assert_equal_bits((state, metrics), after(1))
    for width, reported in zip(widths, metrics, strict=True):
        assert reported.learning_rate == pytest.approx(0.5 * width / 7)
        assert reported.symbols == B * width
        assert reported.loss == pytest.approx(reported.loss_B.sum() / (B * width), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [PLAIN, pytest.param(FAST, marks=pytest.mark.long)], ids=["exact", "fast"])
def test_the_update_is_that_of_the_mean_loss_over_all_symbols_by_plain_autodiff(config):
    rows = batch(config, 0)
    start = jax.tree.map(np.asarray, train_state.init(config, V))

    def mean_loss(params):
        state = language_model.zero_state(config.model, len(rows.inputs))
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


def after_an_update(config: Config, state: step.TrainState, rows: Batch) -> tuple[step.TrainState, Metrics]:
    """What one update on 4 devices makes of a state."""
    mesh, train_step = compiled(config, 4)
    return train_step(train_state.place(mesh, state), distributed.put(mesh, distributed.BY_STREAM, rows))


def test_every_device_holds_the_same_parameters():
    state, _ = after_an_update(PLAIN, train_state.init(PLAIN, V), batch(PLAIN, 0))
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 4
        for copy in copies[1:]:
            assert_equal_bits(copies[0], copy)


def test_the_recurrent_state_is_split_by_stream_and_carried():
    h = train_state.place(compiled(PLAIN, 4)[0], train_state.init(PLAIN, V)).recurrent_state[0].h
    assert h.addressable_shards[0].data.shape == (6, 12)
    assert not np.asarray(h).any()
    state, _ = after_an_update(PLAIN, train_state.init(PLAIN, V), batch(PLAIN, 0))
    assert np.asarray(state.recurrent_state[0].h).any(1).all()
    assert int(state.step) == 1


def test_a_stream_that_is_not_finite_is_named_by_its_row():
    start = train_state.init(PLAIN, V)
    layers = (start.recurrent_state[0]._replace(h=start.recurrent_state[0].h.at[5, 3].set(jnp.nan)),)
    rows = batch(PLAIN, 0)
    rows.reset[:] = False
    _, metrics = after_an_update(PLAIN, start._replace(recurrent_state=layers), rows)
    assert np.flatnonzero(~np.asarray(metrics.finite_B)).tolist() == [5]
    assert not np.isfinite(metrics.loss)


def test_a_poisoned_stream_and_a_run_gone_back_start_from_the_trained_state():
    config = make_config(**QUIET, train_initial_state=True, on_divergence="skip", **LSTM)
    state, _ = run(config, [4], steps=2)
    first = language_model.reset_state(state.params, state.recurrent_state)
    assert all(leaf.any() for leaf in jax.tree.leaves(first)), "resets have trained them"
    layers = jax.tree.map(np.array, state.recurrent_state)
    layers[0].h[5, 3] = np.nan
    rows = batch(config, 2)
    rows.reset[:] = False
    after, metrics = after_an_update(config, state._replace(recurrent_state=layers), rows)
    assert not metrics.accepted and np.flatnonzero(~np.asarray(metrics.finite_B)).tolist() == [5]
    back = train_state.roll_back(compiled(config, 4)[0], after, 1, 1).recurrent_state
    for found, went_back, expected in zip(*map(jax.tree.leaves, (after.recurrent_state, back, first)), strict=True):
        np.testing.assert_array_equal(found[5], expected[5])
        np.testing.assert_array_equal(went_back, expected)
        assert (np.asarray(found[4]) != expected[4]).any()
