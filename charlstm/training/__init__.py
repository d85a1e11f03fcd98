"""How the model learns: one update, and all that belongs to it."""
