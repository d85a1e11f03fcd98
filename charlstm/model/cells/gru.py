"""The GRU, the equations of PyTorch's nn.GRU, and its reverse pass derived by hand.

Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, EMNLP 2014 (arXiv:1406.1078), in the
form of its first version, with the reset gate applied after the product with W_h: one product a symbol.

Forward, symbol by symbol.  h⁻ is the state before the symbol, σ the logistic function, products of vectors are element
by element; the gates lie along G = 3H in the order r u n (PyTorch writes z for the update gate u; here z is the
projection):

    z = x W_x                        the window's projection, one product for all its symbols
    q = s W_h + b_q                  s = h⁻, or with state dropout h⁻ times the stream's mask
    r, u = σ(z_r + q_r), σ(z_u + q_u)
    n = tanh(z_n + b_n + r q_n)
    h = (1 - u) n + u h⁻

Here b_n is the part of b_x for n, and b_q = b_h, with those for r and u added: b = (b_q, b_n), along 4H.

Reverse, from the last symbol to the first.  dv is the gradient of the loss by v.  dh is the sum of what comes from
above (this symbol's output) and from the right (the next symbol's dh⁻):

    dz_n = dh (1 - u) (1 - n²)
    dz_u = dh (h⁻ - n) u (1 - u)
    dz_r = dz_n q_n r (1 - r)
    dq   = dz_r, dz_u, dz_n r
    ds   = dq W_hᵀ
    dh⁻  = dh u + ds                 with state dropout: dh u + ds times the mask

and, once the window is done, dW_h = Σ sᵀ dq, db_q = Σ dq, db_n = Σ dz_n, the sums over all symbols of all streams.
Where a stream is reset, h⁻ = 0, and dh⁻ goes nowhere.
"""

from functools import partial

import jax
import jax.numpy as jnp

from charlstm.model import initializers
from charlstm.model.ops.matmul import bias_gradient, recurrent_matmul, recurrent_weight_gradient
from charlstm.model.ops.scan import scan
from charlstm.types import CellParams, CellState

GATES = 3  # r u n


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
    params: CellParams, state: CellState, x_BD: jax.Array, variant: str = "", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """One symbol of every stream, straight from the equations: (the new state, h_BH).  There is one variant."""
    return step_projected(params, state, x_BD @ params.w_x, variant, mask_BH)


def bias(params: CellParams) -> jax.Array:
    """b, `[4H]`."""
    r_and_u = 2 * (params.b_h.shape[0] // GATES)
    (x_ru, x_n), (h_ru, h_n) = (jnp.split(b, [r_and_u]) for b in (params.b_x, params.b_h))
    return jnp.concatenate([x_ru + h_ru, h_n, x_n])


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """`step`, given the symbol's projection."""
    h_masked = state.h if mask_BH is None else state.h * mask_BH
    z_r, z_u, z_n = jnp.split(z_BG, GATES, axis=1)
    b_q, b_n = jnp.split(bias(params)[None], [z_BG.shape[1]], axis=1)
    q_r, q_u, q_n = jnp.split(h_masked @ params.w_h + b_q, GATES, axis=1)
    r, u = jax.nn.sigmoid(z_r + q_r), jax.nn.sigmoid(z_u + q_u)
    n = jnp.tanh(z_n + b_n + r * q_n)
    h = (1 - u) * n + u * state.h
    return CellState(h, None), h


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def recurrence(
    w_h: jax.Array,
    b: jax.Array,
    state: CellState,
    z_TBG: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    variant: str = "",
    mask_BH: jax.Array | None = None,
) -> tuple[CellState, jax.Array]:
    """A window of every stream, given its projection: what `step` gives symbol by symbol, with a reverse pass by hand.

    Args:
      w_h, b: the master parameters `[H, 3H]`, and their `bias`; the gradients come in their own dtypes.
      state: before the window, h `[B, H]`; its dtype is that of the gates' arithmetic and of the products' sums.
      z_TBG: x W_x.
      reset_TB: bool; where True, the stream's state is zero before the symbol is read.
      compute_dtype: of the operands of products with w_h, and of the outputs; static.
      variant: there is one.
      mask_BH: what the products with w_h see of the state is this times h⁻ (state dropout); None for h⁻ itself.

    Returns:
      The state after the window, and h_TBH.
    """
    return _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH)[0]


def _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH):
    dtype = state.h.dtype
    times_w, (b_q, b_n) = (
        recurrent_matmul(w_h, compute_dtype, dtype),
        jnp.split(b.astype(dtype)[None], [w_h.shape[1]], axis=1),
    )

    def forward(h, symbol):
        z_BG, reset_B = symbol
        # A choice, not a product with 0: a NaN in the state of a stream that is reset must not survive.
        h_prev = jnp.where(reset_B[:, None], 0, h)
        h_masked = h_prev if mask_BH is None else h_prev * mask_BH
        q_BG = times_w(h_masked) + b_q
        z_r, z_u, z_n = jnp.split(z_BG.astype(dtype), GATES, axis=1)
        q_r, q_u, q_n = jnp.split(q_BG, GATES, axis=1)
        r, u = jax.nn.sigmoid(z_r + q_r), jax.nn.sigmoid(z_u + q_u)
        n = jnp.tanh(z_n + b_n + r * q_n)
        h = (1 - u) * n + u * h_prev
        return h, (h, (r, u, n, q_n))

    h, (h_TBH, gates) = scan(forward, state.h, (z_TBG, reset_TB))
    # Of z only the dtype is wanted later; an empty slice carries it, so that the window's projection need not be kept.
    residuals = (w_h, state.h, h_TBH, gates, reset_TB, z_TBG[:0], mask_BH)
    return (CellState(h, None), h_TBH.astype(compute_dtype)), residuals


def _reverse(compute_dtype, variant, residuals, cotangents):
    w_h, h_first, h_TBH, gates, reset_TB, z_like, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    dtype = h_first.dtype
    times_w = recurrent_matmul(w_h, compute_dtype, dtype, reverse=True)
    h_prev_TBH = jnp.where(reset_TB[:, :, None], 0, jnp.concatenate([h_first[None], h_TBH[:-1]]))

    def backward(dh_right, symbol):
        dh_above, h_prev, (r, u, n, q_n), reset_B = symbol
        dh = dh_above.astype(dtype) + dh_right
        dz_n = dh * (1 - u) * (1 - n * n)
        dz_u = dh * (h_prev - n) * u * (1 - u)
        dz_r = dz_n * q_n * r * (1 - r)
        dq_BG = jnp.concatenate([dz_r, dz_u, dz_n * r], axis=1)
        dseen = times_w(dq_BG)
        dh_prev = dh * u + (dseen if mask_BH is None else dseen * mask_BH)
        return jnp.where(reset_B[:, None], 0, dh_prev), (dq_BG.astype(z_like.dtype), dz_n.astype(z_like.dtype))

    dh_first, (dq_TBG, dz_n) = scan(backward, dfinal.h, (dh_TBH, h_prev_TBH, gates, reset_TB), reverse=True)
    dw_h = recurrent_weight_gradient(h_first, h_TBH, reset_TB, mask_BH, dq_TBG, compute_dtype)
    db = jnp.concatenate([bias_gradient(d_TBG, dtype) for d_TBG in (dq_TBG, dz_n)])
    dz_TBG = jnp.concatenate([dq_TBG[:, :, : 2 * w_h.shape[0]], dz_n], axis=2)
    return dw_h.astype(w_h.dtype), db.astype(w_h.dtype), CellState(dh_first, None), dz_TBG, None, None


recurrence.defvjp(_forward, _reverse)
