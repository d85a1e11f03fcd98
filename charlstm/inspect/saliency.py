"""Saliency of the earlier symbols for a prediction: input times gradient, of the log-probability of what came.

The input of symbol s, embedded or one-hot and projected, is scaled by a factor of 1: in a layer-normalized cell after
the normalization of the projection, in which a factor of the input would be lost.  The derivative of
log p(symbol t) with respect to that factor is the input times its gradient (Shrikumar et al., arXiv:1605.01713): how
much the prediction would change, to first order, with the symbol's strength.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.inference.evaluate import Split
from charlstm.inspect import trace
from charlstm.inspect.units import main_array
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.training.loss import cross_entropy
from charlstm.types import CellState
from data_pipeline.batch import ends_separator, looks_back

if TYPE_CHECKING:
    from charlstm.api import Model

ROWS = 64  # targets side by side


def saliency(
    model: "Model", split: Split, lookback: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """The absolute derivatives of each symbol's log-probability by its predecessors, float32 `[symbols, lookback]`.

    Column k is that of the symbol k + 1 places before; 0 before the text begins, and before the document does.

    Raises:
      ValueError: the model reads backward.
    """
    trace.require_forward(model)
    config, count, back = model.config.model, len(split), looks_back(model.separator)
    ids = np.concatenate([np.full(lookback + back, -1, np.int32), split.read(0, count).astype(np.int32)])
    reset = ends_separator(ids, model.separator)
    ids = ids[back:]
    reset[lookback : lookback + 1] = True
    parts = ("h", "c") if main_array(config) == "c" else ("h",)
    layers = range(1, len(config.widths) + 1)
    states = trace.whole(model, split, [f"{n}.{part}" for n in layers for part in parts])
    found = np.zeros((count, lookback), np.float32)
    for first in range(0, count, ROWS):
        target = np.minimum(np.arange(first, first + ROWS), count - 1)
        place = target[:, None] + np.arange(lookback)[None]  # of what is before the target, the last one beside it
        before = np.maximum(target - lookback - 1, 0)  # where that is before the text, the state is reset
        state = tuple(
            CellState(states[f"{n}.h"][before], states.get(f"{n}.c", states[f"{n}.h"])[before]) for n in layers
        )
        if parts == ("h",):
            state = tuple(layer._replace(c=None) for layer in state)
        args = np.maximum(ids[place], 0), reset[place], ids[target + lookback]
        derivative = np.abs(np.asarray(_derivative(model.params, state, *args, config)))
        found[first : first + ROWS] = np.where(ids[place] >= 0, derivative, 0)[: count - first, ::-1]
        progress(min(first + ROWS, count), count)
    return found


@partial(compiler.jit, static_argnames="config")
def _derivative(params, state, ids_BT, reset_BT, target_B, config):
    def log_probability(scale_BT):
        _, logits_TBV, _ = language_model.trace(config, params, state, ids_BT, reset_BT, (), scale_BT)
        return -cross_entropy(logits_TBV[-1:], target_B[None]).sum()

    return jax.grad(log_probability)(jnp.ones(ids_BT.shape, params.b_out.dtype))
