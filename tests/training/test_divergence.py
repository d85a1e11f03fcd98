"""Updates that are not sound: skipped to the bit, poisoned rows zeroed and counted, spikes told from bad luck."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config.training import TrainingConfig
from charlstm.run import digest, replicas
from charlstm.training import divergence, train_state
from tests.training.test_step import QUIET, V, assert_equal_bits, batch, compiled, make_config

pytestmark = pytest.mark.optimized


def advance(config, state, numbers, devices=4, spoil=lambda state: state):
    """The state after a step on each of the batches `numbers`, and the metrics of each; the first state `spoil`ed."""
    mesh, train_step = compiled(config, devices)
    found = []
    for number in numbers:
        placed = train_state.place(mesh, jax.tree.map(np.asarray, spoil(state)))
        spoil = lambda state: state  # noqa: E731
        read = batch(config, number) if isinstance(number, int) else number
        state, metrics = train_step(placed, distributed.put(mesh, distributed.BY_STREAM, read))
        state = jax.tree.map(np.array, state)
        found.append(jax.tree.map(np.asarray, metrics))
    return state, found


def with_row(row, value):
    """Poisons a row of the recurrent state of the first layer."""

    def spoil(state):
        first, *others = state.recurrent_state
        first = first._replace(c=np.array(first.c))
        first.c[row] = value
        return state._replace(recurrent_state=(first, *others))

    return spoil


def beyond(config, number):
    """A batch with one symbol that is not in the vocabulary."""
    read = batch(config, number)
    read.inputs[3, 2] = V + 100
    return read


def flipped(array, odd):
    """A replicated array of which the copy on the device `odd` has one bit the other way."""
    shards = array.addressable_shards
    copies = [np.array(shard.data) for shard in shards]
    copies[odd].view(np.uint32)[2] ^= 1 << 3
    parts = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, shards, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


SKIP = make_config(**QUIET, on_divergence="skip", embedding_size=5, num_layers=1)
SPIKE = config_lib.replace(SKIP, spike_factor=1.5)


@pytest.fixture(scope="module")
def begun():
    return advance(SKIP, train_state.init(SKIP, V), [0, 1])[0]


@pytest.mark.parametrize(
    ("value", "devices"),
    [(np.nan, 4), *(pytest.param(*of, marks=pytest.mark.long) for of in ((np.inf, 4), (np.nan, 1), (np.inf, 1)))],
)
def test_a_poisoned_row_of_state_costs_one_update_and_that_row_alone(value, devices, begun):
    state, (metrics,) = advance(SKIP, begun, [2], devices, with_row(5, value))
    accepted, (good,) = advance(SKIP, begun, [2], devices)
    if not metrics.accepted:  # an infinite cell state may leave a finite loss, and then a sound update
        assert_equal_bits((state.params, state.opt_state), (begun.params, begun.opt_state))
    assert list(np.flatnonzero(~metrics.finite_B)) in ([5], []) and good.accepted
    assert metrics.nonfinite_rows == metrics.divergence.state_resets == (~metrics.finite_B).sum()
    for layer, other in zip(state.recurrent_state, accepted.recurrent_state, strict=True):
        for name in ("h", "c"):
            mine, his = getattr(layer, name), getattr(other, name)
            if 5 in np.flatnonzero(~metrics.finite_B):
                assert not mine[5].any()
            assert np.delete(mine, 5, 0).tobytes() == np.delete(his, 5, 0).tobytes()
    again, (after,) = advance(SKIP, state, [3], devices)
    assert after.accepted and after.finite_B.all() and np.isfinite(again.recurrent_state[0].c).all()


def test_what_was_skipped_and_zeroed_is_counted(begun):
    _, found = advance(SKIP, begun, [2, beyond(SKIP, 3), 4, beyond(SKIP, 5)], spoil=with_row(5, np.nan))
    assert list(np.flatnonzero(~found[0].finite_B)) == [5] and not found[0].accepted
    assert [m.divergence.skipped for m in found] == [m.divergence.state_resets for m in found] == [1, 2, 2, 3]
    assert [m.divergence.consecutive_skips for m in found] == [1, 2, 0, 1]


def test_skipped_is_to_the_bit_as_if_that_update_had_never_been_made(begun):
    """But for the step number, which goes on, and so does the text."""
    state, (metrics, _) = advance(SKIP, begun, [beyond(SKIP, 2), 3])
    assert not metrics.accepted and metrics.finite_params
    held = begun._replace(step=np.int32(3), divergence=state.divergence)
    # The other rows have read the text, so their state is taken from the run that skipped.
    skipped, _ = advance(SKIP, begun, [beyond(SKIP, 2)])
    held = held._replace(recurrent_state=skipped.recurrent_state)
    straight, _ = advance(SKIP, held, [3])
    assert_equal_bits((state.params, state.opt_state), (straight.params, straight.opt_state))


@pytest.mark.parametrize("poison", ["parameter", "gradient"])
def test_a_poisoned_parameter_is_told_from_a_poisoned_gradient(poison, begun):
    def spoil(state):
        params = jax.tree.map(np.array, state.params)
        if poison == "parameter":
            params.b_out[2] = np.nan
        else:
            params.w_out[0, 0] = 3e38  # finite, and so is the loss of whoever does not meet it; its gradient is not
        return state._replace(params=params)

    _, (metrics,) = advance(SKIP, begun, [2], spoil=spoil)
    assert not metrics.accepted
    assert metrics.finite_params == (poison == "gradient")  # skipping helps against one of them


def test_the_same_bits_whether_or_not_the_run_would_skip():
    plain = config_lib.replace(SKIP, on_divergence="stop")
    one, other = (advance(config, train_state.init(config, V), range(4))[0] for config in (plain, SPIKE))
    assert_equal_bits(one, other)


def test_every_device_count_skips_alike():
    def spoiled(devices):
        first, _ = advance(SKIP, train_state.init(SKIP, V), [0], devices)
        return advance(SKIP, first, [1, 2, 3], devices, with_row(9, np.nan))

    assert_equal_bits(spoiled(4), spoiled(1))


@pytest.mark.parametrize("spoiled", ["loss", "norm", "params"])
def test_an_update_is_sound_where_loss_norm_and_new_parameters_are_finite_and_only_there(spoiled):
    good = {"loss": jnp.float32(2.0), "norm": jnp.float32(1.0), "params": {"w": jnp.ones((2, 3))}}
    divergence_state = divergence.start(jnp.float32)
    assert divergence.is_accepted(TrainingConfig(), **good, divergence_state=divergence_state)
    bad = good | {spoiled: jax.tree.map(lambda leaf: leaf * jnp.inf, good[spoiled])}
    assert not divergence.is_accepted(TrainingConfig(), **bad, divergence_state=divergence_state)


def test_a_spike_is_a_loss_of_more_than_so_many_times_the_usual_one():
    state, metrics = advance(SPIKE, train_state.init(SPIKE, V), range(3))
    assert all(m.accepted for m in metrics)
    usual = float(state.divergence.loss_ema)
    assert usual == pytest.approx(0.98 * (0.98 * metrics[0].loss + 0.02 * metrics[1].loss) + 0.02 * metrics[2].loss)

    def wrong(factor):
        def spoil(state):
            params = state.params._replace(b_out=np.array(state.params.b_out))
            params.b_out[:1] += factor
            return state._replace(params=params)

        return spoil

    for factor, accepted in ((0.5, True), (30.0, False)):
        after, (metrics,) = advance(SPIKE, state, [4], spoil=wrong(factor))
        assert metrics.accepted == accepted == bool(metrics.loss <= 1.5 * usual)
        assert (float(after.divergence.loss_ema) == usual) == (not accepted)  # a spike is not usual


def test_going_back_leaves_windows_out_and_carries_nothing_over(begun):
    mesh, _ = compiled(SKIP, 4)
    state = train_state.place(mesh, jax.tree.map(jnp.asarray, begun))
    back = jax.tree.map(np.asarray, train_state.roll_back(mesh, state, 7, 1))
    assert (back.divergence.next_window, back.divergence.rollbacks, back.step) == (2 + 7, 1, 2)
    assert not any(leaf.any() for leaf in jax.tree.leaves(back.recurrent_state))
    assert_equal_bits((back.params, back.opt_state), (begun.params, begun.opt_state))
    again = jax.tree.map(np.asarray, train_state.roll_back(mesh, state, 0, 1))
    assert again.divergence.next_window == 2
    assert_equal_bits(again.recurrent_state, begun.recurrent_state)


@pytest.mark.parametrize(
    ("odd", "devices", "in_host_memory"),
    [
        pytest.param(*of, marks=() if of in ((0, 2, True), (1, 8, False)) else pytest.mark.long)
        for of in itertools.product((0, 1), (2, 8), (True, False))
    ],
)
def test_a_bit_that_flips_on_one_device_is_found_and_the_device_named(odd, devices, in_host_memory, begun, monkeypatch):
    monkeypatch.setattr(distributed, "is_in_host_memory", lambda mesh: in_host_memory)  # a GPU's is not
    mesh = distributed.make(jax.devices()[:devices])
    placed = distributed.put(mesh, distributed.REPLICATED, jax.tree.map(np.asarray, begun.params))
    assert replicas.compare({"params": placed}, mesh) == (digest.digests({"params": placed}), "")
    drifted = {"params": placed._replace(b_out=flipped(placed.b_out, odd))}
    found, said = replicas.compare(drifted, mesh)
    assert found == digest.digests(drifted)
    assert said.endswith(", in params.b_out")
    if devices == 2:  # nobody knows which of two is right
        assert "device 0 (cpu:0 of process 0), device 1 (cpu:1 of process 0) differ" in said
    else:
        assert said.startswith(f"the copy on device {odd} (cpu:{odd} of process 0) differs")


def test_one_device_has_nothing_to_compare_with(begun):
    mesh = distributed.make(jax.devices()[:1])
    placed = distributed.put(mesh, distributed.REPLICATED, jax.tree.map(np.asarray, begun.params))
    assert replicas.compare(placed, mesh) == (digest.digests(placed), "")
