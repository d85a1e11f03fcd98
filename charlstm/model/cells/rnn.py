"""The plain recurrent cell, the equations of PyTorch's nn.RNN, and its reverse pass derived by hand.

Source: Elman, Finding Structure in Time, Cognitive Science 14(2), 1990; Karpathy's min-char-rnn is this cell.  Its
variants are "tanh" and "relu"; rectified units are those of Le, Jaitly and Hinton, 2015 (arXiv:1504.00941).

Forward, symbol by symbol.  h⁻ is the state before the symbol; G = H:

    z = x W_x                        the window's projection, one product for all its symbols
    a = z + s W_h + b                s = h⁻, or with state dropout h⁻ times the stream's mask; b = b_x + b_h
    h = tanh(a)                      relu: h = max(a, 0)

Reverse, from the last symbol to the first.  dv is the gradient of the loss by v.  dh is the sum of what comes from
above (this symbol's output) and from the right (the next symbol's dh⁻); products of vectors are element by element:

    da  = dh (1 - h²)                relu: da = dh where h > 0, else 0
    ds  = da W_hᵀ                    dh⁻ = ds, or times the mask

and, once the window is done, dz = da, dW_h = Σ sᵀ da, db = Σ da, the sums over all symbols of all streams.  Where a
stream is reset, h⁻ = 0, and dh⁻ goes nowhere.
"""

from functools import partial

import jax
import jax.numpy as jnp

from charlstm.model import initializers
from charlstm.model.ops.matmul import bias_gradient, recurrent_matmul, recurrent_weight_gradient
from charlstm.model.ops.scan import scan
from charlstm.types import CellParams, CellState

GATES = 1


def init(
    key: jax.Array, input_width: int, hidden_size: int, initializer: str, scale: float, forget_bias: float
) -> CellParams:
    """Parameters of one layer, float32; `initializer` and `scale` as in `charlstm.model.initializers`.

    `forget_bias` is the LSTM's and does nothing here.
    """
    return initializers.layer(initializer, key, input_width, hidden_size, GATES, scale=scale)


def zero_state(batch: int, hidden_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> CellState:
    """The state before anything was read: zeros, `[batch, hidden_size]`."""
    return CellState(h=jnp.zeros((batch, hidden_size), dtype), c=None)


def step(
    params: CellParams, state: CellState, x_BD: jax.Array, variant: str = "tanh", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """One symbol of every stream, straight from the equations: (the new state, h_BH)."""
    return step_projected(params, state, x_BD @ params.w_x, variant, mask_BH)


def bias(params: CellParams) -> jax.Array:
    """b, `[H]`."""
    return params.b_x + params.b_h


def step_projected(
    params: CellParams, state: CellState, z_BH: jax.Array, variant: str = "tanh", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """`step`, given the symbol's projection."""
    h_masked = state.h if mask_BH is None else state.h * mask_BH
    a_BH = z_BH + h_masked @ params.w_h + bias(params)[None]
    h = jax.nn.relu(a_BH) if variant == "relu" else jnp.tanh(a_BH)
    return CellState(h, None), h


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def recurrence(
    w_h: jax.Array,
    b: jax.Array,
    state: CellState,
    z_TBG: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    variant: str = "tanh",
    mask_BH: jax.Array | None = None,
) -> tuple[CellState, jax.Array]:
    """A window of every stream, given its projection: what `step` gives symbol by symbol, with a reverse pass by hand.

    Args:
      w_h, b: the master parameters `[H, H]`, and their `bias`; the gradients come in their own dtypes.
      state: before the window, h `[B, H]`; its dtype is that of the arithmetic and of the products' sums.
      z_TBG: x W_x.
      reset_TB: bool; where True, the stream's state is zero before the symbol is read.
      compute_dtype: of the operands of products with w_h, and of the outputs; static.
      variant: "tanh" or "relu"; static.
      mask_BH: what the products with w_h see of the state is this times h⁻ (state dropout); None for h⁻ itself.

    Returns:
      The state after the window, and h_TBH.
    """
    return _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH)[0]


def _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH):
    dtype = state.h.dtype
    times_w, b_BH = recurrent_matmul(w_h, compute_dtype, dtype), b.astype(dtype)[None]

    def forward(h, symbol):
        z_BH, reset_B = symbol
        # A choice, not a product with 0: a NaN in the state of a stream that is reset must not survive.
        h_prev = jnp.where(reset_B[:, None], 0, h)
        h_masked = h_prev if mask_BH is None else h_prev * mask_BH
        a_BH = z_BH.astype(dtype) + b_BH + times_w(h_masked)
        h = jax.nn.relu(a_BH) if variant == "relu" else jnp.tanh(a_BH)
        return h, h

    h, h_TBH = scan(forward, state.h, (z_TBG, reset_TB))
    # Of z only the dtype is wanted later; an empty slice carries it, so that the window's projection need not be kept.
    residuals = (w_h, state.h, h_TBH, reset_TB, z_TBG[:0], mask_BH)
    return (CellState(h, None), h_TBH.astype(compute_dtype)), residuals


def _reverse(compute_dtype, variant, residuals, cotangents):
    w_h, h_first, h_TBH, reset_TB, z_like, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    dtype = h_first.dtype
    times_w = recurrent_matmul(w_h, compute_dtype, dtype, reverse=True)

    def backward(dh_right, symbol):
        dh_above, h, reset_B = symbol
        dh = dh_above.astype(dtype) + dh_right
        da_BH = jnp.where(h > 0, dh, 0) if variant == "relu" else dh * (1 - h * h)
        dh_prev = times_w(da_BH)
        dh_prev = dh_prev if mask_BH is None else dh_prev * mask_BH
        return jnp.where(reset_B[:, None], 0, dh_prev), da_BH.astype(z_like.dtype)

    dh_first, da_TBH = scan(backward, dfinal.h, (dh_TBH, h_TBH, reset_TB), reverse=True)
    dw_h = recurrent_weight_gradient(h_first, h_TBH, reset_TB, mask_BH, da_TBH, compute_dtype)
    db = bias_gradient(da_TBH, dtype)
    return dw_h.astype(w_h.dtype), db.astype(w_h.dtype), CellState(dh_first, None), da_TBH, None, None


recurrence.defvjp(_forward, _reverse)
