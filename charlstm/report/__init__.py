"""Runs side by side: their metrics, read from their directories, as curves and as a page."""
