"""Training: one update, and all that belongs to it."""

from charlstm.training.step import init, place
from charlstm.training.step import make as make_step

__all__ = ["init", "make_step", "place"]
