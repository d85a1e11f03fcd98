"""The LSTM with layer normalization.  It has no hand-derived backward pass: ops/autodiff_scan.py runs its step.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450), equations 20 to 22 of the supplement.  h⁻
and c⁻ are the state before the symbol, σ the logistic function, products of vectors are elementwise; the gates
lie along G = 4H in the order i f g o:

    a = LN(x W_x; α_x) + b_x + LN(h⁻ W_h; α_h) + b_h
    i, f, o = σ(a_i), σ(a_f), σ(a_o)
    g = tanh(a_g)
    c = f c⁻ + i g                   capped: c = f c⁻ + k g with k = min(i, 1 - f)
    h = o tanh(LN(c; α_c) + b_c)

    LN(v; α) = α (v - mean(v)) / sqrt(var(v) + ε)

As in the paper, mean and variance are those of all 4H sums of a matmul together (some programs take those of each gate
by itself).  b_x and b_h are the shifts of the two normalizations; the paper's b would only be added to them.
"""

import jax
import jax.numpy as jnp

from charlstm.model.cells import lstm
from charlstm.types import CellParams, CellState, Gates, LayerNorms

GATES = lstm.GATES  # i f g o
EPSILON = 1e-5
zero_state = lstm.zero_state


def init(
    key: jax.Array, input_width: int, hidden_size: int, initializer: str, scale: float, forget_bias: float
) -> CellParams:
    """Parameters of one layer: the LSTM's, gains of 1, and b_c = 0."""
    params = lstm.init(key, input_width, hidden_size, initializer, scale, forget_bias)
    gates, cells = jnp.ones(GATES * hidden_size), jnp.ones(hidden_size)
    return params._replace(norms=LayerNorms(gain_x=gates, gain_h=gates, gain_c=cells, b_c=jnp.zeros(hidden_size)))


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, Gates]:
    """One symbol of every stream, straight from the equations, given its projection: (the new state, its gates)."""
    norms, h_masked = params.norms, state.h if mask_BH is None else state.h * mask_BH
    assert norms is not None
    a_BG = _normalised(z_BG, norms.gain_x) + _normalised(h_masked @ params.w_h, norms.gain_h)
    i, f, g, o = lstm.gates(a_BG + lstm.bias(params)[None])
    c = lstm.next_cell(i, f, g, state.c, variant)
    return CellState(output(params, o, c), c), {"i": i, "f": f, "g": g, "o": o}


def output(params: CellParams, o: jax.Array, c: jax.Array) -> jax.Array:
    """h, given the output gate and c."""
    assert params.norms is not None
    return o * jnp.tanh(_normalised(c, params.norms.gain_c) + params.norms.b_c[None])


def _normalised(v_BN: jax.Array, gain_N: jax.Array) -> jax.Array:
    centered = v_BN - v_BN.mean(1, keepdims=True)
    return gain_N[None] * centered * jax.lax.rsqrt((centered * centered).mean(1, keepdims=True) + EPSILON)
