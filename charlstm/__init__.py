"""Deep character-level recurrent language models and their training, from scratch on JAX.

import charlstm as cl

corpus = cl.load_corpus("shakespeare.txt")
model = cl.train(cl.Config(hidden_size=256, num_steps=2000), corpus, run_dir="runs/bard")
print(model.evaluate(corpus.test).bits_per_character)
print(model.sample("ROMEO:", length=500, temperature=0.8))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlstm.api import Model, load, load_corpus, load_mixture, train
    from charlstm.config import Config
    from charlstm.inference.score import Score
    from charlstm.run.metrics import Diverged

__all__ = ["Config", "Diverged", "Model", "Score", "load", "load_corpus", "load_mixture", "train"]

_HOMES = {
    "Config": "charlstm.config",
    "Diverged": "charlstm.run.metrics",
    "Model": "charlstm.api",
    "Score": "charlstm.inference.score",
    "load": "charlstm.api",
    "load_corpus": "charlstm.api",
    "load_mixture": "charlstm.api",
    "train": "charlstm.api",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: a program sets JAX up before the library imports it."""
    if name in ("distributed", "inspect", "model", "training"):  # the functional level, and looking inside
        return importlib.import_module(f"charlstm.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'charlstm' has no attribute {name!r}")
