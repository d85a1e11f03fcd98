"""The model: symbols -> logits.  The functional level, for research: parameters in, arrays out."""

from charlstm.model.language_model import apply, init, reset_state, zero_state

__all__ = ["apply", "init", "reset_state", "zero_state"]
