"""Named keys: the names of all draws of training are part of the bits, and are these."""

import jax
import numpy as np

from charlstm import rng
from charlstm.model import language_model
from charlstm.training import train_state
from data_pipeline import streams
from tests.training import test_step

NAMES = {
    "init", "embedding", "b_out", "w_out", "cells.0", "cells.1",
    *(f"{name} gate {gate}" for name in ("w_x", "w_h") for gate in range(5)),
    *(f"{name} gate {gate}" for name in ("b_x", "b_h") for gate in range(5)),
    *(f"mogrifier {number} {part}" for number in (0, 1) for part in ("left", "right", "bias")),
    "noise", "input_dropout.0", "between_dropout.1", "output_dropout", "embedding_dropout",
    *(f"{name}.{layer}" for name in ("weight_drop", "state_dropout", "zoneout", "zoneout_cell") for layer in (0, 1)),
}  # fmt: skip


def test_the_names_of_draws_are_these(monkeypatch):
    drawn: set[str] = set()
    named = rng.named
    monkeypatch.setattr(rng, "named", lambda key, name: drawn.add(name) or named(key, name))
    everything = {"embedding_size": 6, "embedding_dropout": 0.1, "state_dropout": 0.2, "num_layers": 2}
    for kind in (test_step.LSTM, test_step.GENERAL, {"cell": "mlstm"}):
        config = test_step.make_config(**kind | everything)
        mesh = test_step.distributed.make(jax.devices()[:1])
        state = train_state.abstract(config, test_step.V, mesh)
        batch = test_step.distributed.abstract(mesh, test_step.distributed.BY_STREAM, test_step.batch(config, 0))
        jax.eval_shape(test_step.step.make(config, test_step.V, mesh, 100), state, batch)
    assert drawn == NAMES
    # Of another name is another key.
    keys = [jax.random.key_data(named(jax.random.key(0), name)) for name in sorted(NAMES)]
    assert len({np.asarray(key).tobytes() for key in keys}) == len(NAMES)


def test_the_settings_that_drop_inputs_have_the_names_that_their_draws_always_had():
    assert language_model.MASK_NAMES == {"input_dropout": "input_dropout", "layer_dropout": "between_dropout"}


def test_the_purposes_of_a_stream_are_these():
    source = open(streams.__file__).read()
    for purpose in ("short windows", "window length", "stream offset", "stream reset"):
        assert f'b"{purpose}"' in source
