"""Validation-driven schedule: learning-rate drop on plateau, start of weight averaging.

After each evaluation, with k = evaluations since the lowest score and n = evaluations so far,

    --schedule=plateau   lowers the rate when k = plateau_patience, or n = plateau_latest: once in a run, as in the
                         recipes of Melis et al. 2018 (arXiv:1707.05589)
    --average=asgd       begins to average when k = average_patience, or n = average_latest (Melis et al. 2020,
                         arXiv:1909.01792).  NT-ASGD (Merity et al. 2018, arXiv:1708.02182, algorithm 1) compares the
                         newest score with the best of those before the last k, and may begin earlier

Both are part of the state, so a resumed run does each at the same evaluation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.config.training import OptimizerConfig
from charlstm.types import PlateauState


def start() -> PlateauState:
    """Before the first evaluation."""
    none = jnp.zeros((), jnp.int32)
    return PlateauState(none, jnp.full((), jnp.inf, jnp.float32), none, jnp.zeros((), bool), none)


def update(settings: OptimizerConfig, plateau_state: PlateauState, score: float) -> PlateauState:
    """Updates the plateau state, NumPy arrays, with a validation score in bits per symbol."""
    evaluations, best, patience_count = int(plateau_state.evaluations) + 1, float(np.float32(score)), 0
    if best >= plateau_state.best:
        best, patience_count = float(plateau_state.best), int(plateau_state.patience_count) + 1
    dropped, averaged = bool(plateau_state.dropped), int(plateau_state.averaged)
    if settings.schedule == "plateau":
        dropped |= patience_count >= settings.plateau_patience or evaluations == settings.plateau_latest
    starts_averaging = patience_count >= settings.average_patience or evaluations == settings.average_latest
    if settings.average == "asgd" and starts_averaging:
        averaged = max(averaged, 1)  # the parameters that were evaluated are the first
    updated: Any = (evaluations, best, patience_count, dropped, averaged)
    return jax.tree.map(lambda old, new: np.asarray(new, old.dtype), plateau_state, PlateauState(*updated))
