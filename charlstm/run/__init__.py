"""A run on disk: the loop, checkpoints, metrics, the log."""
