"""The training step: one window of every stream, one gradient, one reduction, one update.

    train_step(state, batch) -> (state, metrics)

Inside `shard_map` a device holds b = B/n streams as k = M/n logical shards of B/M streams each. It computes each
shard's gradient at one shape, one shard after the other, and all gradients are summed once (reduction.py), after the
loops over time: never a collective in a loop. The loss is a sum over all B T symbols, divided once, after the
reduction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from charlstm import distributed, rng
from charlstm.config import Config
from charlstm.model import language_model
from charlstm.model.dropout import DropoutKey
from charlstm.model.ops import compiler
from charlstm.training import averaging, divergence, optimizers, reduction, schedules
from charlstm.training.loss import activation_penalties, cross_entropy
from charlstm.training.placement import shards_per_device
from charlstm.training.train_state import state_specs
from charlstm.types import Metrics, RecurrentState, TrainState
from data_pipeline.batch import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make(config: Config, vocabulary_size: int, mesh: Mesh, steps_per_epoch: int) -> jax.stages.Wrapped:
    """The training step on `mesh`, compiled for each length of a window that it meets.  It donates the state.

    Where a window's length is not --window, the learning rate is scaled by their ratio (Merity et al. 2018,
    arXiv:1708.02182, section 4.1): the loss is a mean, so a short window would otherwise take as large a step as a full
    one.
    """
    sums = _gradient_sums(config, mesh)
    optimizer = optimizers.make(config.optimizer)
    schedule = schedules.make(config.optimizer, steps_per_epoch, config.training.num_steps)
    skips = config.training.on_divergence == "skip"

    def local_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        T = batch.inputs.shape[1]
        symbols = config.streams.batch_size * T
        total_P, nats_b, finite_b, carry = sums(state, batch)
        mean_P, nonfinite_rows = total_P / jnp.asarray(symbols, total_P.dtype), total_P[-1].astype(jnp.int32)
        gradient, loss = ravel_pytree(state.params)[1](mean_P[:-2]), mean_P[-2]
        norm = optimizers.global_norm(gradient)
        learning_rate = schedule(state.step, state.plateau) * (T / config.streams.window)
        gradient = optimizers.clip(gradient, norm, config.optimizer)
        params, opt_state = optimizer.update(gradient, state.opt_state, state.params, learning_rate)
        average, plateau_state = averaging.update(config.optimizer, state.average, state.plateau, params)

        accepted = divergence.is_accepted(config.training, loss, norm, params, state.divergence)
        if skips:
            old = state.params, state.opt_state, state.average, state.plateau
            params, opt_state, average, plateau_state = divergence.select(
                accepted, (params, opt_state, average, plateau_state), old
            )
            carry = divergence.reset_rows(carry, finite_b, language_model.reset_state(params, carry))
        divergence_state = divergence.update(state.divergence, loss, accepted, skips, nonfinite_rows)
        metrics = Metrics(
            loss=loss,
            loss_B=nats_b,
            grad_norm=norm,
            learning_rate=learning_rate,
            accepted=accepted,
            finite_params=divergence.all_finite(params),
            finite_B=finite_b,
            nonfinite_rows=nonfinite_rows,
            divergence=divergence_state,
            symbols=jnp.asarray(symbols, jnp.int32),
        )
        return TrainState(state.step + 1, params, opt_state, carry, divergence_state, plateau_state, average), metrics

    return jax.jit(
        jax.shard_map(
            local_step,
            mesh=mesh,
            in_specs=(state_specs(), distributed.BY_STREAM),
            out_specs=(state_specs(), metrics_specs()),
            # With check_vma, JAX would itself sum the gradients of replicated parameters, by one all-reduce for each.
            # Nor does its type check know that the result of an all-gather is replicated.
            check_vma=False,
        ),
        donate_argnums=0,
        compiler_options=compiler.options(),
    )


def _gradient_sums(
    config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array, jax.Array, RecurrentState]]:
    """The gradient, loss and count of non-finite rows, summed over all streams of all devices.

    Returns a function of the state and the batch of a device, inside `shard_map`: (sums [P + 2], nats [b],
    finite [b], carry).
    """
    count, exact = shards_per_device(config, mesh.size), config.training.reduction == "exact"
    plan = reduction.make_plan(count, mesh.size if exact else 1)
    shard_gradient = _shard_gradient(config, config.streams.batch_size // (mesh.size * count))

    def sums(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, RecurrentState]:
        shards = jax.lax.axis_index(distributed.AXIS) * count + jnp.arange(count, dtype=jnp.int32)
        by_shard = jax.tree.map(lambda a: a.reshape((count, -1, *a.shape[1:])), (state.recurrent_state, batch))
        device = jax.lax.axis_index(distributed.AXIS) if exact else 0
        nodes, by_row = reduction.local_sums(
            lambda args: shard_gradient(state.params, state.step, *args), (shards, *by_shard), plan, device
        )
        if exact:
            total_P = reduction.exact_sum(nodes, distributed.AXIS, plan)
        else:
            total_P = reduction.fast_sum(nodes, distributed.AXIS)
        nats_b, finite_b, carry = jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), by_row)
        # The barrier keeps XLA from fusing the reduction into the replicated update, whose rounding it could change.
        return jax.lax.optimization_barrier(total_P), nats_b, finite_b, carry

    return sums


def _shard_gradient(config: Config, streams: int) -> Callable[..., tuple[jax.Array, Any]]:
    """The gradient of one logical shard of `streams` streams."""
    seed_key = jax.random.key(config.training.seed)

    def gradient_of(params, step, shard, carry, batch: Batch):
        """One logical shard: ((gradient, loss, count of non-finite rows), (nats [b], finite [b], carry))."""
        rows_b = shard * streams + jnp.arange(streams, dtype=jnp.int32)
        dropout_key = DropoutKey(jax.random.fold_in(rng.named(seed_key, "noise"), step), rows_b)

        def loss(params):
            inputs_bT, reset_bT = batch.inputs.astype(jnp.int32), batch.reset
            new_carry, features_TbH = language_model.features(
                config.model, params, carry, inputs_bT, reset_bT, dropout_key
            )
            dropped_TbH = language_model.drop_features(config.model, features_TbH, dropout_key)
            logits_TbV = language_model.logits(config.model, params, dropped_TbH)
            nats_b = cross_entropy(logits_TbV, batch.targets.astype(jnp.int32).T).sum(0)
            penalties = activation_penalties(config.optimizer, features_TbH, dropped_TbH, reset_bT.T)
            return nats_b.sum() + penalties, (nats_b, new_carry)

        # Truncated BPTT: `carry` comes from the window before and is a constant in `loss`, so no gradient reaches back.
        gradient, (nats_b, new_carry) = jax.grad(loss, has_aux=True)(params)
        finite_b = divergence.finite_rows(new_carry, nats_b)
        # The gradient includes the penalties; the reported loss does not.
        return (gradient, nats_b.sum(), (~finite_b).sum(dtype=nats_b.dtype)), (nats_b, finite_b, new_carry)

    return gradient_of if config.model.tf32 else compiler.in_full_precision(gradient_of)


def metrics_specs() -> Any:
    whole: Any = distributed.REPLICATED
    rows: Any = distributed.BY_STREAM
    by_name = dict.fromkeys(Metrics._fields, whole)
    return Metrics(**by_name | {"loss_B": rows, "finite_B": rows})
