"""JAX's own automatic differentiation of a scan over time: flax, dm-haiku, and this project's textbook cells.

They differ in the stack of layers alone; embedding, softmax, clipping and Adam are those of the library, or optax's.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import textbook
from benchmarks.peers.ours import config_of, device_memory
from benchmarks.peers.recipe import CLIP, LEARNING_RATE
from benchmarks.shapes import Shape, windows
from benchmarks.worker import Contestant
from charlstm import distributed
from charlstm.model import language_model

Apply = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]  # (params, carry, ids_TB) -> (logits_TBV, carry)


def flax(shape: dict) -> Contestant:
    """`OptimizedLSTMCell` (or flax's GRU and plain cell) under `nn.RNN`."""
    sizes = Shape(**shape)
    cell = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}[sizes.cell]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carries, ids_TB):
            x, after = nn.Embed(sizes.V, sizes.E)(ids_TB), []
            for carry in carries:
                layer = nn.RNN(cell(sizes.H, dtype=sizes.dtype), time_major=True, return_carry=True)
                carry, x = layer(x, initial_carry=carry)
                after.append(carry)
            return nn.Dense(sizes.V)(x), after

    zeros = jnp.zeros((sizes.B, sizes.H))
    carry = [(zeros, zeros) if sizes.cell == "lstm" else zeros] * sizes.L
    params = Model().init(jax.random.key(0), carry, jnp.zeros((sizes.T, sizes.B), int))
    return _training(sizes, params, carry, Model().apply)


def haiku(shape: dict) -> Contestant:
    """haiku's cells under `hk.dynamic_unroll`."""
    import haiku as hk  # of this contestant alone: where there is none, the others run

    sizes = Shape(**shape)
    cell = {"lstm": hk.LSTM, "gru": hk.GRU, "rnn": hk.VanillaRNN}[sizes.cell]

    def stack():
        return hk.DeepRNN([cell(sizes.H) for _ in range(sizes.L)])

    def forward(carry, ids_TB):
        h_TBH, carry = hk.dynamic_unroll(stack(), hk.Embed(sizes.V, sizes.E)(ids_TB), carry)
        return hk.Linear(sizes.V)(h_TBH), carry

    network = hk.without_apply_rng(hk.transform(forward))
    carry = hk.transform(lambda: stack().initial_state(sizes.B)).apply({}, None)
    params = network.init(jax.random.key(0), carry, jnp.zeros((sizes.T, sizes.B), int))
    return _training(sizes, params, carry, network.apply)


def twin(shape: dict) -> Contestant:
    """The equations of this project's cells, symbol by symbol."""
    sizes = Shape(**shape)
    config = config_of(sizes).model
    params = language_model.init(config, sizes.V, jax.random.key(0))
    reset_TB = jnp.zeros((sizes.T, sizes.B), bool)

    def apply(params, carry, ids_TB):
        x, after = params.embedding[ids_TB], []
        for layer, state in zip(params.cells, carry, strict=True):
            state, x = textbook.unroll(language_model.CELLS[sizes.cell], layer, state, x, reset_TB)
            after.append(state)
        return x @ params.w_out + params.b_out, tuple(after)

    return _training(sizes, params, language_model.zero_state(config, sizes.B), apply)


def _training(shape: Shape, params: Any, carry: Any, apply: Apply) -> Contestant:
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE))

    def loss_of(params, carry, ids_TB):
        logits_TBV, carry = apply(params, carry, ids_TB[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_TBV, ids_TB[1:]).mean(), carry

    def step(state, ids):
        params, opt_state, carry = state
        ids_TB = ids.T.astype(jnp.int32)
        (loss, carry), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, carry, ids_TB)
        changes, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, changes), opt_state, carry), loss

    compiled, text = jax.jit(step, donate_argnums=0), windows(shape)
    state = jax.tree.map(jnp.array, (params, optimizer.init(params), carry))  # copies: what is donated is held once

    def update() -> None:
        nonlocal state
        state, loss = compiled(state, next(text))
        jax.block_until_ready((state, loss))

    mesh = distributed.make()
    return Contestant(update, device_memory(mesh), distributed.describe(mesh))
