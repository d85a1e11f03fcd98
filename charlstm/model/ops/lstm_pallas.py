"""A window of the LSTM on an NVIDIA GPU: at every symbol one product and one kernel.

The equations are those of lstm.py, and so is the reverse pass.  As XLA compiles the loop there, a symbol takes six
kernels and more beside its product, most of which last less than their launch, and read again what the one before
wrote.  Here Pallas makes one of all that follows the product forward, and of all that goes before it in reverse.  Of
Pallas' ways to a GPU it takes Mosaic, which needs a Hopper or newer, and units in multiples of THREADS.
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
from charlstm.types import CellState

WIDEST = 4  # neighbouring units that a thread has, at most
BLOCKS = 128  # about what a GPU runs at once: threads have fewer units each where there would be fewer blocks
UNROLL = 8  # symbols a turn of the loop, which costs a launch or two itself


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
    """As `lstm.recurrence`, in float32 and with operands of products in the compute dtype."""
    return _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH)[0]


def _forward(w_h, b, state, z_TBG, reset_TB, compute_dtype, variant, mask_BH):
    (T, B, _), H, dtype = z_TBG.shape, state.h.shape[1], state.h.dtype
    # A choice, not a product with 0: a NaN in the state of a stream that is reset must not survive.
    h_BH, c_BH = (jnp.where(reset_TB[0][:, None], 0, s_BH) for s_BH in state)
    seen_BH = (h_BH if mask_BH is None else h_BH * mask_BH).astype(compute_dtype)
    w_HG, given = w_h.astype(compute_dtype), (b.astype(dtype), _resets(reset_TB), *_given(mask_BH))
    after_product = _kernel(partial(_read, variant), B, H)

    def window(refs: Any) -> None:
        def forward(_: None, t: jax.Array) -> tuple[None, None]:
            a_BG = jnp.dot(refs[0][...], w_HG, preferred_element_type=dtype)
            after_product(t[None], a_BG, *given, *refs)
            return None, None

        jax.lax.scan(forward, None, jnp.arange(T, dtype=jnp.int32), unroll=UNROLL)

    # The gates take the place of the window's projection, in its dtype (see `_pack`).
    windows = z_TBG, jax.lax.empty((T, B, H), compute_dtype), jax.lax.empty((T, B, H), dtype)
    _, h_BH, c_BH, gates_TBG, h_TBH, c_prev_TBH = pl.run_state(window)((seen_BH, h_BH, c_BH, *windows))
    # Of z only the dtype is wanted later; an empty slice carries it.
    residuals = w_h, state.h, h_TBH, c_prev_TBH, gates_TBG, reset_TB, z_TBG[:0], mask_BH
    return (CellState(h_BH, c_BH), h_TBH), residuals


def _read(variant, block, t_ref, a, b, resets, *refs):
    """What follows the product of symbol t, forward, up to the operand of the next one."""
    *mask, seen_out, h_out, c_out, gates, h_seq, c_prev_seq = refs
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
    seen_out[row, units] = _unless(reset, h_masked).astype(seen_out.dtype)
    h_out[row, units] = h
    c_out[row, units] = _unless(reset, c)


def _logistic(a: jax.Array) -> jax.Array:
    return 0.5 * jnp.tanh(0.5 * a) + 0.5


def _pack(gate: jax.Array) -> jax.Array:
    """A logistic gate, or above 1/2 the gate less 1: in bfloat16, too, gate and 1 - gate both keep all their digits.

    The gradient by a gate's sum has the factor gate (1 - gate), and a forget gate is often so near 1 that it would
    round to 1 in bfloat16.
    """
    return jnp.where(gate > 0.5, jnp.minimum(gate - 1, -(2.0**-24)), gate)  # less than 0, which stands for itself


def _unpack(packed: jax.Array) -> jax.Array:
    """The gate that `_pack` was given."""
    return jnp.where(packed < 0, 1 + packed, packed)


def _reverse(compute_dtype, variant, residuals, cotangents):
    w_h, h_first, h_TBH, c_prev_TBH, gates_TBG, reset_TB, z_like, mask_BH = residuals
    dfinal, dh_TBH = cotangents
    (T, B, G), H, dtype = gates_TBG.shape, h_first.shape[1], h_first.dtype
    w_GH, given = w_h.astype(compute_dtype).T, (_resets(reset_TB), dh_TBH, gates_TBG, c_prev_TBH, *_given(mask_BH))
    before_product = _kernel(partial(_unread, variant, T), B, H)

    def window(refs: Any) -> None:
        *written, dh_ref = refs

        def backward(dh_BH: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            before_product(t[None], dh_BH, *given, *written)
            return jnp.dot(written[0][...], w_GH, preferred_element_type=dtype), None

        symbols = jnp.arange(T, dtype=jnp.int32)
        dh_ref[...], _ = jax.lax.scan(backward, dh_ref[...], symbols, reverse=True, unroll=UNROLL)

    da_BG, da_TBG = jax.lax.empty((B, G), compute_dtype), jax.lax.empty((T, B, G), z_like.dtype)
    _, dc_BH, da_TBG, dh_BH = pl.run_state(window)((da_BG, dfinal.c, da_TBG, dfinal.h))
    dh_BH = dh_BH if mask_BH is None else dh_BH * mask_BH
    dfirst = CellState(jnp.where(reset_TB[0][:, None], 0, dh_BH), dc_BH)
    weights = lstm.parameter_gradients(w_h, h_first, h_TBH, da_TBG, reset_TB, compute_dtype, mask_BH)
    return *weights, dfirst, da_TBG, None, None


recurrence.defvjp(_forward, _reverse)


def _unread(variant, T, block, t_ref, dh_right, resets, dh_above, gates, c_prev_seq, *refs):
    """What goes before the product of symbol t in reverse; `dh_right` is the one of symbol t + 1, as it came out."""
    *mask, da_out, dc_out, da_seq = refs
    t, (row, units, columns) = t_ref[0], block
    dh = dh_right[row, units]
    if mask:  # what comes from the window's end was not masked
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
    """`jnp.where` of a scalar condition, which Mosaic does not spread by itself."""
    return jnp.where(jnp.broadcast_to(condition, a.shape), a, b)


def _kernel(body: Callable[..., None], B: int, H: int) -> Callable[..., Any]:
    """A block of threads for some units of one stream; `body` is told which, and writes what it is given in place."""
    width = next(w for w in (WIDEST, 2, 1) if H % (THREADS * w) == 0 and (BLOCKS * THREADS * w <= B * H or w == 1))

    def of_block(*refs: Any) -> None:
        row, first = jax.lax.axis_index("row"), jax.lax.axis_index("units") * THREADS * width
        units, *columns = (pl.ds(first + k * H, THREADS * width) for k in (0, *range(GATES)))
        body((row, units, columns), *refs)

    return jax.jit(plgpu.kernel(of_block, grid=(B, H // (THREADS * width)), grid_names=("row", "units")))


def _resets(reset_TB: jax.Array) -> jax.Array:
    """int32 [T + 1, B]: none comes after the window."""
    return jnp.pad(reset_TB.astype(jnp.int32), ((0, 1), (0, 0)))


def _given(mask_BH: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if mask_BH is None else (mask_BH,)
