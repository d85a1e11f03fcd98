"""The LSTM, the equations of PyTorch's nn.LSTM, and its reverse pass derived by hand.

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997; the forget gate is that of
Gers, Schmidhuber and Cummins, Learning to Forget, Neural Computation 12(10), 2000.  Its variants are "plain" and
"capped", whose input gate lets in no more than was forgotten, as in Melis, Kočiský and Blunsom, Mogrifier LSTM, ICLR
2020 (arXiv:1909.01792).

Forward, symbol by symbol.  h⁻ and c⁻ are the state before the symbol, σ the logistic function, products of vectors are
element by element; the gates lie along G = 4H in the order i f g o:

    z = x W_x                        the window's projection, one product for all its symbols
    a = z + s W_h + b                s = h⁻, or with state dropout h⁻ times the stream's mask; b = b_x + b_h
    i, f, o = σ(a_i), σ(a_f), σ(a_o)
    g = tanh(a_g)
    c = f c⁻ + i g                   capped: c = f c⁻ + k g with k = min(i, 1 - f)
    h = o tanh(c)

Reverse, from the last symbol to the first.  dv is the gradient of the loss by v.  dh is the sum of what comes from
above (this symbol's output) and from the right (the next symbol's dh⁻); dc from the right is the next symbol's dc⁻:

    dc   = dc from the right + dh o (1 - tanh²(c))
    da_i = dc g  i (1 - i)
    da_f = dc c⁻ f (1 - f)
    da_g = dc i (1 - g²)
    da_o = dh tanh(c) o (1 - o)
    ds   = da W_hᵀ                   dh⁻ = ds, or times the mask
    dc⁻  = dc f

capped, where i > 1 - f, so that k = 1 - f (elsewhere k = i, as above):

    da_i = 0
    da_f = dc (c⁻ - g) f (1 - f)
    da_g = dc k (1 - g²)

and, once the window is done, dz = da, dW_h = Σ sᵀ da, db = Σ da, the sums over all symbols of all streams.  Where a
stream is reset, h⁻ = c⁻ = 0, and dh⁻ and dc⁻ go nowhere.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.model import initializers
from charlstm.model.ops.matmul import bias_gradient, recurrent_matmul, recurrent_weight_gradient
from charlstm.model.ops.scan import blocks_at, scan
from charlstm.types import CellParams, CellState

GATES = 4  # i f g o


def init(
    key: jax.Array,
    input_width: int,
    hidden_size: int,
    initializer: str,
    scale: float,
    forget_bias: float,
    blocks: int = GATES,
) -> CellParams:
    """Parameters of one layer, float32; `initializer` and `scale` as in `charlstm.model.initializers`.

    The forget gate's slice of b_x is `forget_bias`, as char-rnn and Jozefowicz, Zaremba and Sutskever (ICML 2015) set
    it; its slice of b_h stays as drawn: zero, but under "pytorch" and "uniform".
    """
    params = initializers.layer(initializer, key, input_width, hidden_size, blocks, scale=scale)
    return params._replace(b_x=params.b_x.at[hidden_size : 2 * hidden_size].set(forget_bias))


def zero_state(batch: int, hidden_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> CellState:
    """The state before anything was read: zeros, `[batch, hidden_size]` each."""
    return CellState(h=jnp.zeros((batch, hidden_size), dtype), c=jnp.zeros((batch, hidden_size), dtype))


def step(
    params: CellParams, state: CellState, x_BD: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """One symbol of every stream, straight from the equations: (the new state, h_BH)."""
    return step_projected(params, state, x_BD @ params.w_x, variant, mask_BH)


def bias(params: CellParams) -> jax.Array:
    """b, `[4H]`."""
    return params.b_x + params.b_h


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """`step`, given the symbol's projection."""
    h_masked = state.h if mask_BH is None else state.h * mask_BH
    return from_preactivations(z_BG + h_masked @ params.w_h + bias(params)[None], state, variant)


def from_preactivations(a_BG: jax.Array, state: CellState, variant: str) -> tuple[CellState, jax.Array]:
    """What follows from the gates' sums a: (the new state, h_BH)."""
    c, o = cell_state(a_BG, state, variant)
    h = o * jnp.tanh(c)
    return CellState(h, c), h


def cell_state(a_BG: jax.Array, state: CellState, variant: str) -> tuple[jax.Array, jax.Array]:
    """c and o."""
    assert state.c is not None
    a_i, a_f, a_g, a_o = jnp.split(a_BG, GATES, axis=1)
    i, f, g, o = jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)
    return next_cell(i, f, g, state.c, variant), o


def next_cell(i: jax.Array, f: jax.Array, g: jax.Array, c_prev: jax.Array, variant: str) -> jax.Array:
    """c, of gates and c⁻ of any one shape."""
    return f * c_prev + (jnp.minimum(i, 1 - f) if variant == "capped" else i) * g


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def recurrence(
    w_h: jax.Array,
    b: jax.Array,
    state: CellState,
    z_TBG: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    variant: str = "plain",
    mask_BH: jax.Array | None = None,
) -> tuple[CellState, jax.Array]:
    """A window of every stream, given its projection: what `step` gives symbol by symbol, with a reverse pass by hand.

    Args:
      w_h, b: the master parameters `[H, 4H]`, and their `bias`; the gradients come in their own dtypes.
      state: before the window, `[B, H]` each; its dtype is that of the gates' arithmetic and of the products' sums.
      z_TBG: x W_x.
      reset_TB: bool; where True, the stream's state is zero before the symbol is read.
      compute_dtype: of the operands of products with w_h, and of the outputs; static.
      variant: "plain" or "capped"; static.
      mask_BH: what the products with w_h see of the state is this times h⁻ (state dropout); None for h⁻ itself.

    Returns:
      The state after the window, and h_TBH.
    """
    return _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH)[0]


def _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH):
    dtype = state.h.dtype
    times_w, b_BG = recurrent_matmul(w_h, compute_dtype, dtype), b.astype(dtype)[None]

    def forward(carry, symbol):
        state, gates_TBG = carry
        t, reset_B = symbol
        # A choice, not a product with 0: a NaN in the state of a stream that is reset must not survive.
        h_prev, c_prev = (jnp.where(reset_B[:, None], 0, s_BH) for s_BH in state)
        h_masked = h_prev if mask_BH is None else h_prev * mask_BH
        z_BG = jax.lax.dynamic_index_in_dim(gates_TBG, t, keepdims=False)
        a_BG = z_BG + b_BG + times_w(h_masked)
        gates_BG = _activated(a_BG)
        i, f, g, o = jnp.split(gates_BG, GATES, axis=1)
        c = next_cell(i, f, g, c_prev, variant)
        h = o * jnp.tanh(c)
        gates_TBG = jax.lax.dynamic_update_index_in_dim(gates_TBG, gates_BG, t, 0)
        return (CellState(h, c), gates_TBG), (h.astype(compute_dtype), c_prev)

    # The gates take the place of the window's projection, symbol by symbol: one array less of the largest there are.
    start, symbols = (state, z_TBG.astype(dtype)), (jnp.arange(z_TBG.shape[0]), reset_TB)
    (final, gates_TBG), (h_TBH, c_prev_TBH) = scan(forward, start, symbols)
    # Of z only the dtype is wanted later; an empty slice carries it.
    return (final, h_TBH), (w_h, state.h, h_TBH, c_prev_TBH, gates_TBG, reset_TB, z_TBG[:0], mask_BH)


def _activated(a_BG: jax.Array) -> jax.Array:
    """The gates i f g o of their arguments: one tanh for all of them, as σ(a) = (1 + tanh(a / 2)) / 2."""
    half_BG = np.repeat(np.asarray([0.5, 0.5, 1.0, 0.5], a_BG.dtype), a_BG.shape[1] // GATES)[None]
    return jnp.tanh(a_BG * half_BG) * half_BG + (1 - half_BG)


def _reverse(compute_dtype, variant, residuals, cotangents):
    w_h, h_first, h_TBH, c_prev_TBH, gates_TBG, reset_TB, z_like, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    dtype = h_first.dtype
    times_w = recurrent_matmul(w_h, compute_dtype, dtype, reverse=True)

    def backward(dstate, symbol):
        t, dh_above, c_prev, reset_B = symbol
        dh = dh_above.astype(dtype) + dstate.h
        das, dc_prev = gate_gradients(blocks_at(gates_TBG, t, GATES), c_prev, dh, dstate.c, variant)
        da_BG = jnp.concatenate(das, axis=1)
        dh_prev = times_w(da_BG)
        dh_prev = dh_prev if mask_BH is None else dh_prev * mask_BH
        dstate = CellState(*(jnp.where(reset_B[:, None], 0, ds) for ds in (dh_prev, dc_prev)))
        return dstate, da_BG.astype(z_like.dtype)

    symbols = (jnp.arange(len(reset_TB)), dh_TBH, c_prev_TBH, reset_TB)
    dfirst, da_TBG = scan(backward, dfinal, symbols, reverse=True)
    weights = parameter_gradients(w_h, h_first, h_TBH, da_TBG, reset_TB, compute_dtype, mask_BH)
    return *weights, dfirst, da_TBG, None, None


def gate_gradients(
    gates: Sequence[jax.Array], c_prev: jax.Array, dh: jax.Array, dc: jax.Array, variant: str
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """One symbol in reverse, up to the product with W_h', of arrays of any one shape.

    Args:
      gates: i, f, g, o.
      dh: from above and from the right.
      dc: from the right.

    Returns:
      (da_i, da_f, da_g, da_o), and dc⁻.
    """
    i, f, g, o = gates
    k = jnp.minimum(i, 1 - f) if variant == "capped" else i
    tanh_c = jnp.tanh(f * c_prev + k * g)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * k * (1 - g * g)
    if variant == "capped":
        at_the_cap = i > 1 - f
        da_i, da_f = jnp.where(at_the_cap, 0, da_i), jnp.where(at_the_cap, dc * (c_prev - g) * f * (1 - f), da_f)
    da_o = dh * tanh_c * o * (1 - o)
    return (da_i, da_f, da_g, da_o), dc * f


def parameter_gradients(
    w_h: jax.Array,
    h_first: jax.Array,
    h_TBH: jax.Array,
    da_TBG: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    mask_BH: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """dW_h and db in the dtype of w_h, once the window is done; h_first is h before it."""
    dw_h = recurrent_weight_gradient(h_first, h_TBH, reset_TB, mask_BH, da_TBG, compute_dtype)
    return dw_h.astype(w_h.dtype), bias_gradient(da_TBG, h_first.dtype).astype(w_h.dtype)


recurrence.defvjp(_forward, _reverse)
