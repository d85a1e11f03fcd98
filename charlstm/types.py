"""The named tuples of arrays: everything that changes in training.  Settings, which do not, are in config/.

Letters: B streams in the batch, T symbols in a window, V symbols in the vocabulary, E embedding width, D layer input
width, H hidden width, G gate width (4H for an LSTM, 3H for a GRU, H for a plain RNN), L layers.
"""

from typing import Any, NamedTuple

import jax


class CellState(NamedTuple):
    """State that a layer carries from symbol to symbol; float32 whatever the compute dtype, or float64 on request."""

    h: jax.Array  # [B, H] hidden state
    c: jax.Array | None  # [B, H] cell state of an LSTM or mLSTM; None for the GRU and the plain RNN


class MogrifierRound(NamedTuple):
    """Parameters of one round of the mogrifier, which scales x [D] by h [H], or h by x: J is one width, K the other."""

    left: jax.Array  # [J, K], or [J, rank]
    right: jax.Array | None  # [rank, K]; None where `left` is the full matrix
    bias: jax.Array  # [K]


class LayerNorms(NamedTuple):
    """Extra parameters of the layer-normalized LSTM."""

    gain_x: jax.Array  # [G]
    gain_h: jax.Array  # [G]
    gain_c: jax.Array  # [H]
    b_c: jax.Array  # [H]


Gates = dict[str, jax.Array]  # name, such as "i" -> [B, H], after its nonlinearity


class CellParams(NamedTuple):
    """Parameters of one recurrent layer.  The gates lie side by side along G, in the order the cell's file gives."""

    w_x: jax.Array  # [D, G] input to gates; of the mLSTM [D, 5H], to gates and factor, as w_h
    w_h: jax.Array  # [H, G] previous hidden state to gates
    b_x: jax.Array  # [G]
    b_h: jax.Array  # [G] added on the recurrent side, as in PyTorch and char-rnn
    gain: jax.Array | None = None  # [G] weight norm: norms of w_h's columns; w_h itself gives only directions
    first: CellState | None = None  # h [H] and c [H] before anything was read, where they are trained
    rounds: tuple[MogrifierRound, ...] | None = None
    norms: LayerNorms | None = None


class ModelParams(NamedTuple):
    """Parameters of the language model."""

    embedding: jax.Array | None  # [V, E]; None for one-hot input
    cells: tuple[CellParams, ...]  # L layers, first to last
    w_out: jax.Array | None  # [H, V]; None where tied to the embedding
    b_out: jax.Array  # [V]


RecurrentState = tuple[CellState, ...]  # L layers, first to last


class DivergenceState(NamedTuple):
    """Data position and divergence-handling counters; replicated.  A resumed run continues them."""

    next_window: jax.Array  # int32 []: window that every stream reads next: `step` plus those skipped by rollbacks
    loss_ema: jax.Array  # float32 []: moving average of the loss of accepted updates, nats; 0 before the first
    skipped: jax.Array  # int32 []: updates that were skipped
    consecutive_skips: jax.Array  # int32 []: updates skipped since the last accepted one
    state_resets: jax.Array  # int32 []: non-finite rows of recurrent state that were reset
    rollbacks: jax.Array  # int32 []: how often the run rolled back


class PlateauState(NamedTuple):
    """State of the validation-driven schedule: best score, patience, LR drop, averaging count; replicated."""

    evaluations: jax.Array  # int32 []: scores so far
    best: jax.Array  # float32 []: the lowest of them, bits per symbol; inf before the first
    patience_count: jax.Array  # int32 []: scores since the lowest
    dropped: jax.Array  # bool []: --schedule=plateau has lowered the rate
    averaged: jax.Array  # int32 []: how many values of the parameters are averaged; 0 before (training/averaging.py)


class TrainState(NamedTuple):
    """Everything that changes in training.  A checkpoint is this and nothing less."""

    step: jax.Array  # int32 []: updates made, or skipped
    params: ModelParams  # replicated
    opt_state: Any  # replicated
    recurrent_state: RecurrentState  # split over devices by stream
    divergence: DivergenceState  # replicated
    plateau: PlateauState  # replicated
    average: ModelParams | tuple[()]  # of the parameters, replicated; () where none is kept


class Metrics(NamedTuple):
    """Measurements of one training step."""

    loss: jax.Array  # float32 []: nats per symbol, summed over the global batch and divided once
    loss_B: jax.Array  # float32 [B]: nats of each stream, summed over the window
    grad_norm: jax.Array  # float32 []: global norm of the gradient of `loss`, before clipping
    learning_rate: jax.Array  # float32 []
    accepted: jax.Array  # bool []: the update is (divergence.py)
    finite_params: jax.Array  # bool []: the parameters after the step are finite, those of the update or those kept
    finite_B: jax.Array  # bool [B]: the stream's new recurrent state and its loss are finite
    nonfinite_rows: jax.Array  # int32 []: how many are not, of all B
    divergence: DivergenceState  # after the step
    symbols: jax.Array  # int32 []: that `loss` is the mean of
