"""The language model: symbols -> embedding -> L recurrent layers -> logits of the next symbol.

    x_0 = one-hot(symbol) or embedding[symbol]
    h_l = recurrence_l(dropout(x_l) W_x + b_x)        x_{l+1} = h_l
    logits = dropout(h_L) W_out + b_out               with skip: the sum of all h_l in place of h_L

Dropout is between layers and before the soft-max, and its masks are constant over a window (Gal & Ghahramani 2016).
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from charlstm import initializers, keys
from charlstm.cells import gru, lstm, mlstm, rnn
from charlstm.model_config import ModelConfig
from charlstm.projection import dense, lookup
from charlstm.types import ModelParams, RecurrentState

CELLS: dict[str, ModuleType] = {"lstm": lstm, "gru": gru, "rnn": rnn, "mlstm": mlstm}


class Dropout(NamedTuple):
    """What the masks of one window depend on: nothing of where they are computed."""

    key: jax.Array  # of the seed and the step
    rows_B: jax.Array  # int32: each row's number in the global batch


def init(config: ModelConfig, vocabulary_size: int, key: jax.Array) -> ModelParams:
    """Initial float32 parameters for a vocabulary of `vocabulary_size` symbols."""
    cell, H, V, E = CELLS[config.cell], config.hidden_size, vocabulary_size, config.embedding_size

    def draw(name: str, shape: tuple[int, int]) -> jax.Array:
        return initializers.weights(
            config.initializer, keys.named(key, name), shape, scale=config.init_scale, hidden_size=H
        )

    layers = []
    for layer in range(config.num_layers):
        width = H if layer else (E or V)
        layer_key = keys.named(key, f"cells.{layer}")
        layers.append(cell.init(layer_key, width, H, config.initializer, config.init_scale, config.forget_bias))
    return ModelParams(
        embedding=draw("embedding", (V, E)) if E else None,
        cells=tuple(layers),
        w_out=None if config.tie_embeddings else draw("w_out", (H, V)),
        b_out=initializers.biases(
            config.initializer, keys.named(key, "b_out"), V, scale=config.init_scale, hidden_size=H
        ),
    )


def initial_state(config: ModelConfig, batch: int, dtype: jnp.dtype = jnp.float32) -> RecurrentState:
    """Zeros for `batch` streams."""
    return tuple(CELLS[config.cell].initial_state(batch, config.hidden_size, dtype) for _ in range(config.num_layers))


def apply(
    config: ModelConfig,
    params: ModelParams,
    state: RecurrentState,
    inputs_BT: jax.Array,
    reset_BT: jax.Array,
    dropout: Dropout | None = None,
) -> tuple[RecurrentState, jax.Array]:
    """Runs a window through the model.

    Args:
      state: carried from the window before.
      inputs_BT: symbol ids.
      reset_BT: bool; where True, the stream's state is zeroed before symbol t is read.
      dropout: what the masks depend on; None, or config.dropout = 0, for none.

    Returns:
      The state after the window, and the logits of the symbol after each input, `[T, B, V]`, in the parameters' dtype.
    """
    inputs_TB, reset_TB = inputs_BT.T, reset_BT.T
    cell, dtype = CELLS[config.cell], _compute_dtype(config, params)
    x_TBD: jax.Array | None = None if params.embedding is None else lookup(params.embedding, inputs_TB).astype(dtype)
    new_state, outputs = [], []
    for layer, (p, layer_state) in enumerate(zip(params.cells, state, strict=True)):
        b_x = jnp.pad(p.b_x, (0, p.w_x.shape[1] - p.b_x.shape[0]))  # the mLSTM's factor has no bias
        z_TBG = lookup(p.w_x, inputs_TB) + b_x[None, None, :] if x_TBD is None else dense(x_TBD, p.w_x, b_x, dtype)
        layer_state, h_TBH = cell.recurrence(
            p.w_h, p.b_h, layer_state, z_TBG.astype(dtype), reset_TB, dtype, _variant(config)
        )
        x_TBD = _drop(h_TBH, config, dropout, f"dropout.{layer}")
        new_state.append(layer_state)
        outputs.append(x_TBD)
    top_TBH = sum(outputs[1:], outputs[0]) if config.skip else outputs[-1]
    if params.w_out is not None:
        w_HV = params.w_out
    else:
        assert params.embedding is not None, "tied weights are the embedding's"
        w_HV = params.embedding.T
    return tuple(new_state), dense(top_TBH, w_HV, params.b_out, dtype)


def _variant(config: ModelConfig) -> str:
    """Of the cell's equations."""
    match config.cell:
        case "rnn":
            return config.nonlinearity
        case "lstm" | "mlstm":
            return "capped" if config.cap_input_gate else "plain"
    return ""


def _compute_dtype(config: ModelConfig, params: ModelParams) -> jnp.dtype:
    # float32 means "as the parameters": float64 parameters, in tests, are computed in float64.
    return jnp.dtype(jnp.bfloat16) if config.compute_dtype == "bfloat16" else params.b_out.dtype


def _drop(h_TBH: jax.Array, config: ModelConfig, dropout: Dropout | None, name: str) -> jax.Array:
    """Zeroes a fraction of the units for the whole window and scales the others up."""
    if dropout is None or not config.dropout:
        return h_TBH
    keep, key, width = 1 - config.dropout, keys.named(dropout.key, name), h_TBH.shape[2]
    mask_BH = jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), keep, (width,)))(dropout.rows_B)
    scale_BH = mask_BH.astype(h_TBH.dtype) / jnp.asarray(keep, h_TBH.dtype)
    return h_TBH * scale_BH[None, :, :]
