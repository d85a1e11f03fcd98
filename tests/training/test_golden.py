"""The bits of training: digests by value, of every cell and mask, of a skipped update, of going back and of resuming.

Bits depend on the processor and on the version of JAX, so `golden.json` has a table for each pair that was met; on
another one the test is skipped.  With CHARLSTM_WRITE_GOLDEN=1 in the environment, the tests of this file, run with
`pytest -m optimized`, write the table of this machine, which is right only where a change is meant to change the bits.
"""

import hashlib
import json
import os
import platform
from pathlib import Path

import jax
import numpy as np
import pytest

from charlstm import distributed
from charlstm.model import layer
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from tests.training import test_step

pytestmark = pytest.mark.optimized

V = test_step.V
TABLE = Path(__file__).with_name("golden.json")
CELLS = {name: {"cell": name} for name in layer.CELLS} | {
    "mlstm": {"cell": "mlstm", "weight_norm": True},
    "general": test_step.GENERAL,
}
MASKS = {
    "plain": test_step.QUIET | {"activation_penalty": 0.0, "activation_change_penalty": 0.0},
    "masked": {"state_dropout": 0.2, "embedding_size": 6, "embedding_dropout": 0.1},
}
KINDS = {
    f"{cell} {masks} {dtype}": CELLS[cell] | MASKS[masks] | {"compute_dtype": dtype}
    for cell in CELLS
    for masks in MASKS
    for dtype in ("float32", "bfloat16")
}
SHORT = ("lstm masked float32", "gru plain bfloat16")


def this_machine() -> str:
    """The version of JAX and the model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8", "replace").splitlines() if cpuinfo.exists() else []
    wanted = ("model name", "flags")
    found = "".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)
    return f"jax {jax.__version__} {platform.machine()} {hashlib.sha256(found.encode()).hexdigest()[:12]}"


def digest(tree) -> str:
    """Of the values alone, in the order of the tree: names may change."""
    hashed = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        hashed.update(f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return hashed.hexdigest()[:16]


def trained(name: str, devices: int) -> str:
    state, metrics = test_step.run(test_step.make_config(**KINDS[name]), [devices])
    return digest((state, [m.loss_B for m in metrics]))


def after_a_skip() -> str:
    config = test_step.make_config(on_divergence="skip", spike_factor=2.0)
    state, _ = test_step.run(config, [8], steps=2)
    layers = jax.tree.map(np.array, state.recurrent_state)
    layers[0].h[3] = np.nan
    mesh, train_step = test_step.compiled(config, 8)
    for number in (2, 3):
        placed = train_state.place(mesh, state._replace(recurrent_state=layers))
        state, _ = train_step(placed, distributed.put(mesh, distributed.BY_STREAM, test_step.batch(config, number)))
        state = jax.tree.map(np.asarray, state)
        layers = state.recurrent_state
    return digest(state)


def after_going_back_and_a_plateau() -> str:
    config = test_step.make_config(
        schedule="plateau", plateau_patience=1, average="asgd", average_patience=1, train_initial_state=True
    )
    mesh, train_step = test_step.compiled(config, 8)
    state = train_state.place(mesh, train_state.init(config, V))
    for number in range(6):
        state, _ = train_step(state, distributed.put(mesh, distributed.BY_STREAM, test_step.batch(config, number)))
        if number in (1, 2, 3):
            state = train_state.update_plateau(config, mesh, state, 3.0)
        if number == 4:
            state = train_state.roll_back(mesh, state, 2, 1)
    return digest(state)


def resumed(folder: Path) -> str:
    """A run of two updates, a checkpoint, and two more on other devices."""
    config = test_step.make_config()
    state, _ = test_step.run(config, [8], steps=2)
    mesh, _ = test_step.compiled(config, 8)
    with Checkpoints(folder, log=print) as checkpoints:
        checkpoints.save(train_state.place(mesh, state), {}, None, {})
    mesh, train_step = test_step.compiled(config, 4)
    with Checkpoints(folder, log=print) as checkpoints:
        state = checkpoints.restore(train_state.abstract(config, V, mesh))[0]
    for number in (2, 3):
        state, _ = train_step(state, distributed.put(mesh, distributed.BY_STREAM, test_step.batch(config, number)))
    return digest(state)


def expect(name: str, found: str) -> None:
    """Compares `found` with the table of this machine, or writes it there."""
    tables = json.loads(TABLE.read_text())
    if "CHARLSTM_WRITE_GOLDEN" in os.environ:
        tables.setdefault(this_machine(), {})[name] = found
        TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")
    table = tables[this_machine()]
    assert name in table, (
        f"{TABLE.name} has no {name!r} yet: write it, and no other, with -k and CHARLSTM_WRITE_GOLDEN=1"
    )
    assert found == table[name]


@pytest.fixture(autouse=True)
def of_this_machine():
    if "CHARLSTM_WRITE_GOLDEN" not in os.environ and this_machine() not in json.loads(TABLE.read_text()):
        pytest.skip(f"{TABLE.name} has no table for {this_machine()}")


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in KINDS])
def test_training_has_the_bits_that_it_always_had(name):
    for devices in (8, 2, 1) if name.endswith("masked float32") and name not in SHORT else (8,):
        expect(name, trained(name, devices))


@pytest.mark.long
def test_skipping_going_back_a_plateau_and_resuming_have_the_bits_that_they_always_had(tmp_path):
    expect("skip", after_a_skip())
    expect("back, plateau, asgd", after_going_back_and_a_plateau())
    expect("resume", resumed(tmp_path / "checkpoints"))
