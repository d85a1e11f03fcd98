"""A window of the LSTM by cuDNN, NVIDIA's own kernels: the equations of lstm.py, and their reverse pass, in one call.

It takes the layer's input, not the projection, and all weights as one vector, which is that of
`jax.experimental.rnn`: W_xᵀ, W_hᵀ, b_x, b_h, row by row, with the gates in our order.  A stream may be reset before the
first symbol of a window; a window with a reset further on, such as an epoch's last, is read by `lstm.recurrence`.

cuDNN takes all arrays for row-major, but JAX's call of it does not say so, and XLA would hand it a transposed window as
the untransposed one lies in memory: hence all that goes in and comes out, forward and reverse, is made row-major here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn
from jax.experimental.layout import Layout, with_layout_constraint

from charlstm.cells import lstm
from charlstm.projection import dense
from charlstm.types import CellParams, CellState


def recurrence(
    params: CellParams, state: CellState, x_TBD: jax.Array, reset_TB: jax.Array
) -> tuple[CellState, jax.Array]:
    """A window of every stream: what `lstm.step` gives symbol by symbol, and its gradients.

    Args:
      params: float32.
      state: before the window, `[B, H]` each.
      reset_TB: bool; where True, the stream's state is zero before the symbol is read.

    Returns:
      The state after the window, and h_TBH.
    """
    return jax.lax.cond(reset_TB[1:].any(), _by_scan, _by_cudnn, params, state, x_TBD, reset_TB)


def _by_scan(params: CellParams, state: CellState, x_TBD: jax.Array, reset_TB: jax.Array):
    z_TBG = dense(x_TBD, params.w_x, None, x_TBD.dtype)
    return lstm.recurrence(params.w_h, lstm.bias(params), state, z_TBG, reset_TB, x_TBD.dtype)


def _by_cudnn(params: CellParams, state: CellState, x_TBD: jax.Array, reset_TB: jax.Array):
    packed = jnp.concatenate([params.w_x.T.ravel(), params.w_h.T.ravel(), params.b_x, params.b_h])
    # A choice, not a product with 0: a NaN in the state of a stream that is reset must not survive.  1 layer.
    h_1BH, c_1BH = (jnp.where(reset_TB[0][:, None], 0, s_BH)[None] for s_BH in jax.tree.leaves(state))
    h_BTH, h_1BH, c_1BH = _lstm(x_TBD.swapaxes(0, 1), h_1BH, c_1BH, packed)
    return CellState(h_1BH[0], c_1BH[0]), h_BTH.swapaxes(0, 1)


@jax.custom_vjp
def _lstm(*arrays: jax.Array):
    """`_call`; what it and its reverse pass are given and give is row-major."""
    return _forward(*arrays)[0]


def _forward(*arrays):
    return _row_major(jax.vjp(_call, *_row_major(arrays)))


def _reverse(back, cotangents):
    return _row_major(_row_major(back)(_row_major(cotangents)))


_lstm.defvjp(_forward, _reverse)


def _call(x_BTD: jax.Array, h_1BH: jax.Array, c_1BH: jax.Array, packed: jax.Array):
    B, T, D = x_BTD.shape
    lengths_B, sizes = jnp.full((B,), T, jnp.int32), (D, h_1BH.shape[2])
    return rnn.lstm(x_BTD, h_1BH, c_1BH, packed, lengths_B, *sizes, num_layers=1, dropout=0.0, bidirectional=False)


def _row_major(tree: Any) -> Any:
    """The same arrays, in the only layout that cuDNN reads and writes."""
    return jax.tree.map(lambda a: a if a.ndim < 2 else with_layout_constraint(a, Layout(tuple(range(a.ndim)))), tree)
