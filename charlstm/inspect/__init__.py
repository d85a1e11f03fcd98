"""Looks inside a trained model: states and gates at every symbol, what units know, and pictures of them."""

from charlstm.inspect.probe import Probe, probe_texts
from charlstm.inspect.ranking import Ranked, Ranking, units_for
from charlstm.inspect.trace import chunks
from charlstm.inspect.units import Unit

__all__ = ["Probe", "Ranked", "Ranking", "Unit", "chunks", "probe_texts", "units_for"]
