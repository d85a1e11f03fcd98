"""Models with drawn weights, and one with a unit that is set by hand to know whether it is inside quotes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import charlstm as cl
from charlstm.api import Model
from charlstm.model import language_model
from data_pipeline.vocabulary import Vocabulary

WIDTH, PLANTED = 6, 4
CHARACTERS = Vocabulary("characters", "".join(sorted("\n abcdefgh0(){}“”é")))


def drawn(vocabulary=CHARACTERS, **settings) -> Model:
    """A model of two layers whose units do something."""
    settings = {"num_layers": 2, "hidden_size": WIDTH, "initializer": "normal", "init_scale": 1.0} | settings
    config = cl.Config(**settings, vocabulary=vocabulary.kind)
    return Model(config, vocabulary, language_model.init(config.model, vocabulary.size, jax.random.key(0)), 7)


def planted() -> Model:
    """`drawn`, and unit 1:4 is 1 from “ on and -1 from ” on, whatever else comes."""
    model = drawn()
    cell = jax.tree.map(np.array, model.params.cells[0])
    i, f, g, _ = (PLANTED + WIDTH * gate for gate in range(4))
    opens, closes = CHARACTERS.encode("“”").tolist()
    cell.w_h[:, [i, f, g]], cell.b_h[[i, f, g]], cell.b_x[[i, f, g]] = 0, 0, (-30, 30, 0)
    cell.w_x[:, [i, f, g]] = 0
    cell.w_x[opens, [i, f, g]], cell.w_x[closes, [i, f, g]] = (60, -60, 60), (60, -60, -60)
    cells = (jax.tree.map(jnp.asarray, cell), *model.params.cells[1:])
    return Model(model.config, model.vocabulary, model.params._replace(cells=cells), 7)


def text_of(length: int, seed: int = 0) -> str:
    """Words, some in quotes."""
    random, found = np.random.default_rng(seed), ""
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(40)]
    while len(found) < length:
        part = " ".join(random.choice(words, 3))
        found += ("“" + part + "”" if random.random() < 0.4 else part) + (" " if random.random() < 0.8 else "\n")
    return found[:length]


@pytest.fixture(scope="package")
def model() -> Model:
    return planted()
