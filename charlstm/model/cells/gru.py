"""The GRU: the equations of PyTorch's nn.GRU, and its hand-derived backward pass.

Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, EMNLP 2014 (arXiv:1406.1078), in the
form of its first version, with the reset gate applied after the matmul with W_h: one matmul per symbol.

Forward, symbol by symbol.  h⁻ is the state before the symbol, σ the logistic function, products of vectors are
elementwise; the gates lie along G = 3H in the order r u n (PyTorch writes z for the update gate u; here z is the
projection):

    z = x W_x                        the window's projection, one matmul for all its symbols
    q = s W_h + b_q                  s = h⁻, or with state dropout h⁻ times the stream's mask
    r, u = σ(z_r + q_r), σ(z_u + q_u)
    n = tanh(z_n + b_n + r q_n)
    h = (1 - u) n + u h⁻

Here b_n is the part of b_x for n, and b_q = b_h, with those for r and u added: b = (b_q, b_n), along 4H.

Backward, from the last symbol to the first.  dv is the gradient of the loss with respect to v.  dh is the sum of the
gradients from above (this symbol's output) and from the right (the next symbol's dh⁻):

    dz_n = dh (1 - u) (1 - n²)
    dz_u = dh (h⁻ - n) u (1 - u)
    dz_r = dz_n q_n r (1 - r)
    dq   = dz_r, dz_u, dz_n r
    ds   = dq W_hᵀ
    dh⁻  = dh u + ds                 with state dropout: dh u + ds times the mask

and, after the loop, dW_h = Σ sᵀ dq, db_q = Σ dq, db_n = Σ dz_n, the sums over all symbols of all streams.  Where a
stream is reset, h⁻ = 0, and dh⁻ is dropped.  The loops are in ops/scan.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.model import initializers
from charlstm.model.ops.scan import Matmul, SavedStates, WindowSums
from charlstm.types import CellParams, CellState, Gates

GATES = 3  # r u n
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
    """b, `[4H]`."""
    r_and_u = 2 * (params.b_h.shape[0] // GATES)
    (x_ru, x_n), (h_ru, h_n) = (jnp.split(b, [r_and_u]) for b in (params.b_x, params.b_h))
    return jnp.concatenate([x_ru + h_ru, h_n, x_n])


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "", mask_BH: jax.Array | None = None
) -> tuple[CellState, Gates]:
    """One symbol of every stream, straight from the equations, given its projection: (the new state, its gates)."""
    h_masked = state.h if mask_BH is None else state.h * mask_BH
    z_r, z_u, z_n = jnp.split(z_BG, GATES, axis=1)
    b_q, b_n = jnp.split(vectors(params)[None], [z_BG.shape[1]], axis=1)
    q_r, q_u, q_n = jnp.split(h_masked @ params.w_h + b_q, GATES, axis=1)
    r, u = jax.nn.sigmoid(z_r + q_r), jax.nn.sigmoid(z_u + q_u)
    n = jnp.tanh(z_n + b_n + r * q_n)
    h = (1 - u) * n + u * state.h
    return CellState(h, None), {"r": r, "u": u, "n": n}


def forward(
    matmul: Matmul, b: jax.Array, prev: CellState, h_masked: jax.Array, z: jax.Array, variant: str
) -> tuple[CellState, tuple[jax.Array, ...]]:
    """The new state; and r, u, n, q_n.  See `ops.scan.Cell`."""
    b_q, b_n = jnp.split(b, [z.shape[1]], axis=1)
    z_r, z_u, z_n = jnp.split(z, GATES, axis=1)
    q_r, q_u, q_n = jnp.split(matmul(h_masked) + b_q, GATES, axis=1)
    r, u = jax.nn.sigmoid(z_r + q_r), jax.nn.sigmoid(z_u + q_u)
    n = jnp.tanh(z_n + b_n + r * q_n)
    return CellState((1 - u) * n + u * prev.h, None), (r, u, n, q_n)


def backward(
    matmul: Matmul,
    b: jax.Array,
    dh: jax.Array,
    dc: Any,
    states: SavedStates,
    saved: tuple[jax.Array, ...],
    variant: str,
) -> tuple[jax.Array, jax.Array, None, tuple[jax.Array, jax.Array]]:
    """Gradients: ds, and dh u, of h⁻; and dq and dz_n.  See `ops.scan.Cell`."""
    r, u, n, q_n = saved
    dz_n = dh * (1 - u) * (1 - n * n)
    dz_u = dh * (states.h_prev - n) * u * (1 - u)
    dz_r = dz_n * q_n * r * (1 - r)
    dq = jnp.concatenate([dz_r, dz_u, dz_n * r], axis=1)
    return matmul(dq), dh * u, None, (dq, dz_n)


def parameter_gradients(
    sums: WindowSums, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dW_h, db and dz of a window."""
    dq_TBG, dz_n_TBH = gradients
    db = jnp.concatenate([sums.total(dq_TBG), sums.total(dz_n_TBH)])
    dz_ru_TBG = dq_TBG[:, :, : 2 * dz_n_TBH.shape[2]]
    return sums.outer_h_masked(dq_TBG), db, jnp.concatenate([dz_ru_TBG, dz_n_TBH], axis=2)
