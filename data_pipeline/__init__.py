"""Text on disk to batches of symbol ids: knows neither JAX nor the model."""
