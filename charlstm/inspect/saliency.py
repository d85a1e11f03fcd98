"""Which earlier symbols a prediction depends on: input times gradient, of the log-probability of the symbol that came.

The input of symbol s, embedded or one-hot and projected, is scaled by a factor of 1.  The derivative of
log p(symbol t) with respect to that factor is the input times its gradient (Shrikumar et al., arXiv:1605.01713): how
much the prediction would change, to first order, with the symbol's strength.
"""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.inference.evaluate import Split
from charlstm.inspect.trace import first_state
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.training.loss import cross_entropy
from data_pipeline.batch import ends_separator, looks_back

if TYPE_CHECKING:
    from charlstm.api import Model

ROWS = 64  # targets side by side


def saliency(model: "Model", split: Split, lookback: int) -> np.ndarray:
    """The absolute derivatives of each symbol's log-probability by its predecessors, float32 `[symbols, lookback]`.

    Column k is that of the symbol k + 1 places before; 0 before the text begins, and before the document does.  What is
    farther than twice the lookback is left out of the state, too.
    """
    config, count, back = model.config.model, len(split), looks_back(model.separator)
    ids = np.concatenate([np.full(2 * lookback + back, -1, np.int32), split.read(0, count).astype(np.int32)])
    reset = ends_separator(ids, model.separator)
    ids = ids[back:]
    reset[2 * lookback : 2 * lookback + 1] = True
    state = first_state(config, model.params, ROWS)
    found = np.zeros((count, lookback), np.float32)
    for first in range(0, count, ROWS):
        target = np.minimum(np.arange(first, first + ROWS), count - 1)
        place = target[:, None] + np.arange(2 * lookback)[None]  # what is before the target, the last one beside it
        derivative = _derivative(
            model.params, state, np.maximum(ids[place], 0), reset[place], ids[target + 2 * lookback], config
        )
        exists = ids[place] >= 0
        part = np.where(exists, np.abs(np.asarray(derivative)), 0)[:, ::-1][:, :lookback]
        found[first : first + ROWS] = part[: count - first]
    return found


@partial(compiler.jit, static_argnames="config")
def _derivative(params, state, ids_BT, reset_BT, target_B, config):
    def log_probability(scale_BT):
        _, logits_TBV, _ = language_model.trace(config, params, state, ids_BT, reset_BT, (), scale_BT)
        return -cross_entropy(logits_TBV[-1:], target_B[None]).sum()

    return jax.grad(log_probability)(jnp.ones(ids_BT.shape, params.b_out.dtype))
