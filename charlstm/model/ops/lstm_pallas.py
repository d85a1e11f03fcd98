"""The LSTM's loop over a window on an NVIDIA GPU: one matmul and one kernel per symbol.

The equations and the backward pass are those of lstm.py.  Compiled by XLA, a symbol takes six kernels or more beside
its matmul; most last less than their launch and read again what the one before wrote.  Here Pallas makes one kernel of
all that follows the matmul in the forward pass, and one of all that precedes it in the backward pass.  The backend of
Pallas is Mosaic, which needs a Hopper or newer, and units in multiples of THREADS.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from charlstm.config.model import FUSED_UNITS as THREADS  # of a block, in Mosaic
from charlstm.model.cells import lstm
from charlstm.model.cells.lstm import GATES
from charlstm.model.ops.scan import WindowSums, zero_where
from charlstm.types import CellState

WIDEST = 4  # neighboring units of a thread, at most
BLOCKS = 128  # about as many as a GPU runs at once: threads get fewer units each if there would be fewer blocks
UNROLL = 8  # symbols per iteration of the loop, which costs a launch or two itself


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
    """Runs a window as `scan.recurrence` of `lstm`: float32, with matmul operands in the compute dtype."""
    return _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH)[0]


def _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH):
    (T, B, _), H, dtype = z_TBG.shape, state.h.shape[1], state.h.dtype
    h_BH, c_BH = zero_where(reset_TB[0], state)
    h_masked_BH = (h_BH if mask_BH is None else h_BH * mask_BH).astype(compute_dtype)
    w_HG, given = w_h.astype(compute_dtype), (b.astype(dtype), _resets(reset_TB), *_given(mask_BH))
    after_matmul = _kernel(partial(_after_matmul, variant), B, H)

    def window(refs: Any) -> None:
        def forward(_: None, t: jax.Array) -> tuple[None, None]:
            a_BG = jnp.dot(refs[0][...], w_HG, preferred_element_type=dtype)
            after_matmul(t[None], a_BG, *given, *refs)
            return None, None

        jax.lax.scan(forward, None, jnp.arange(T, dtype=jnp.int32), unroll=UNROLL)

    # The gates are stored in place of the window's projection, in its dtype (see `_pack`).
    windows = z_TBG, jax.lax.empty((T, B, H), compute_dtype), jax.lax.empty((T, B, H), dtype)
    _, h_BH, c_BH, gates_TBG, h_TBH, c_prev_TBH = pl.run_state(window)((h_masked_BH, h_BH, c_BH, *windows))
    # Of z only the dtype is needed later; an empty slice carries it.
    residuals = w_h, state.h, h_TBH, c_prev_TBH, gates_TBG, reset_TB, z_TBG[:0], mask_BH
    return (CellState(h_BH, c_BH), h_TBH), residuals


def _after_matmul(variant, block, t_ref, a, b, resets, *refs):
    """Elementwise part of the forward step at t, after the recurrent matmul, up to the next one's operand."""
    *mask, h_masked_out, h_out, c_out, gates, h_seq, c_prev_seq = refs
    t, (row, units, columns) = t_ref[0], block
    a_i, a_f, a_g, a_o = (a[row, k] + gates[t, row, k].astype(a.dtype) + b[k] for k in columns)
    i, f, g, o = _logistic(a_i), _logistic(a_f), jnp.tanh(a_g), _logistic(a_o)
    c_prev = c_out[row, units]
    c = lstm.next_cell(i, f, g, c_prev, variant)
    h = o * jnp.tanh(c)
    for k, gate in zip(columns, (_pack(i), _pack(f), g, _pack(o)), strict=True):
        gates[t, row, k] = gate.astype(gates.dtype)
    c_prev_seq[t, row, units] = c_prev
    h_seq[t, row, units] = h.astype(h_seq.dtype)
    reset = resets[t + 1, row]
    h_masked = h * mask[0][row, units] if mask else h
    h_masked_out[row, units] = _unless(reset, h_masked).astype(h_masked_out.dtype)
    h_out[row, units] = h
    c_out[row, units] = _unless(reset, c)


def _logistic(a: jax.Array) -> jax.Array:
    return 0.5 * jnp.tanh(0.5 * a) + 0.5


def _pack(gate: jax.Array) -> jax.Array:
    """Returns a logistic gate, or above 1/2 the gate less 1: even in bfloat16, gate and 1 - gate keep all their digits.

    The gradient of a gate's preactivation has the factor gate (1 - gate), and a forget gate near 1 would often round to
    1 in bfloat16.
    """
    return jnp.where(gate > 0.5, jnp.minimum(gate - 1, -(2.0**-24)), gate)  # less than 0, which stands for itself


def _unpack(packed: jax.Array) -> jax.Array:
    """Inverts `_pack`."""
    return jnp.where(packed < 0, 1 + packed, packed)


def _backward(compute_dtype, variant, residuals, cotangents):
    w_h, h_first, h_TBH, c_prev_TBH, gates_TBG, reset_TB, z_like, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    (T, B, G), H, dtype = gates_TBG.shape, h_first.shape[1], h_first.dtype
    w_GH, given = w_h.astype(compute_dtype).T, (_resets(reset_TB), dh_TBH, gates_TBG, c_prev_TBH, *_given(mask_BH))
    before_matmul = _kernel(partial(_before_matmul, variant, T), B, H)

    def window(refs: Any) -> None:
        *written, dh_ref = refs

        def backward(dh_BH: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            before_matmul(t[None], dh_BH, *given, *written)
            return jnp.dot(written[0][...], w_GH, preferred_element_type=dtype), None

        symbols = jnp.arange(T, dtype=jnp.int32)
        dh_ref[...], _ = jax.lax.scan(backward, dh_ref[...], symbols, reverse=True, unroll=UNROLL)

    da_BG, da_TBG = jax.lax.empty((B, G), compute_dtype), jax.lax.empty((T, B, G), z_like.dtype)
    _, dc_BH, da_TBG, dh_BH = pl.run_state(window)((da_BG, dfinal.c, da_TBG, dfinal.h))
    dh_BH = dh_BH if mask_BH is None else dh_BH * mask_BH
    dfirst = CellState(jnp.where(reset_TB[0][:, None], 0, dh_BH), dc_BH)
    sums = WindowSums(h_first, h_TBH, reset_TB, mask_BH, compute_dtype)
    dw_h, db, dz_TBG = lstm.parameter_gradients(sums, da_TBG)
    return dw_h.astype(w_h.dtype), db.astype(w_h.dtype), dfirst, dz_TBG, None, None


recurrence.defvjp(_forward, _backward)


def _before_matmul(variant, T, block, t_ref, dh_right, resets, dh_above, gates, c_prev_seq, *refs):
    """Elementwise part of the backward step at t, before the recurrent matmul.  `dh_right`: gradient from step t+1."""
    *mask, da_out, dc_out, da_seq = refs
    t, (row, units, columns) = t_ref[0], block
    dh = dh_right[row, units]
    if mask:  # the gradient from the window's end was not masked
        dh = _where(t == T - 1, dh, dh * mask[0][row, units])
    dh = _unless(resets[t + 1, row], dh) + dh_above[t, row, units].astype(dh.dtype)
    i, f, g, o = (gates[t, row, k].astype(dh.dtype) for k in columns)
    i_f_g_o = _unpack(i), _unpack(f), g, _unpack(o)
    das, dc_prev = lstm.gate_gradients(i_f_g_o, c_prev_seq[t, row, units], dh, dc_out[row, units], variant)
    for k, da in zip(columns, das, strict=True):
        da_seq[t, row, k] = da.astype(da_seq.dtype)
        da_out[row, k] = da.astype(da_out.dtype)
    dc_out[row, units] = _unless(resets[t, row], dc_prev)


def _unless(reset: jax.Array, a: jax.Array) -> jax.Array:
    return _where(reset != 0, jnp.zeros_like(a), a)


def _where(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.where` of a scalar condition, which Mosaic does not broadcast by itself."""
    return jnp.where(jnp.broadcast_to(condition, a.shape), a, b)


def _kernel(body: Callable[..., None], B: int, H: int) -> Callable[..., Any]:
    """Makes a kernel of `body`, which gets the stream and the units of its block of threads, and writes in place."""
    width = next(w for w in (WIDEST, 2, 1) if H % (THREADS * w) == 0 and (BLOCKS * THREADS * w <= B * H or w == 1))

    def of_block(*refs: Any) -> None:
        row, first = jax.lax.axis_index("row"), jax.lax.axis_index("units") * THREADS * width
        units, *columns = (pl.ds(first + k * H, THREADS * width) for k in (0, *range(GATES)))
        body((row, units, columns), *refs)

    return jax.jit(plgpu.kernel(of_block, grid=(B, H // (THREADS * width)), grid_names=("row", "units")))


def _resets(reset_TB: jax.Array) -> jax.Array:
    """int32 [T + 1, B]; no reset after the window."""
    return jnp.pad(reset_TB.astype(jnp.int32), ((0, 1), (0, 0)))


def _given(mask_BH: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if mask_BH is None else (mask_BH,)
