"""The plain recurrent cell: the equations of PyTorch's nn.RNN, and its hand-derived backward pass.

Source: Elman, Finding Structure in Time, Cognitive Science 14(2), 1990; Karpathy's min-char-rnn is this cell.  Its
variants are "tanh" and "relu"; rectified units are those of Le, Jaitly and Hinton, 2015 (arXiv:1504.00941).

Forward, symbol by symbol.  h⁻ is the state before the symbol; G = H:

    z = x W_x                        the window's projection, one matmul for all its symbols
    a = z + s W_h + b                s = h⁻, or with state dropout h⁻ times the stream's mask; b = b_x + b_h
    h = tanh(a)                      relu: h = max(a, 0)

Backward, from the last symbol to the first.  dv is the gradient of the loss with respect to v.  dh is the sum of the
gradients from above (this symbol's output) and from the right (the next symbol's dh⁻); products of vectors are
elementwise:

    da  = dh (1 - h²)                relu: da = dh where h > 0, else 0
    ds  = da W_hᵀ                    dh⁻ = ds, or times the mask

and, after the loop, dz = da, dW_h = Σ sᵀ da, db = Σ da, the sums over all symbols of all streams.  Where a stream is
reset, h⁻ = 0, and dh⁻ is dropped.  The loops are in ops/scan.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.model import initializers
from charlstm.model.ops.scan import Matmul, SavedStates, WindowSums
from charlstm.types import CellParams, CellState, Gates

GATES = 1
MATRICES = (GATES,)
SAVED_OVER_Z = False


def init(
    key: jax.Array, input_width: int, hidden_size: int, initializer: str, scale: float, forget_bias: float
) -> CellParams:
    """Parameters of one layer, float32; `initializer` and `scale` as in `charlstm.model.initializers`.

    `forget_bias` is the LSTM's and does nothing here.
    """
    return initializers.layer(initializer, key, input_width, hidden_size, GATES, scale=scale)


def zero_state(batch: int, hidden_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> CellState:
    """The initial state: zeros, `[batch, hidden_size]`."""
    return CellState(h=jnp.zeros((batch, hidden_size), dtype), c=None)


def vectors(params: CellParams) -> jax.Array:
    """b, `[H]`."""
    return params.b_x + params.b_h


def step_projected(
    params: CellParams, state: CellState, z_BH: jax.Array, variant: str = "tanh", mask_BH: jax.Array | None = None
) -> tuple[CellState, Gates]:
    """One symbol of every stream, straight from the equations, given its projection: (the new state, no gates)."""
    h_masked = state.h if mask_BH is None else state.h * mask_BH
    a_BH = z_BH + h_masked @ params.w_h + vectors(params)[None]
    h = jax.nn.relu(a_BH) if variant == "relu" else jnp.tanh(a_BH)
    return CellState(h, None), {}


def forward(
    matmul: Matmul, b: jax.Array, prev: CellState, h_masked: jax.Array, z: jax.Array, variant: str
) -> tuple[CellState, None]:
    """The new state.  See `ops.scan.Cell`."""
    a = z + b + matmul(h_masked)
    return CellState(jax.nn.relu(a) if variant == "relu" else jnp.tanh(a), None), None


def backward(
    matmul: Matmul, b: jax.Array, dh: jax.Array, dc: Any, states: SavedStates, saved: None, variant: str
) -> tuple[jax.Array, None, None, jax.Array]:
    """Gradients: ds, no other of h⁻; and da.  See `ops.scan.Cell`."""
    da = jnp.where(states.h > 0, dh, 0) if variant == "relu" else dh * (1 - states.h * states.h)
    return matmul(da), None, None, da


def parameter_gradients(sums: WindowSums, da_TBG: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dW_h, db and dz of a window."""
    return sums.outer_h_masked(da_TBG), sums.total(da_TBG), da_TBG
