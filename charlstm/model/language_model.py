"""The language model: symbols -> embedding -> L recurrent layers -> logits of the next symbol.

    x_1 = one-hot(symbol) or embedding[symbol]        x_{l+1} = h_l
    h_l = recurrence_l(x_l W_x)                       cells/, layer.py
    features = h_L, or with skip the sum of all h_l
    logits = features W_out + b_out                   W_out is the embedding's transpose where it is tied

In training, dropout may apply to every x_l, the features, the embedding's rows and the recurrent weights. With
skip, the features sum h_l before the dropout of x_{l+1} (Melis et al. 2018); a tied softmax uses all rows of the
embedding (Merity et al. 2018). The masks are in dropout.py.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from charlstm import rng
from charlstm.config.model import ModelConfig
from charlstm.model import initializers
from charlstm.model import layer as layer_lib
from charlstm.model.dropout import DropoutKey, drop, drop_rows, drop_symbols, drop_weights
from charlstm.model.layer import CELLS
from charlstm.model.ops.matmul import dense, lookup
from charlstm.types import CellParams, CellState, ModelParams, RecurrentState

# Names from which the random keys of these settings' masks are derived: another name would draw other masks.
MASK_NAMES = {"input_dropout": "input_dropout", "layer_dropout": "between_dropout"}


def init(config: ModelConfig, vocabulary_size: int, key: jax.Array) -> ModelParams:
    """Draws float32 parameters for a vocabulary of `vocabulary_size` symbols."""
    V, E, widths = vocabulary_size, config.embedding_size, config.widths

    def draw(name: str, shape: tuple[int, int], by: Callable[..., jax.Array] = initializers.weights) -> jax.Array:
        return by(config.initializer, rng.named(key, name), shape, scale=config.init_scale, hidden_size=widths[-1])

    layers = []
    for layer, (input_width, width) in enumerate(zip((E or V, *widths), widths, strict=False)):
        layers.append(layer_lib.init(config, rng.named(key, f"cells.{layer}"), input_width, width))
    embedding = initializers.weights if config.tie_embeddings else initializers.embedding  # tied, it is W_out as well
    return ModelParams(
        embedding=draw("embedding", (V, E), by=embedding) if E else None,
        cells=tuple(layers),
        w_out=None if config.tie_embeddings else draw("w_out", (widths[-1], V)),
        b_out=initializers.biases(
            config.initializer, rng.named(key, "b_out"), V, scale=config.init_scale, hidden_size=widths[-1]
        ),
    )


def zero_state(config: ModelConfig, batch: int, dtype: jnp.dtype = jnp.float32) -> RecurrentState:
    """Returns a state of zeros for `batch` streams.  A trainable initial state starts from zeros, too."""
    return tuple(CELLS[config.cell].zero_state(batch, width, dtype) for width in config.widths)


def reset_state(params: ModelParams, like: RecurrentState) -> RecurrentState:
    """Returns the initial state, trained or zero, of as many streams as `like` has."""

    def of_layer(p: CellParams, state: CellState) -> CellState:
        if p.first is None:
            return jax.tree.map(jnp.zeros_like, state)
        return jax.tree.map(lambda f_H, s_BH: jnp.broadcast_to(f_H, s_BH.shape), p.first, state)

    return tuple(of_layer(p, state) for p, state in zip(params.cells, like, strict=True))


def apply(
    config: ModelConfig,
    params: ModelParams,
    state: RecurrentState,
    inputs_BT: jax.Array,
    reset_BT: jax.Array,
    dropout_key: DropoutKey | None = None,
) -> tuple[RecurrentState, jax.Array]:
    """Runs a window through the model, for scoring and sampling.  Always uses the `scan` backend, whichever trained it.

    Args:
      state: carried from the window before.
      inputs_BT: symbol ids.
      reset_BT: bool; where True, the stream's state is reset to the initial one before symbol t is read.
      dropout_key: of the masks; None for no dropout.

    Returns:
      The state after the window, and the logits of the symbol after each input, `[T, B, V]`, in the parameters' dtype.
    """
    state, features_TBH = features(config.with_scan, params, state, inputs_BT, reset_BT, dropout_key)
    return state, logits(config, params, drop_features(config, features_TBH, dropout_key))


def features(
    config: ModelConfig,
    params: ModelParams,
    state: RecurrentState,
    inputs_BT: jax.Array,
    reset_BT: jax.Array,
    dropout_key: DropoutKey | None = None,
) -> tuple[RecurrentState, jax.Array]:
    """Returns the state after a window and the softmax input, `[T, B, H]` in the compute dtype; see `apply`."""
    inputs_TB, reset_TB = inputs_BT.T, reset_BT.T
    params = _with_dropped_weights(config, params, dropout_key)
    if inputs_BT.size >= len(params.b_out) and not (dropout_key is not None and config.input_dropout):
        params = fold_embedding(config, params)
    T, size = len(inputs_TB), math.isqrt(len(inputs_TB))
    if not config.remat or size < 2:
        return _apply_layers(config, params, dropout_key, state, inputs_TB, reset_TB)
    # Chunks of sqrt(T) symbols, the first one longer by the remainder.  This minimizes memory: the states between
    # chunks plus the residuals of one chunk.  A chunk is recomputed only when the backward pass reaches it.
    start = size + T % size if T % size else 0
    run = jax.checkpoint(partial(_apply_layers, config, params, dropout_key), prevent_cse=False)
    state, first = run(state, inputs_TB[:start], reset_TB[:start]) if start else (state, None)
    chunks = jax.tree.map(lambda a: a[start:].reshape(-1, size, *a.shape[1:]), (inputs_TB, reset_TB))
    state, rest = jax.lax.scan(lambda state, chunk: run(state, *chunk), state, chunks)
    rest = rest.reshape(-1, *rest.shape[2:])
    return state, rest if first is None else jnp.concatenate([first, rest])


def trace(
    config: ModelConfig,
    params: ModelParams,
    state: RecurrentState,
    inputs_BT: jax.Array,
    reset_BT: jax.Array,
    held: tuple[layer_lib.Held, ...] = (),
    scale_BT: jax.Array | None = None,
    with_gates: bool = True,
) -> tuple[RecurrentState, jax.Array, dict[str, jax.Array]]:
    """Runs a window as `apply` without dropout, by the textbook step, and keeps what it computes.

    Args:
      held: of each layer, units whose state is replaced after each symbol, before anything reads it.
      scale_BT: factors of the first layer's inputs, as in `layer.trace`: a derivative with respect to them is input
        times gradient.
      with_gates: False is for states alone, by the step of `apply`, in two thirds of the time.

    Returns:
      The state after the window, the logits `[T, B, V]`, and all states and gates: "1.h" is h of the first layer,
      `[T, B, H]`; every layer has h, and c, i, f, g, o, m (of the mLSTM), r, u, n, as its cell's equations have them.
    """
    found: dict[str, jax.Array] = {}

    def run(config, p, layer_state, inputs_TBX, reset_TB, dropout_key, number, dtype):
        of_layer = held[number] if held else ()
        scale_TB = scale_BT.T if scale_BT is not None and number == 0 else None
        window = inputs_TBX, reset_TB, dtype
        layer_state, named = layer_lib.trace(config, p, layer_state, *window, of_layer, scale_TB, with_gates)
        found.update({f"{number + 1}.{name}": array for name, array in named.items()})
        return layer_state, named["h"].astype(dtype)

    params = _with_dropped_weights(config, params, None)
    params = params if with_gates else fold_embedding(config, params)
    state, features_TBH = _apply_layers(config, params, None, state, inputs_BT.T, reset_BT.T, run)
    return state, logits(config, params, features_TBH), found


def _with_dropped_weights(config: ModelConfig, params: ModelParams, dropout_key: DropoutKey | None) -> ModelParams:
    """Applies weight norm and the dropout of embedding rows and recurrent weights."""
    table_VE = params.embedding
    if table_VE is not None:
        table_VE = drop_rows(table_VE, dropout_key, config.embedding_dropout, "embedding_dropout")
    cells = []
    for layer, p in enumerate(params.cells):
        w_h = drop_weights(layer_lib.recurrent_weights(p), dropout_key, config.weight_drop, f"weight_drop.{layer}")
        cells.append(p._replace(w_h=w_h))
    return params._replace(embedding=table_VE, cells=tuple(cells))


def fold_embedding(config: ModelConfig, params: ModelParams) -> ModelParams:
    """Folds the embedding into the first layer's input weights (E W_x), so each symbol is projected once.

    Skipped if V > 2E: in the backward pass, one matmul with V rows would cost more than the two with E rows.
    Skipped for raw input, too.
    """
    table_VE, p = params.embedding, params.cells[0]
    if table_VE is None or config.takes_raw_input or len(table_VE) > 2 * table_VE.shape[1]:
        return params
    w_VX = dense(table_VE[None], p.w_x, None, _compute_dtype(config, params))[0]
    w_out = table_VE.T if params.w_out is None else params.w_out
    return params._replace(embedding=None, cells=(p._replace(w_x=w_VX), *params.cells[1:]), w_out=w_out)


def _apply_layers(
    config: ModelConfig,
    params: ModelParams,
    dropout_key: DropoutKey | None,
    state: RecurrentState,
    inputs_TB: jax.Array,
    reset_TB: jax.Array,
    run: Callable[..., tuple[CellState, jax.Array]] = layer_lib.apply,
) -> tuple[RecurrentState, jax.Array]:
    dtype, each_symbol = _compute_dtype(config, params), config.dropout_mask == "symbol"
    x_TBD = None if params.embedding is None else lookup(params.embedding, inputs_TB, dtype).astype(dtype)
    new_state, outputs = [], []
    for layer, (p, layer_state) in enumerate(zip(params.cells, state, strict=True)):
        which = "layer_dropout" if layer else "input_dropout"
        drawn_for = (dropout_key, getattr(config, which), f"{MASK_NAMES[which]}.{layer}", each_symbol)
        if x_TBD is None:  # one-hot symbols, or directly their projection
            V = p.w_x.shape[0]
            w_VX = jnp.eye(V, dtype=dtype) if config.takes_raw_input else p.w_x
            inputs_TBX = drop_symbols(lookup(w_VX, inputs_TB, dtype), inputs_TB, V, *drawn_for)
        else:
            inputs_TBX = drop(x_TBD, *drawn_for)
            if not config.takes_raw_input:
                inputs_TBX = dense(inputs_TBX, p.w_x, None, dtype)
        layer_state, x_TBD = run(config, p, layer_state, inputs_TBX.astype(dtype), reset_TB, dropout_key, layer, dtype)
        new_state.append(layer_state)
        outputs.append(x_TBD)
    return tuple(new_state), sum(outputs[1:], outputs[0]) if config.skip else outputs[-1]


def drop_features(config: ModelConfig, features_TBH: jax.Array, dropout_key: DropoutKey | None) -> jax.Array:
    """Applies output dropout."""
    return drop(features_TBH, dropout_key, config.output_dropout, "output_dropout", config.dropout_mask == "symbol")


def logits(config: ModelConfig, params: ModelParams, features_TBH: jax.Array) -> jax.Array:
    """Returns the logits of the next symbol, `[T, B, V]`, in the parameters' dtype."""
    if params.w_out is not None:
        w_HV = params.w_out
    else:
        assert params.embedding is not None, "tied weights are the embedding's"
        w_HV = params.embedding.T
    return dense(features_TBH, w_HV, params.b_out, _compute_dtype(config, params))


def _compute_dtype(config: ModelConfig, params: ModelParams) -> jnp.dtype:
    # float32 means "as the parameters": float64 parameters, in tests, are computed in float64.
    return jnp.dtype(jnp.bfloat16) if config.compute_dtype == "bfloat16" else params.b_out.dtype
