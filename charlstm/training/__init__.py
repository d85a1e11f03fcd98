"""Training: one update, and all that belongs to it."""

from charlstm.training.step import make as make_step
from charlstm.training.train_state import init, place

__all__ = ["init", "make_step", "place"]
