"""The multiplicative LSTM, and its hand-derived backward pass.

Source: Krause, Lu, Murray and Renals, Multiplicative LSTM for Sequence Modelling, 2016 (arXiv:1609.07959), equations 16
to 20.  Each symbol has recurrent weights of its own: the gates see the factor m in place of h⁻.
It has the LSTM's variants, "plain" and "capped".

Forward, symbol by symbol.  h⁻ and c⁻ are the state before the symbol, σ the logistic function, products of vectors are
elementwise.  The window's projection z has a part for the gates, z_a, in the order i f g o, and one for the
factor, z_m; the recurrent weights W_h = [W_hm, W_mh] are those of the gates and those of the factor, which has no bias:

    z = x W_x                        G = 5H: z_a, z_m; one matmul for all the window's symbols
    q = s W_mh                       s = h⁻, or with state dropout h⁻ times the stream's mask
    m = z_m q
    a = z_a + m W_hm + b             b = b_x + b_h
    i, f, o = σ(a_i), σ(a_f), σ(a_o)
    g = tanh(a_g)
    c = f c⁻ + i g                   capped: c = f c⁻ + k g with k = min(i, 1 - f)
    h = o tanh(c)

Backward, from the last symbol to the first.  dv is the gradient of the loss with respect to v; da comes from dh and dc
as in the LSTM (lstm.py), and dc⁻ = dc f; then

    dm   = da W_hmᵀ
    dz_m = dm q
    dq   = dm z_m
    ds   = dq W_mhᵀ                  dh⁻ = ds, or times the mask

and, after the loop, dz = (da, dz_m), dW_hm = Σ mᵀ da, dW_mh = Σ sᵀ dq, db = Σ da, the sums over all symbols of all
streams.  Where a stream is reset, h⁻ = c⁻ = 0, and dh⁻ and dc⁻ are dropped.  The loops are in ops/scan.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.model.cells import lstm
from charlstm.model.ops.scan import Matmul, SavedStates, WindowSums
from charlstm.types import CellParams, CellState, Gates

GATES = lstm.GATES  # i f g o
MATRICES = (GATES, 1)
HM, MH = 0, 1  # which of them
SAVED_OVER_Z = False
zero_state, vectors, output = lstm.zero_state, lstm.vectors, lstm.output


def init(
    key: jax.Array, input_width: int, hidden_size: int, initializer: str, scale: float, forget_bias: float
) -> CellParams:
    """Parameters of one layer, as the LSTM's: `w_x` and `w_h` have the columns of the factor m besides, `[., 5H]`."""
    params = lstm.init(key, input_width, hidden_size, initializer, scale, forget_bias, blocks=GATES + 1)
    return params._replace(b_x=params.b_x[: GATES * hidden_size], b_h=params.b_h[: GATES * hidden_size])


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, Gates]:
    """One symbol of every stream, straight from the equations, given its projection: (the new state, its gates)."""
    h_masked, G = state.h if mask_BH is None else state.h * mask_BH, params.b_h.shape[0]
    m_BH = z_BG[:, G:] * (h_masked @ params.w_h[:, G:])
    a_BG = z_BG[:, :G] + m_BH @ params.w_h[:, :G] + vectors(params)[None]
    new, gates = lstm.from_preactivations(a_BG, state, variant)
    return new, gates | {"m": m_BH}


def forward(
    matmul: Matmul, b: jax.Array, prev: CellState, h_masked: jax.Array, z: jax.Array, variant: str
) -> tuple[CellState, tuple[jax.Array, ...]]:
    """The new state; and i, f, g, o, q, z_m.  See `ops.scan.Cell`."""
    z_a, z_m = jnp.split(z, [b.shape[1]], axis=1)
    q = matmul(h_masked, MH)
    i, f, g, o = lstm.gates(z_a + b + matmul(z_m * q, HM))
    c = lstm.next_cell(i, f, g, prev.c, variant)
    return CellState(o * jnp.tanh(c), c), (i, f, g, o, q, z_m)


def backward(
    matmul: Matmul,
    b: jax.Array,
    dh: jax.Array,
    dc: Any,
    states: SavedStates,
    saved: tuple[jax.Array, ...],
    variant: str,
) -> tuple[jax.Array, None, jax.Array, tuple[jax.Array, ...]]:
    """Gradients: ds, no other of h⁻, dc⁻; and dz, dq, and m.  See `ops.scan.Cell`."""
    *gates, q, z_m = saved
    das, dc_prev = lstm.gate_gradients(gates, states.c_prev, dh, dc, variant)
    da = jnp.concatenate(das, axis=1)
    dm = matmul(da, HM)
    dq = dm * z_m
    dz = jnp.concatenate([da, dm * q], axis=1)
    # m by the way: made after the loop, it would be made together with its transpose.
    return matmul(dq, MH), None, dc_prev, (dz, dq, z_m * q)


def parameter_gradients(sums: WindowSums, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dW_h, db and dz of a window."""
    dz_TBG, dq_TBH, m_TBH = gradients
    da_TBG = dz_TBG[:, :, : GATES * m_TBH.shape[2]]
    dw_h = jnp.concatenate([sums.outer(m_TBH, da_TBG), sums.outer_h_masked(dq_TBH)], axis=1)
    return dw_h, sums.total(da_TBG), dz_TBG
