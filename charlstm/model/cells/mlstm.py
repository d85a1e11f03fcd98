"""The multiplicative LSTM, and its reverse pass derived by hand.

Source: Krause, Lu, Murray and Renals, Multiplicative LSTM for Sequence Modelling, 2016 (arXiv:1609.07959), equations 16
to 20.  Each symbol has recurrent weights of its own: what the gates see of the state is the factor m in place of h⁻.
It has the LSTM's variants, "plain" and "capped".

Forward, symbol by symbol.  h⁻ and c⁻ are the state before the symbol, σ the logistic function, products of vectors are
element by element.  The window's projection z has a part for the gates, z_a, in the order i f g o, and one for the
factor, z_m; the recurrent weights W_h = [W_hm, W_mh] are those of the gates and those of the factor, which has no bias:

    z = x W_x                        G = 5H: z_a, z_m; one product for all the window's symbols
    q = s W_mh                       s = h⁻, or with state dropout h⁻ times the stream's mask
    m = z_m q
    a = z_a + m W_hm + b             b = b_x + b_h
    i, f, o = σ(a_i), σ(a_f), σ(a_o)
    g = tanh(a_g)
    c = f c⁻ + i g                   capped: c = f c⁻ + k g with k = min(i, 1 - f)
    h = o tanh(c)

Reverse, from the last symbol to the first.  dv is the gradient of the loss by v; da comes from dh and dc as in the LSTM
(lstm.py), and dc⁻ = dc f; then

    dm   = da W_hmᵀ
    dz_m = dm q
    dq   = dm z_m
    ds   = dq W_mhᵀ                  dh⁻ = ds, or times the mask

and, once the window is done, dz = (da, dz_m), dW_hm = Σ mᵀ da, dW_mh = Σ sᵀ dq, db = Σ da, the sums over all symbols of
all streams.  Where a stream is reset, h⁻ = c⁻ = 0, and dh⁻ and dc⁻ go nowhere.
"""

from functools import partial

import jax
import jax.numpy as jnp

from charlstm.model.cells import lstm
from charlstm.model.ops.matmul import bias_gradient, recurrent_matmul, recurrent_weight_gradient, weight_gradient
from charlstm.model.ops.scan import scan
from charlstm.types import CellParams, CellState

GATES = lstm.GATES  # i f g o
zero_state, bias = lstm.zero_state, lstm.bias


def init(
    key: jax.Array, input_width: int, hidden_size: int, initializer: str, scale: float, forget_bias: float
) -> CellParams:
    """Parameters of one layer, as the LSTM's: `w_x` and `w_h` have the columns of the factor m besides, `[., 5H]`."""
    params = lstm.init(key, input_width, hidden_size, initializer, scale, forget_bias, blocks=GATES + 1)
    return params._replace(b_x=params.b_x[: GATES * hidden_size], b_h=params.b_h[: GATES * hidden_size])


def step(
    params: CellParams, state: CellState, x_BD: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """One symbol of every stream, straight from the equations: (the new state, h_BH)."""
    return step_projected(params, state, x_BD @ params.w_x, variant, mask_BH)


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, jax.Array]:
    """`step`, given the symbol's projection."""
    h_masked, G = state.h if mask_BH is None else state.h * mask_BH, params.b_h.shape[0]
    m_BH = z_BG[:, G:] * (h_masked @ params.w_h[:, G:])
    return lstm.from_preactivations(z_BG[:, :G] + m_BH @ params.w_h[:, :G] + bias(params)[None], state, variant)


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
      w_h, b: the master parameters `[H, 5H]`, and their `bias`; the gradients come in their own dtypes.
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
    dtype, G = state.h.dtype, b.shape[0]
    times_w_hm, times_w_mh = (recurrent_matmul(w, compute_dtype, dtype) for w in (w_h[:, :G], w_h[:, G:]))
    b_BG = b.astype(dtype)[None]

    def forward(state, symbol):
        z_BG, reset_B = symbol
        z_a, z_m = z_BG[:, :G].astype(dtype), z_BG[:, G:].astype(dtype)
        # A choice, not a product with 0: a NaN in the state of a stream that is reset must not survive.
        h_prev, c_prev = (jnp.where(reset_B[:, None], 0, s_BH) for s_BH in state)
        h_masked = h_prev if mask_BH is None else h_prev * mask_BH
        q = times_w_mh(h_masked)
        a_BG = z_a + b_BG + times_w_hm(z_m * q)
        a_i, a_f, a_g, a_o = jnp.split(a_BG, GATES, axis=1)
        i, f, g, o = jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)
        c = f * c_prev + (jnp.minimum(i, 1 - f) if variant == "capped" else i) * g
        h = o * jnp.tanh(c)
        return CellState(h, c), (h.astype(compute_dtype), (c_prev, i, f, g, o), q)

    final, (h_TBH, gates, q_TBH) = scan(forward, state, (z_TBG, reset_TB))
    return (final, h_TBH), (w_h, state.h, h_TBH, gates, q_TBH, z_TBG[:, :, G:], reset_TB, mask_BH)


def _reverse(compute_dtype, variant, residuals, cotangents):
    w_h, h_first, h_TBH, gates, q_TBH, z_m_TBH, reset_TB, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    dtype, G = h_first.dtype, GATES * h_first.shape[1]
    times_w_hm, times_w_mh = (recurrent_matmul(w, compute_dtype, dtype, reverse=True) for w in (w_h[:, :G], w_h[:, G:]))

    def backward(dstate, symbol):
        dh_above, (c_prev, i, f, g, o), q, z_m, reset_B = symbol
        dh = dh_above.astype(dtype) + dstate.h
        k = jnp.minimum(i, 1 - f) if variant == "capped" else i
        tanh_c = jnp.tanh(f * c_prev + k * g)
        dc = dstate.c + dh * o * (1 - tanh_c * tanh_c)
        da_i = dc * g * i * (1 - i)
        da_f = dc * c_prev * f * (1 - f)
        da_g = dc * k * (1 - g * g)
        da_o = dh * tanh_c * o * (1 - o)
        if variant == "capped":
            at_the_cap = i > 1 - f
            da_i, da_f = jnp.where(at_the_cap, 0, da_i), jnp.where(at_the_cap, dc * (c_prev - g) * f * (1 - f), da_f)
        da_BG = jnp.concatenate([da_i, da_f, da_g, da_o], axis=1)
        dm = times_w_hm(da_BG)
        z_m = z_m.astype(dtype)
        dq = dm * z_m
        dh_prev = times_w_mh(dq)
        dh_prev = dh_prev if mask_BH is None else dh_prev * mask_BH
        dstate = CellState(*(jnp.where(reset_B[:, None], 0, ds) for ds in (dh_prev, dc * f)))
        dz_BG = jnp.concatenate([da_BG, dm * q], axis=1)
        # m by the way: made after the loop, it would be made together with its transposition.
        return dstate, (dz_BG.astype(z_m_TBH.dtype), dq.astype(z_m_TBH.dtype), (z_m * q).astype(compute_dtype))

    dfirst, (dz_TBG, dq_TBH, m_TBH) = scan(backward, dfinal, (dh_TBH, gates, q_TBH, z_m_TBH, reset_TB), reverse=True)
    da_TBG = dz_TBG[:, :, :G]
    dw_hm = weight_gradient(m_TBH, da_TBG, compute_dtype, dtype)
    dw_mh = recurrent_weight_gradient(h_first, h_TBH, reset_TB, mask_BH, dq_TBH, compute_dtype)
    dw_h = jnp.concatenate([dw_hm, dw_mh], axis=1)
    db = bias_gradient(da_TBG, dtype)
    return dw_h.astype(w_h.dtype), db.astype(w_h.dtype), dfirst, dz_TBG, None, None


recurrence.defvjp(_forward, _reverse)
