"""Uses of a trained model: scores and text."""
