"""The LSTM with layer normalization, and its hand-derived backward pass.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450), equations 20 to 22 of the supplement.  It
has the LSTM's variants, "plain" and "capped".

Forward, symbol by symbol.  h⁻ and c⁻ are the state before the symbol, σ the logistic function, products of vectors are
elementwise; the gates lie along G = 4H in the order i f g o:

    z = x W_x                        the window's projection, one matmul for all its symbols
    q = s W_h                        s = h⁻, or with state dropout h⁻ times the stream's mask
    a = α_x N(z) + α_h N(q) + b      b = b_x + b_h
    i, f, o = σ(a_i), σ(a_f), σ(a_o)
    g = tanh(a_g)
    c = f c⁻ + i g                   capped: c = f c⁻ + k g with k = min(i, 1 - f)
    u = α_c N(c) + b_c
    h = o tanh(u)

    N(v) = (v - mean(v)) r(v)        r(v) = 1 / sqrt(var(v) + ε)

As in the paper, mean and variance are those of all 4H sums of a matmul together (some programs take those of each gate
by itself).  b_x and b_h are the shifts of the two normalizations; the paper's b would only be added to them.

Backward, from the last symbol to the first.  dv is the gradient of the loss with respect to v; dh and dc from the right
are as in the LSTM (lstm.py), and da_i, da_f, da_g and dc⁻ come from dc as there:

    du   = dh o (1 - tanh²(u))
    da_o = dh tanh(u) o (1 - o)
    dc   = dc from the right + N'(c; α_c du)
    dz   = N'(z; α_x da)
    dq   = N'(q; α_h da)
    ds   = dq W_hᵀ                   dh⁻ = ds, or times the mask

    N'(v; d) = (d - mean(d) - N(v) mean(d N(v))) r(v)

and, after the loop, dW_h = Σ sᵀ dq, db = Σ da, dα_x = Σ da N(z), dα_h = Σ da N(q), db_c = Σ du, dα_c = Σ du N(c), the
sums over all symbols of all streams.  Where a stream is reset, h⁻ = c⁻ = 0, and dh⁻ and dc⁻ are dropped.  The loops are
in ops/scan.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.model.cells import lstm
from charlstm.model.ops.scan import Matmul, SavedStates, WindowSums
from charlstm.types import CellParams, CellState, Gates, LayerNorms

GATES = lstm.GATES  # i f g o
MATRICES = (GATES,)
SAVED_OVER_Z = False
EPSILON = 1e-5
zero_state = lstm.zero_state

Vectors = tuple[jax.Array, LayerNorms]  # b and the rest


def init(
    key: jax.Array, input_width: int, hidden_size: int, initializer: str, scale: float, forget_bias: float
) -> CellParams:
    """Parameters of one layer: the LSTM's, gains of 1, and b_c = 0."""
    params = lstm.init(key, input_width, hidden_size, initializer, scale, forget_bias)
    gates, cells = jnp.ones(GATES * hidden_size), jnp.ones(hidden_size)
    return params._replace(norms=LayerNorms(gain_x=gates, gain_h=gates, gain_c=cells, b_c=jnp.zeros(hidden_size)))


def vectors(params: CellParams) -> Vectors:
    """b, and the gains and b_c."""
    assert params.norms is not None
    return lstm.vectors(params), params.norms


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, Gates]:
    """One symbol of every stream, straight from the equations, given its projection: (the new state, its gates)."""
    norms, h_masked = params.norms, state.h if mask_BH is None else state.h * mask_BH
    assert norms is not None
    a_BG = _normalized(z_BG, norms.gain_x) + _normalized(h_masked @ params.w_h, norms.gain_h)
    i, f, g, o = lstm.gates(a_BG + lstm.vectors(params)[None])
    c = lstm.next_cell(i, f, g, state.c, variant)
    return CellState(output(params, o, c), c), {"i": i, "f": f, "g": g, "o": o}


def output(params: CellParams, o: jax.Array, c: jax.Array) -> jax.Array:
    """h, given the output gate and c."""
    assert params.norms is not None
    return o * jnp.tanh(_normalized(c, params.norms.gain_c) + params.norms.b_c[None])


def _normalized(v_BN: jax.Array, gain: jax.Array) -> jax.Array:
    """gain N(v), of one gain `[N]`, or of each stream's own `[B, N]`."""
    return jnp.atleast_2d(gain) * _standardized(v_BN)[0]


def forward(
    matmul: Matmul, vectors: Vectors, prev: CellState, h_masked: jax.Array, z: jax.Array, variant: str
) -> tuple[CellState, tuple[jax.Array, ...]]:
    """The new state; the gates, and N and r of z, of q and of c.  See `ops.scan.Cell`."""
    b, norms = vectors
    n_x, r_x = _standardized(z)
    n_h, r_h = _standardized(matmul(h_masked))
    i, f, g, o = jnp.split(lstm.fused_gates(norms.gain_x * n_x + norms.gain_h * n_h + b), GATES, axis=1)
    c = lstm.next_cell(i, f, g, prev.c, variant)
    n_c, r_c = _standardized(c)
    h = o * jnp.tanh(norms.gain_c * n_c + norms.b_c)
    return CellState(h, c), (i, f, g, o, n_x, r_x, n_h, r_h, n_c, r_c)


def backward(
    matmul: Matmul,
    vectors: Vectors,
    dh: jax.Array,
    dc: Any,
    states: SavedStates,
    saved: tuple[jax.Array, ...],
    variant: str,
) -> tuple[jax.Array, None, jax.Array, tuple[jax.Array, ...]]:
    """Gradients: ds, no other of h⁻, dc⁻; and dz, dq, and those of the vectors, summed over the streams."""
    (_, norms), (i, f, g, o, n_x, r_x, n_h, r_h, n_c, r_c) = vectors, saved
    tanh_u = jnp.tanh(norms.gain_c * n_c + norms.b_c)
    du = dh * o * (1 - tanh_u * tanh_u)
    dc = dc + _through(n_c, r_c, norms.gain_c * du)
    *das, dc_prev = lstm.input_gradients(i, f, g, states.c_prev, dc, variant)
    da = jnp.concatenate([*das, dh * tanh_u * o * (1 - o)], axis=1)
    dz, dq = _through(n_x, r_x, norms.gain_x * da), _through(n_h, r_h, norms.gain_h * da)
    sums = da.sum(0), (da * n_x).sum(0), (da * n_h).sum(0), (du * n_c).sum(0), du.sum(0)
    return matmul(dq), None, dc_prev, (dz, dq, *sums)


def parameter_gradients(sums: WindowSums, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, Vectors, jax.Array]:
    """dW_h, those of the vectors, and dz of a window."""
    dz_TBG, dq_TBG, *of_vectors = gradients
    db, *dnorms = (sums.total(d_TK[:, None]) for d_TK in of_vectors)
    return sums.outer_h_masked(dq_TBG), (db, LayerNorms(*dnorms)), dz_TBG


def _standardized(v_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """N(v), and r(v), `[B, 1]`."""
    centered = v_BN - _mean(v_BN)
    r_B1 = jax.lax.rsqrt(_mean(centered * centered) + EPSILON)
    return centered * r_B1, r_B1


def _through(n_BN: jax.Array, r_B1: jax.Array, d_BN: jax.Array) -> jax.Array:
    """N'(v; d), given N(v) and r(v)."""
    return (d_BN - _mean(d_BN) - n_BN * _mean(d_BN * n_BN)) * r_B1


def _mean(v_BN: jax.Array) -> jax.Array:
    """The mean of each row, `[B, 1]`, by halves: XLA's sum of a row has other bits where there are many rows."""
    sum_BN = v_BN
    while (N := sum_BN.shape[1]) > 1:
        sum_BN = jnp.pad(sum_BN, ((0, 0), (0, N % 2)))
        sum_BN = sum_BN[:, : (N + 1) // 2] + sum_BN[:, (N + 1) // 2 :]
    return sum_BN / v_BN.shape[1]
