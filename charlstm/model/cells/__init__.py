"""One file a cell: its equations, its step, and their hand-derived backward pass."""
