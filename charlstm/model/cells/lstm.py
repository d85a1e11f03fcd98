"""The LSTM: the equations of PyTorch's nn.LSTM, and its hand-derived backward pass.

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997; the forget gate is that of
Gers, Schmidhuber and Cummins, Learning to Forget, Neural Computation 12(10), 2000.  Its variants are "plain" and
"capped", whose input gate lets in no more than was forgotten, as in Melis, Kočiský and Blunsom, Mogrifier LSTM, ICLR
2020 (arXiv:1909.01792).

Forward, symbol by symbol.  h⁻ and c⁻ are the state before the symbol, σ the logistic function, products of vectors are
elementwise; the gates lie along G = 4H in the order i f g o:

    z = x W_x                        the window's projection, one matmul for all its symbols
    a = z + s W_h + b                s = h⁻, or with state dropout h⁻ times the stream's mask; b = b_x + b_h
    i, f, o = σ(a_i), σ(a_f), σ(a_o)
    g = tanh(a_g)
    c = f c⁻ + i g                   capped: c = f c⁻ + k g with k = min(i, 1 - f)
    h = o tanh(c)

Backward, from the last symbol to the first.  dv is the gradient of the loss with respect to v.  dh is the sum of the
gradients from above (this symbol's output) and from the right (the next symbol's dh⁻); dc from the right is the next
symbol's dc⁻:

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

and, after the loop, dz = da, dW_h = Σ sᵀ da, db = Σ da, the sums over all symbols of all streams.  Where a stream is
reset, h⁻ = c⁻ = 0, and dh⁻ and dc⁻ are dropped.  The loops are in ops/scan.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.model import initializers
from charlstm.model.ops.scan import Matmul, SavedStates, WindowSums
from charlstm.types import CellParams, CellState, Gates

GATES = 4  # i f g o
MATRICES = (GATES,)
SAVED_OVER_Z = True


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
    it; its slice of b_h stays as drawn: zero, except with "pytorch" and "uniform".
    """
    params = initializers.layer(initializer, key, input_width, hidden_size, blocks, scale=scale)
    return params._replace(b_x=params.b_x.at[hidden_size : 2 * hidden_size].set(forget_bias))


def zero_state(batch: int, hidden_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> CellState:
    """The initial state: zeros, `[batch, hidden_size]` each."""
    return CellState(h=jnp.zeros((batch, hidden_size), dtype), c=jnp.zeros((batch, hidden_size), dtype))


def vectors(params: CellParams) -> jax.Array:
    """b, `[4H]`."""
    return params.b_x + params.b_h


def step_projected(
    params: CellParams, state: CellState, z_BG: jax.Array, variant: str = "plain", mask_BH: jax.Array | None = None
) -> tuple[CellState, Gates]:
    """One symbol of every stream, straight from the equations, given its projection: (the new state, its gates)."""
    h_masked = state.h if mask_BH is None else state.h * mask_BH
    return from_preactivations(z_BG + h_masked @ params.w_h + vectors(params)[None], state, variant)


def from_preactivations(a_BG: jax.Array, state: CellState, variant: str) -> tuple[CellState, Gates]:
    """(The new state, the gates), given the gates' preactivations a."""
    i, f, g, o = gates(a_BG)
    c = next_cell(i, f, g, state.c, variant)
    return CellState(o * jnp.tanh(c), c), {"i": i, "f": f, "g": g, "o": o}


def output(params: CellParams, o: jax.Array, c: jax.Array) -> jax.Array:
    """h, given the output gate and c."""
    return o * jnp.tanh(c)


def gates(a_BG: jax.Array) -> tuple[jax.Array, ...]:
    """i, f, g, o, given their preactivations."""
    a_i, a_f, a_g, a_o = jnp.split(a_BG, GATES, axis=1)
    return jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)


def next_cell(i: jax.Array, f: jax.Array, g: jax.Array, c_prev: jax.Array | None, variant: str) -> jax.Array:
    """c, given the gates and c⁻, all of one shape."""
    assert c_prev is not None
    return f * c_prev + (jnp.minimum(i, 1 - f) if variant == "capped" else i) * g


def forward(
    matmul: Matmul, b: jax.Array, prev: CellState, h_masked: jax.Array, z: jax.Array, variant: str
) -> tuple[CellState, jax.Array]:
    """The new state; and the gates side by side.  See `ops.scan.Cell`."""
    ifgo = fused_gates(z + b + matmul(h_masked))
    i, f, g, o = jnp.split(ifgo, GATES, axis=1)
    c = next_cell(i, f, g, prev.c, variant)
    return CellState(o * jnp.tanh(c), c), ifgo


def fused_gates(a_BG: jax.Array) -> jax.Array:
    """i f g o side by side, by one tanh for all of them: σ(a) = (1 + tanh(a / 2)) / 2."""
    half_BG = np.repeat(np.asarray([0.5, 0.5, 1.0, 0.5], a_BG.dtype), a_BG.shape[1] // GATES)[None]
    return jnp.tanh(a_BG * half_BG) * half_BG + (1 - half_BG)


def backward(
    matmul: Matmul, b: jax.Array, dh: jax.Array, dc: Any, states: SavedStates, saved: Sequence[jax.Array], variant: str
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    """Returns (ds, None, dc⁻, da): h⁻ has no gradient but through s.  See `ops.scan.Cell`."""
    das, dc_prev = gate_gradients(saved, states.c_prev, dh, dc, variant)
    da = jnp.concatenate(das, axis=1)
    return matmul(da), None, dc_prev, da


def gate_gradients(
    ifgo: Sequence[jax.Array], c_prev: jax.Array, dh: jax.Array, dc: jax.Array, variant: str
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Elementwise part of the backward step, before the matmul, on arrays of one shape: (da_i, da_f, da_g, da_o), dc⁻.

    `dh` is the sum of the gradients from above and from the right; `dc` is the one from the right.
    """
    i, f, g, o = ifgo
    k = jnp.minimum(i, 1 - f) if variant == "capped" else i
    tanh_c = jnp.tanh(f * c_prev + k * g)
    *das, dc_prev = input_gradients(i, f, g, c_prev, dc + dh * o * (1 - tanh_c * tanh_c), variant)
    return (*das, dh * tanh_c * o * (1 - o)), dc_prev


def input_gradients(
    i: jax.Array, f: jax.Array, g: jax.Array, c_prev: jax.Array, dc: jax.Array, variant: str
) -> tuple[jax.Array, ...]:
    """da_i, da_f, da_g, dc⁻, given the whole dc."""
    k = jnp.minimum(i, 1 - f) if variant == "capped" else i
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * k * (1 - g * g)
    if variant == "capped":
        at_the_cap = i > 1 - f
        da_i, da_f = jnp.where(at_the_cap, 0, da_i), jnp.where(at_the_cap, dc * (c_prev - g) * f * (1 - f), da_f)
    return da_i, da_f, da_g, dc * f


def parameter_gradients(sums: WindowSums, da_TBG: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dW_h, db and dz of a window."""
    return sums.outer_h_masked(da_TBG), sums.total(da_TBG), da_TBG
