"""Deep character-level recurrent language models and their training, from scratch on JAX."""
