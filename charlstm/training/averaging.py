"""Weight averaging: the average, if one is kept, is what is evaluated and sampled.

With p the parameters after an update, a the average so far and n the number of updates averaged, this one included,

    ema     a = a + w (p - a)      w = (1 - d) / (1 - d^n),  d = ema_decay
    asgd    a = a + (p - a) / n                                                   Polyak & Juditsky 1992

ema is the exponential average with its bias towards the start taken out, as Kingma & Ba 2015, section 3, take it out of
Adam's moments: its weights sum to 1 from the first update on, and asgd is its limit d = 1.  asgd begins when
validation no longer improves (plateau.py), with the parameters evaluated then as its first; until then the average is
the parameters themselves.

An update that is skipped is not averaged.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.config.training import OptimizerConfig
from charlstm.training.optimizers import bias_correction
from charlstm.types import ModelParams, PlateauState, TrainState

Average = ModelParams | tuple[()]


def start(settings: OptimizerConfig, params: ModelParams) -> Average:
    """The average before the first update: the parameters, as arrays of their own, since a step donates both."""
    return jax.tree.map(jnp.copy, params) if settings.eval_params_field == "average" else ()


def update(
    settings: OptimizerConfig, average: Any, plateau_state: PlateauState, params: ModelParams
) -> tuple[Any, PlateauState]:
    """Updates the average with new `params`; returns it and the plateau state with the count of averaged updates."""
    if settings.average == "none":
        return average, plateau_state
    begun = settings.average == "ema" or not settings.average_patience
    count = plateau_state.averaged + (1 if begun else (plateau_state.averaged > 0).astype(jnp.int32))
    n = jnp.maximum(count, 1).astype(params.b_out.dtype)
    if settings.average == "ema":
        weight = (1 - settings.ema_decay) / bias_correction(settings.ema_decay, n)
    else:
        weight = 1 / n
    # With a weight of 1, p is copied: a + (p - a) would round.
    average = jax.tree.map(lambda a, p: jnp.where(weight < 1, a + weight * (p - a), p), average, params)
    return average, plateau_state._replace(averaged=count)


def to_evaluate(state: TrainState) -> ModelParams:
    """Parameters to evaluate: the average, if one is kept."""
    return state.average or state.params
