"""The named tuples of arrays: all that changes.  (All that does not is in config.py.)

Letters: B streams in the batch, T symbols in a window, V symbols in the vocabulary, E embedding width, D layer input
width, H hidden width, G gate width (4H for an LSTM, 3H for a GRU, H for a plain RNN), L layers.
"""

from typing import Any, NamedTuple

import jax


class CellParams(NamedTuple):
    """Parameters of one recurrent layer.  The gates lie side by side along G, in the order the cell's file gives."""

    w_x: jax.Array  # [D, G] input to gates
    w_h: jax.Array  # [H, G] previous hidden state to gates
    b_x: jax.Array  # [G]
    b_h: jax.Array  # [G] added on the recurrent side, as in PyTorch and char-rnn


class ModelParams(NamedTuple):
    """Parameters of the language model."""

    embedding: jax.Array | None  # [V, E]; None for one-hot input
    cells: tuple[CellParams, ...]  # L layers, first to last
    w_out: jax.Array | None  # [H, V]; None where tied to the embedding
    b_out: jax.Array  # [V]


class CellState(NamedTuple):
    """What a layer carries from symbol to symbol, float32 whatever the compute dtype (float64 when asked)."""

    h: jax.Array  # [B, H] hidden state
    c: jax.Array | None  # [B, H] cell state of an LSTM; None for the GRU and the plain RNN


RecurrentState = tuple[CellState, ...]  # L layers, first to last


class TrainState(NamedTuple):
    """Everything that changes in training.  A checkpoint is this and nothing less."""

    step: jax.Array  # int32 []: updates made, windows read
    params: ModelParams  # replicated
    opt_state: Any  # replicated
    recurrent_state: RecurrentState  # split over devices by stream


class Metrics(NamedTuple):
    """What one training step reports."""

    loss: jax.Array  # float32 []: nats per symbol, summed over the global batch and divided once
    loss_B: jax.Array  # float32 [B]: nats of each stream, summed over the window
    grad_norm: jax.Array  # float32 []: global norm of the gradient of `loss`, before clipping
    learning_rate: jax.Array  # float32 []
    finite_params: jax.Array  # bool []: all parameters are finite after the update
    finite_B: jax.Array  # bool [B]: the stream's new recurrent state and its loss are finite
