"""A recurrent layer: initialization and forward pass (hand-derived VJP where available, else autodiff).

    w_h = gain w_h / |w_h|                           weight norm, of each column: Salimans & Kingma 2016, equation 2
    h, c <- first, where a stream is reset           zeros, or trained
    s = m h                                          state dropout, m the same at all symbols: Gal & Ghahramani 2016
    x, s <- mogrifier(x, s)                          cells/mogrifier.py
    h', c' = cell(x, s, c)
    h <- renewed h' + (1 - renewed) h, c likewise    zoneout, renewed 0 or 1 for each unit, stream and symbol

Zoneout is that of Krueger et al., Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations, ICLR 2017
(arXiv:1606.01305), section 3.2.  Evaluation and sampling use the mean of renewed in its place.  The autodiff path
(ops/autodiff_scan.py) serves zoneout, the mogrifier and a trained initial state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from charlstm.config.model import ModelConfig
from charlstm.model.cells import gru, layer_norm_lstm, lstm, mlstm, mogrifier, rnn
from charlstm.model.dropout import DropoutKey, keep_mask, row_mask
from charlstm.model.ops import autodiff_scan, compiler, scan
from charlstm.types import CellParams, CellState, Gates

Held = tuple[tuple[str, int, float], ...]  # (h or c, unit, its value)

CELLS: dict[str, Any] = {
    "lstm": lstm,
    "gru": gru,
    "rnn": rnn,
    "mlstm": mlstm,
    "layer_norm_lstm": layer_norm_lstm,
}


def init(config: ModelConfig, key: jax.Array, input_width: int, hidden_size: int) -> CellParams:
    """Parameters of one layer, float32."""
    cell, drawn_by = CELLS[config.cell], (config.initializer, config.init_scale)
    params = cell.init(key, input_width, hidden_size, *drawn_by, config.forget_bias)
    if config.weight_norm:  # the gains start at the column norms, so the weights start as drawn
        params = params._replace(gain=_column_norms(params.w_h))
    if config.train_initial_state:
        params = params._replace(first=jax.tree.map(lambda s_BH: s_BH[0], cell.zero_state(1, hidden_size)))
    if config.mogrifier_rounds:
        sizes = (input_width, hidden_size, config.mogrifier_rounds, config.mogrifier_rank)
        params = params._replace(rounds=mogrifier.init(key, *sizes, *drawn_by))
    return params


def recurrent_weights(params: CellParams) -> jax.Array:
    """Returns w_h with weight norm applied."""
    if params.gain is None:
        return params.w_h
    return _weight_norm(params.w_h, params.gain)


@jax.custom_vjp
def _weight_norm(w_HG: jax.Array, gain_G: jax.Array) -> jax.Array:
    return w_HG * (gain_G / _column_norms(w_HG))[None]


def _weight_norm_forward(w_HG: jax.Array, gain_G: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _weight_norm(w_HG, gain_G), (w_HG, gain_G)


def _weight_norm_backward(saved: tuple[jax.Array, jax.Array], d_HG: jax.Array) -> tuple[jax.Array, jax.Array]:
    w_HG, gain_G = saved
    norm_G, d_HG = _column_norms(w_HG), _rounded(d_HG, w_HG)
    direction_HG = w_HG * (1 / norm_G)[None]
    dgain_G = _rounded(d_HG * direction_HG, d_HG).sum(0)
    return (d_HG - _rounded(direction_HG * dgain_G[None], direction_HG)) * (gain_G / norm_G)[None], dgain_G


_weight_norm.defvjp(_weight_norm_forward, _weight_norm_backward)


@compiler.jit
def _column_norms(w_HG: jax.Array) -> jax.Array:
    squares_G = _rounded(w_HG * w_HG, w_HG).sum(0)
    return _rounded(jnp.sqrt(squares_G), squares_G)


def _rounded(x: jax.Array, of: jax.Array) -> jax.Array:
    # Changes no value where x is NaN if `of` is.  XLA simplifies some programs more than others, and the same bits are
    # wanted on any number of devices: a product is not contracted with an addition, nor a root divided by as rsqrt.
    # For the same reason there are no quotients of quotients above, and none by a broadcast.
    return jnp.where(jnp.isnan(of), of, x)


def apply(
    config: ModelConfig,
    params: CellParams,
    state: CellState,
    inputs_TBX: jax.Array,
    reset_TB: jax.Array,
    dropout_key: DropoutKey | None,
    number: int,
    compute_dtype: jax.typing.DTypeLike,
) -> tuple[CellState, jax.Array]:
    """Runs a window of every stream through the layer.

    Args:
      params: with w_h from `recurrent_weights`.
      inputs_TBX: x W_x, or x itself for a mogrifier (`takes_raw_input`).
      dropout_key: None for no dropout.
      number: of the layer, in the names of its masks.

    Returns:
      The state after the window, and h_TBH in the compute dtype.
    """
    T, H, mask_BH = len(inputs_TBX), state.h.shape[1], None
    if dropout_key is not None and config.state_dropout:
        mask_BH = row_mask(dropout_key, config.state_dropout, f"state_dropout.{number}", H, state.h.dtype)
    if config.has_custom_vjp:
        cell = CELLS[config.cell]
        recurrence: Callable[..., tuple[CellState, jax.Array]] = partial(scan.recurrence, cell)
        if config.lstm_backend == "fused":
            from charlstm.model.ops import lstm_pallas  # takes a third of a second to import, and few machines use it

            recurrence = lstm_pallas.recurrence
        vectors = cell.vectors(params)
        return recurrence(params.w_h, vectors, state, inputs_TBX, reset_TB, compute_dtype, config.variant, mask_BH)

    def renewed(rate: float, name: str) -> jax.Array | None:
        if dropout_key is None or not rate:
            return None
        return keep_mask(dropout_key, rate, f"{name}.{number}", (T, H)).swapaxes(0, 1)

    masks = (renewed(config.zoneout, "zoneout"), renewed(config.zoneout_cell, "zoneout_cell"))
    inside: Any = params._replace(gain=None)
    inside = inside if config.mogrifier_rounds else inside._replace(w_x=None)  # which was applied before
    inputs = inputs_TBX, reset_TB, masks, None
    return autodiff_scan.recurrence(_step(config), inside, mask_BH, state, inputs, compute_dtype)


def trace(
    config: ModelConfig,
    params: CellParams,
    state: CellState,
    inputs_TBX: jax.Array,
    reset_TB: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    held: Held = (),
    scale_TB: jax.Array | None = None,
    with_gates: bool = True,
) -> tuple[CellState, Gates]:
    """Runs a window as `apply` without dropout: (the state after it, "h", "c" if any, and gates by name, `[T, B, H]`).

    Args:
      held: units whose state is replaced after each symbol, before anything reads it.
      scale_TB: factors of the input as the gates see it: of its projection, after the normalization where there is one.
      with_gates: False takes the step of `apply`, which is faster and does not give them; nothing can be held or scaled
        then.
    """
    if not with_gates and config.has_custom_vjp:
        cell, window = CELLS[config.cell], (inputs_TBX, reset_TB, compute_dtype, config.variant)
        state, states = scan.states(cell, params.w_h, cell.vectors(params), state, *window)
        return state, _named(states)
    inside: Any = params._replace(gain=None)
    inside = inside if config.mogrifier_rounds else inside._replace(w_x=None)  # which was applied before
    inputs = inputs_TBX, reset_TB, (None, None), scale_TB
    state, (states, gates) = autodiff_scan.trace(_step(config, held), inside, state, inputs, compute_dtype)
    return state, _named(states) | gates


def _named(states: CellState) -> Gates:
    return {name: array for name, array in states._asdict().items() if array is not None}


def _step(config: ModelConfig, held: Held = ()) -> autodiff_scan.Step:
    """Returns the step of one symbol, straight from the equations."""
    cell = CELLS[config.cell]

    def hold(array: Any, name: str) -> Any:
        for which, unit, value in held:
            array = array.at[:, unit].set(value) if which == name else array
        return array

    def step(params: Any, mask_BH: Any, state: CellState, symbol: Any) -> tuple[CellState, Gates]:
        x_BX, reset_B, (renewed_h, renewed_c), scale_B = symbol
        first = jax.tree.map(lambda s_BH: jnp.zeros_like(s_BH[0]), state) if params.first is None else params.first
        # `where`, not a product with 0: 0 times NaN is NaN, so a NaN would survive the reset.
        state = jax.tree.map(lambda f_H, s_BH: jnp.where(reset_B[:, None], f_H[None], s_BH), first, state)
        x_BX = x_BX.astype(state.h.dtype)
        if scale_B is not None:
            x_BX, params = _scaled(params, x_BX, scale_B[:, None])
        if params.rounds is None:
            new, gates = cell.step_projected(params, state, x_BX, config.variant, mask_BH)
        else:
            h_masked = state.h if mask_BH is None else state.h * mask_BH
            x_BX, h_masked = mogrifier.gate(params.rounds, x_BX, h_masked)
            masked = state._replace(h=h_masked)
            new, gates = cell.step_projected(params, masked, x_BX @ params.w_x, config.variant)
        if any(name == "c" for name, _, _ in held):
            c = hold(new.c, "c")
            new = CellState(cell.output(params, gates["o"], c), c)
        h = _zoned_out(new.h, state.h, config.zoneout, renewed_h)
        c = None if new.c is None else _zoned_out(new.c, state.c, config.zoneout_cell, renewed_c)
        return CellState(hold(h, "h"), None if c is None else hold(c, "c")), gates

    return step


def _scaled(params: CellParams, x_BX: jax.Array, scale_B1: jax.Array) -> tuple[jax.Array, CellParams]:
    """Returns the input times a factor, and parameters that keep the factor where the projection is normalized.

    N(s z) = N(z): the layer-normalized cell takes the factor in the gain of N(z).  Its x, too, where a mogrifier has x
    scale h.
    """
    if params.norms is None:
        return scale_B1 * x_BX, params
    gain_x = scale_B1 * params.norms.gain_x[None]
    params = params._replace(norms=params.norms._replace(gain_x=gain_x))
    return (x_BX if params.rounds is None else scale_B1 * x_BX), params


def _zoned_out(new: jax.Array, old: Any, rate: float, renewed: jax.Array | None) -> jax.Array:
    if not rate:
        return new
    return rate * old + (1 - rate) * new if renewed is None else jnp.where(renewed, new, old)
