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

from charlstm import keys, model, optimizers, reduction, schedules
from charlstm import mesh as mesh_lib
from charlstm.config import Config
from charlstm.loss import cross_entropy
from charlstm.types import Metrics, TrainState
from data_pipeline.batch import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init(config: Config, vocabulary_size: int) -> TrainState:
    """The state before the first update."""
    params = model.init(config.model, vocabulary_size, keys.named(jax.random.key(config.training.seed), "init"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizers.make(config.optimizer).init(params),
        recurrent_state=model.initial_state(config.model, config.streams.batch_size, params.b_out.dtype),
    )


def abstract(config: Config, vocabulary_size: int, mesh: Mesh) -> TrainState:
    """The state's shapes, types and places on `mesh`: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: init(config, vocabulary_size))
    return jax.tree.map(lambda spec, tree: mesh_lib.abstract(mesh, spec, tree), state_specs(), shapes, is_leaf=_is_spec)


def place(mesh: Mesh, state: TrainState) -> TrainState:
    """`state`, made alike by every process, laid out on `mesh`."""
    rows = mesh_lib.process_rows(mesh, jax.tree.leaves(state.recurrent_state)[0].shape[0])
    own = jax.tree.map(lambda a: a[rows.start : rows.stop], state.recurrent_state)
    state = state._replace(recurrent_state=own)
    return jax.tree.map(lambda spec, tree: mesh_lib.put(mesh, spec, tree), state_specs(), state, is_leaf=_is_spec)


def shards_per_device(config: Config, devices: int, fixed: bool = False) -> int:
    """k: how many logical shards each of `devices` computes.

    Args:
      fixed: the run has begun, so only the number of devices, and the reduction, can be another.

    Raises:
      ValueError: the B streams, or the M logical shards, cannot be split over the devices; says which counts can.
    """
    B, M = config.streams.batch_size, config.training.logical_shards
    assert M > 0, "resolve(config) fills in logical_shards"
    if B % devices:
        low, high = B - B % devices, B + devices - B % devices
        choice = f"{low} or {high}" if low else f"{high}"
        if fixed:
            choice = f"{_divisors(B)} devices, as the run has this batch_size"
        raise ValueError(f"batch_size={B} cannot be split over {devices} devices: use {choice}")
    if B % M:
        raise ValueError(f"batch_size={B} cannot be split into logical_shards={M}: use a multiple of {M}")
    if M % devices == 0:
        return M // devices
    if config.training.reduction == "exact":
        raise ValueError(
            f"logical_shards={M} cannot be split exactly over {devices} devices: use {_divisors(M)} devices, or "
            f"--reduction=fast (not bit-stable across counts)"
        )
    return next(k for k in range(-(-M // devices), B // devices + 1) if B % (devices * k) == 0)


def _divisors(count: int) -> str:
    return ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)


def make(config: Config, vocabulary_size: int, mesh: Mesh, steps_per_epoch: int) -> TrainStep:
    """The compiled training step on `mesh`.  It donates the state it is given."""
    count = shards_per_device(config, mesh.size)
    streams_per_shard = config.streams.batch_size // (mesh.size * count)
    symbols = config.streams.batch_size * config.streams.window
    optimizer = optimizers.make(config.optimizer)
    schedule = schedules.make(config.optimizer, steps_per_epoch, config.training.num_steps)
    seed_key = jax.random.key(config.training.seed)

    def shard_gradient(params, step, shard, carry, batch: Batch):
        """One logical shard: (its gradient and loss [P + 1], (nats [b], new carry))."""
        rows_b = shard * streams_per_shard + jnp.arange(streams_per_shard, dtype=jnp.int32)
        dropout = model.Dropout(jax.random.fold_in(keys.named(seed_key, "dropout"), step), rows_b)

        def loss(params):
            new_carry, logits_TBV = model.apply(
                config.model, params, carry, batch.inputs.astype(jnp.int32), batch.reset, dropout
            )
            nats_b = cross_entropy(logits_TBV, batch.targets.astype(jnp.int32).T).sum(0)
            return nats_b.sum(), (nats_b, new_carry)

        (nats, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return jnp.append(ravel_pytree(gradient)[0], nats), outputs

    def local_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        shards = jax.lax.axis_index(mesh_lib.AXIS) * count + jnp.arange(count, dtype=jnp.int32)
        by_shard = jax.tree.map(lambda a: a.reshape((count, -1, *a.shape[1:])), (state.recurrent_state, batch))
        partial_RP, (nats_kb, carry) = reduction.subtree_sums(
            lambda args: shard_gradient(state.params, state.step, *args), (shards, *by_shard), count
        )
        if config.training.reduction == "exact":
            total_P = reduction.exact_sum(partial_RP, mesh_lib.AXIS, mesh.size)
        else:
            total_P = reduction.fast_sum(partial_RP, mesh_lib.AXIS)
        # What follows is replicated; the barrier makes it the same program whatever reduced the gradient.
        total_P = jax.lax.optimization_barrier(total_P)
        mean_P = total_P / jnp.asarray(symbols, total_P.dtype)
        gradient = ravel_pytree(state.params)[1](mean_P[:-1])
        norm, learning_rate = optimizers.global_norm(gradient), schedule(state.step)
        gradient = optimizers.clip(gradient, norm, config.optimizer)
        params, opt_state = optimizer.update(gradient, state.opt_state, state.params, learning_rate)
        carry = jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), carry)
        nats_b = nats_kb.reshape(-1)
        finite_params = jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]).all()
        metrics = Metrics(mean_P[-1], nats_b, norm, learning_rate, finite_params, _finite_rows(carry, nats_b))
        return TrainState(state.step + 1, params, opt_state, carry), metrics

    return jax.jit(
        jax.shard_map(
            local_step,
            mesh=mesh,
            in_specs=(state_specs(), mesh_lib.BY_STREAM),
            out_specs=(state_specs(), metrics_specs()),
            # Gradients of replicated parameters must not be summed behind our back (with check_vma they arrive already
            # reduced, by one all-reduce a parameter), and the type system does not know that an all-gather replicates.
            check_vma=False,
        ),
        donate_argnums=0,
    )


def state_specs() -> Any:
    """What lies where: everything whole on every device, except the recurrent state, split by stream."""
    whole: Any = mesh_lib.REPLICATED
    rows: Any = mesh_lib.BY_STREAM
    return TrainState(step=whole, params=whole, opt_state=whole, recurrent_state=rows)


def metrics_specs() -> Any:
    whole: Any = mesh_lib.REPLICATED
    rows: Any = mesh_lib.BY_STREAM
    return Metrics(loss=whole, loss_B=rows, grad_norm=whole, learning_rate=whole, finite_params=whole, finite_B=rows)


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)


def _finite_rows(carry: Any, nats_b: jax.Array) -> jax.Array:
    finite_b = jnp.isfinite(nats_b)
    for leaf in jax.tree.leaves(carry):
        finite_b &= jnp.isfinite(leaf).all(1)
    return finite_b
