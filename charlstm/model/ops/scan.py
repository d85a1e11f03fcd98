"""The loop over the symbols of a window and its custom VJP: one for every cell with a hand-derived backward step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.model.ops.matmul import bias_gradient, recurrent_matmul, recurrent_weight_gradient, weight_gradient
from charlstm.types import CellState

Matmul = Callable[..., jax.Array]  # (x, index of W, default 0) -> x W; in the backward pass x Wᵀ


class SavedStates(NamedTuple):
    """States that `backward` gets for one symbol: c⁻ if the cell has a c, else h⁻ and h.  The others are None."""

    h_prev: Any  # [B, H] each
    h: Any
    c_prev: Any


class WindowSums(NamedTuple):
    """Sums over all symbols of all streams, in the state's dtype, for the gradients of the parameters."""

    h_first_BH: jax.Array  # before the window
    h_TBH: jax.Array
    reset_TB: jax.Array
    mask_BH: jax.Array | None
    compute_dtype: jax.typing.DTypeLike

    def outer_h_masked(self, d_TBK: jax.Array) -> jax.Array:
        """Σ sᵀ d, `[H, K]`, with s the `h_masked` of each symbol."""
        return recurrent_weight_gradient(*self[:4], d_TBK, self.compute_dtype)

    def outer(self, x_TBH: jax.Array, d_TBK: jax.Array) -> jax.Array:
        """Σ xᵀ d, `[H, K]`."""
        return weight_gradient(x_TBH, d_TBK, self.compute_dtype, self.h_first_BH.dtype)

    def total(self, d_TBK: jax.Array) -> jax.Array:
        """Σ d, `[K]`."""
        return bias_gradient(d_TBK, self.h_first_BH.dtype)


class Cell(Protocol):
    """A cell's equations for one symbol of every stream, as the modules of `cells` give them."""

    GATES: int
    MATRICES: tuple[int, ...]  # columns, in units of H, of each of the recurrent matrices side by side in W_h
    SAVED_OVER_Z: bool  # `saved` is one array [B, G], stored in place of z; `backward` gets it split into gates

    def forward(
        self, matmul: Matmul, vectors: Any, prev: CellState, h_masked: jax.Array, z: jax.Array, variant: str
    ) -> tuple[CellState, Any]:
        """Returns the new state, and `saved`, a tree of arrays for `backward`.

        Args:
          vectors: the parameters that are no matrices, `[1, .]` each: one bias, but for the layer-normalized LSTM.
          prev: the state before the symbol, zero if the stream is reset.
          h_masked: prev.h, with state dropout times the mask.
          z: the symbol's projection x W_x.
        """

    def backward(
        self, matmul: Matmul, vectors: Any, dh: jax.Array, dc: Any, states: SavedStates, saved: Any, variant: str
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, Any]:
        """Returns the gradients of h_masked, of prev.h by other paths (None: there are none), of prev.c, and a tree for
        `parameter_gradients`.

        Args:
          vectors: as of `forward`.
          dh: the gradient of the new h, from this symbol's output and from the next symbol together.
          dc: the gradient of the new c from the next symbol; None without a c.
        """

    def parameter_gradients(self, sums: WindowSums, gradients: Any) -> tuple[jax.Array, Any, jax.Array]:
        """Returns the gradients of w_h, vectors and z, given those that `backward` returned, of the whole window."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def recurrence(
    cell: Cell,
    w_h: jax.Array,
    vectors: Any,
    state: CellState,
    z_TBG: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    variant: str = "",
    mask_BH: jax.Array | None = None,
) -> tuple[CellState, jax.Array]:
    """Runs a window of every stream through a cell, given its projection, with the cell's hand-derived backward pass.

    Args:
      cell: static.
      w_h, vectors: the parameters `[H, .]`, and the cell's `vectors(params)`; all gradients have the dtype of w_h.
      state: before the window, `[B, H]` each; its dtype is that of the elementwise arithmetic and of matmuls' sums.
      z_TBG: x W_x.
      reset_TB: bool; where True, the stream's state is zero before the symbol is read.
      compute_dtype: of the operands of matmuls with w_h, and of the outputs; static.
      variant: of the cell's equations; "" for the first.  Static.
      mask_BH: state dropout: matmuls with w_h see this times h⁻; None for h⁻ itself.

    Returns:
      The state after the window, and h_TBH.
    """
    return _forward(cell, w_h, vectors, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH)[0]


def _forward(cell, w_h, vectors, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH):
    dtype = state.h.dtype
    matmul, rows = _matmuls(cell, w_h, compute_dtype, dtype), _rows(vectors, dtype)
    h_dtype = dtype if state.c is None else compute_dtype  # without a c, `backward` reads h: in full precision

    def step(carry, symbol):
        (state, saved_TBG), (t, z_BG, reset_B) = carry, symbol
        prev = zero_where(reset_B, state)
        h_masked = prev.h if mask_BH is None else prev.h * mask_BH
        if cell.SAVED_OVER_Z:
            z_BG = jax.lax.dynamic_index_in_dim(saved_TBG, t, keepdims=False)
        new, saved = cell.forward(matmul, rows, prev, h_masked, z_BG.astype(dtype), variant)
        if cell.SAVED_OVER_Z:
            saved_TBG, saved = jax.lax.dynamic_update_index_in_dim(saved_TBG, saved, t, 0), None
        return (new, saved_TBG), (new.h.astype(h_dtype), prev.c, saved)

    # Overwrites z with the saved gates, symbol by symbol, which needs one array [T, B, G] less.
    start, z = ((state, z_TBG.astype(dtype)), None) if cell.SAVED_OVER_Z else ((state, None), z_TBG)
    (final, over_z), (h_TBH, c_prev_TBH, saved) = scan(step, start, (jnp.arange(len(z_TBG)), z, reset_TB))
    saved = over_z if cell.SAVED_OVER_Z else saved
    # The backward pass needs only the dtype of z.  An empty slice carries it, so z itself need not be saved.
    residuals = w_h, vectors, state.h, h_TBH, c_prev_TBH, saved, reset_TB, z_TBG[:0], mask_BH
    return (final, h_TBH.astype(compute_dtype)), residuals


def _backward(cell, compute_dtype, variant, residuals, cotangents):
    w_h, vectors, h_first, h_TBH, c_prev_TBH, saved_TB, reset_TB, z_like, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    dtype, T = h_first.dtype, len(reset_TB)
    matmul, rows = _matmuls(cell, w_h, compute_dtype, dtype, transpose=True), _rows(vectors, dtype)
    states = SavedStates(None, None, c_prev_TBH)
    if c_prev_TBH is None:
        h_prev_TBH = jnp.where(reset_TB[:, :, None], 0, jnp.concatenate([h_first[None], h_TBH[:-1]]))
        states = SavedStates(h_prev_TBH, h_TBH, None)

    def stored(d):  # sums over the streams as they are
        return d.astype(z_like.dtype) if d.ndim == 2 else d

    def step(dstate, symbol):
        dh_above, states, saved, reset_B = symbol
        dh = dh_above.astype(dtype) + dstate.h
        saved = blocks_at(saved_TB, saved, cell.GATES) if cell.SAVED_OVER_Z else saved
        dh_masked, dh_direct, dc_prev, gradients = cell.backward(matmul, rows, dh, dstate.c, states, saved, variant)
        dh_prev = dh_masked if mask_BH is None else dh_masked * mask_BH
        dprev = CellState(dh_prev if dh_direct is None else dh_direct + dh_prev, dc_prev)
        return zero_where(reset_B, dprev), jax.tree.map(stored, gradients)

    symbols = dh_TBH, states, jnp.arange(T) if cell.SAVED_OVER_Z else saved_TB, reset_TB
    dfirst, gradients = scan(step, dfinal, symbols, reverse=True)
    sums = WindowSums(h_first, h_TBH, reset_TB, mask_BH, compute_dtype)
    gradients = cell.parameter_gradients(sums, gradients)
    dw_h, dvectors = jax.tree.map(lambda d: d.astype(w_h.dtype), gradients[:2])
    return dw_h, dvectors, dfirst, gradients[2], None, None


recurrence.defvjp(_forward, _backward)


def states(
    cell: Cell,
    w_h: jax.Array,
    vectors: Any,
    state: CellState,
    z_TBG: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    variant: str = "",
) -> tuple[CellState, CellState]:
    """Runs a window as `recurrence`: (the state after it, the state after every symbol, `[T, B, H]` each).  No VJP."""
    matmul, rows = _matmuls(cell, w_h, compute_dtype, state.h.dtype), _rows(vectors, state.h.dtype)

    def step(state, symbol):
        z_BG, reset_B = symbol
        prev = zero_where(reset_B, state)
        new, _ = cell.forward(matmul, rows, prev, prev.h, z_BG.astype(prev.h.dtype), variant)
        return new, new

    return scan(step, state, (z_TBG, reset_TB))


def zero_where(reset_B: jax.Array, state: CellState) -> CellState:
    """Zeroes the rows of streams that are reset.  Uses `where`, since 0 times NaN is NaN."""
    return jax.tree.map(lambda s_BH: jnp.where(reset_B[:, None], 0, s_BH), state)


def _rows(vectors, dtype):
    return jax.tree.map(lambda v: v.astype(dtype)[None], vectors)


def _matmuls(cell, w_h, compute_dtype, dtype, transpose=False) -> Matmul:
    ends = np.cumsum(cell.MATRICES)[:-1] * len(w_h)
    each = [recurrent_matmul(w, compute_dtype, dtype, transpose=transpose) for w in jnp.split(w_h, ends, axis=1)]
    return lambda x, number=0: each[number](x)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, symbols: Any, reverse: bool = False
) -> tuple[Any, Any]:
    """Runs `jax.lax.scan(step, start, symbols, reverse=reverse)`; not for autodiff.

    Outputs in bfloat16 are stacked as integers of their bits: to write those of one symbol, XLA:CPU would convert those
    of all symbols to float32 and back, so that a window's time would grow with the square of its length.
    """
    dtypes: list[Any] = []

    def with_bits(carry: Any, symbol: Any) -> tuple[Any, Any]:
        carry, outputs = step(carry, symbol)
        dtypes[:] = [leaf.dtype for leaf in jax.tree.leaves(outputs)]
        return carry, jax.tree.map(_bits, outputs)

    final, stacked = jax.lax.scan(with_bits, start, symbols, reverse=reverse)
    leaves, tree = jax.tree.flatten(stacked)
    outputs = [jax.lax.bitcast_convert_type(a, d) if a.dtype != d else a for a, d in zip(leaves, dtypes, strict=True)]
    return final, jax.tree.unflatten(tree, outputs)


def blocks_at(array_TBG: jax.Array, t: jax.Array, count: int) -> list[jax.Array]:
    """Returns the `count` blocks side by side at symbol t of a window, `[B, G / count]` each.

    Each block is sliced from `array_TBG` directly.  Slices of one common slice are slow in a loop on XLA:CPU: it
    recomputes their offsets for every element, and does not vectorize.
    """
    _, B, G = array_TBG.shape
    H = G // count
    return [jax.lax.dynamic_slice(array_TBG, (t, 0, k * H), (1, B, H))[0] for k in range(count)]


def _bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array
