"""What a checkpoint is given comes back bit for bit, on any devices; which steps there are follows from the saves."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.run import array_files, sealing
from charlstm.run.checkpoint import Checkpoints
from charlstm.types import CellParams, CellState, DivergenceState, ModelParams, PlateauState, TrainState

IDENTITY = {"config": {"model": {"hidden_size": 16}}, "vocabulary": "0123abcd", "versions": ["0.1", None]}
ROWS = 8  # streams; the recurrent state is split by them


def host_state(step: int, layers: int = 2) -> TrainState:
    """A state of all bit patterns (NaN payloads, -0.0, denormals), another one for each step."""
    rng = np.random.default_rng(step)
    number: Any = np.asarray(step, np.int32)

    def any_bits(*shape: int, dtype: Any = np.float32) -> Any:
        kind = np.dtype(dtype)
        return rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind)[..., 0]

    def params() -> ModelParams:
        cells = tuple(CellParams(any_bits(5, 64), any_bits(16, 64), any_bits(64), any_bits(64)) for _ in range(layers))
        return ModelParams(None, cells, any_bits(16, 5), any_bits(5))

    carry = tuple(CellState(any_bits(ROWS, 16), any_bits(ROWS, 16) if layer else None) for layer in range(layers))
    opt_state = {
        "count": number,
        "mean": any_bits(16, 64),
        "low": any_bits(3, 5, dtype=jnp.bfloat16),
    }
    divergence_state = DivergenceState(number, any_bits(), number, number, number, number)
    plateau_state = PlateauState(number, any_bits(), number, np.asarray(step % 2 == 1), number)
    return TrainState(number, params(), opt_state, carry, divergence_state, plateau_state, params())


def shardings(devices: int) -> TrainState:
    """As a prefix of the state: all replicated, the recurrent state split by rows."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    whole: Any = NamedSharding(mesh, PartitionSpec())
    by_row: Any = NamedSharding(mesh, PartitionSpec("data"))
    return TrainState(whole, whole, whole, by_row, whole, whole, whole)


def make_state(step: int, devices: int = 8, layers: int = 2) -> TrainState:
    return jax.device_put(host_state(step, layers), shardings(devices))


def abstract_state(devices: int = 8, layers: int = 2) -> TrainState:
    def abstract(sharding, tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    return TrainState(*map(abstract, shardings(devices), host_state(0, layers)))


def bits(tree: object) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in leaves}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save_all(directory: Path, *steps: int | tuple[int, float | None], keep: int = 3) -> None:
    said: list[str] = []
    with Checkpoints(directory, keep=keep, log=said.append) as checkpoints:
        for step in steps:
            number, score = step if isinstance(step, tuple) else (step, None)
            checkpoints.save(make_state(number), IDENTITY, score)
    assert said == []


def rewrite_seal(directory: Path, change: Callable[[dict], object]) -> None:
    """Seals the directory again, as it is now, with its meta changed: damage that the files' digests cannot show."""
    meta = json.loads((directory / sealing.SEAL).read_text())["meta"]
    change(meta)
    (directory / sealing.SEAL).unlink()
    sealing.seal(directory, meta)


@pytest.mark.parametrize(
    "devices",
    [8, pytest.param(1, marks=pytest.mark.gpu), *(pytest.param(count, marks=pytest.mark.long) for count in (4, 2))],
)
def test_what_8_devices_saved_any_number_restores_bit_for_bit(tmp_path, devices):
    save_all(tmp_path, 7)
    wanted = abstract_state(devices)
    with Checkpoints(tmp_path, writable=False, log=print) as checkpoints:
        restored, meta = checkpoints.restore(wanted)
    assert bits(restored) == bits(host_state(7))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, wanted)
    assert (meta["step"], meta["identity"]) == (7, IDENTITY)


def test_what_1_device_saved_8_restore(tmp_path):
    with Checkpoints(tmp_path, log=print) as checkpoints:
        checkpoints.save(make_state(3, devices=1), IDENTITY, None)
        restored, _ = checkpoints.restore(abstract_state(8))
    assert bits(restored) == bits(host_state(3))


def test_the_directory_may_be_named_from_another_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_all(Path("../run/checkpoints"), 4)
    with Checkpoints(Path("../here/../run/checkpoints"), writable=False, log=print) as checkpoints:
        state, _ = checkpoints.restore(abstract_state())
    assert bits(state) == bits(host_state(4))


@pytest.mark.gpu
def test_the_state_may_be_deleted_as_soon_as_save_returns(tmp_path):
    with Checkpoints(tmp_path, log=print) as checkpoints:
        state = make_state(5)
        checkpoints.save(state, IDENTITY, None)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        restored, _ = checkpoints.restore(abstract_state())
    assert bits(restored) == bits(host_state(5))


def test_a_save_that_is_read_back_and_a_restore_beat_after_every_array(tmp_path, monkeypatch):
    beats, handed, sha256 = list[int](), list[object](), sealing._sha256

    def beat() -> None:
        beats.append(1)

    def without_beats(file, beat):
        handed.append(beat)
        return sha256(file)

    monkeypatch.setattr(sealing, "_sha256", without_beats)  # so that those of arrays are left
    with Checkpoints(tmp_path, log=print, beat=beat) as checkpoints:
        checkpoints.save(make_state(1), IDENTITY, None)
        checkpoints.wait()
        arrays = len(checkpoints.read_meta()["arrays"])
        assert len(beats) == arrays > 20
        checkpoints.restore(abstract_state())
        assert len(beats) == 2 * arrays
    assert handed and all(given is beat for given in handed)


@pytest.mark.gpu
def test_params_are_restored_alone_even_where_the_rest_is_gone(tmp_path):
    save_all(tmp_path, 4)
    for path in [*(tmp_path / "4/opt_state").rglob("*"), *(tmp_path / "4/recurrent_state").rglob("*")]:
        if path.is_file():
            path.unlink()
    with Checkpoints(tmp_path, writable=False, log=print) as checkpoints:
        params, _ = checkpoints.restore_params(abstract_state(1).params)
        assert bits(params) == bits(host_state(4).params)
        with pytest.raises(ValueError, match="whole"):
            checkpoints.restore(abstract_state(1))


def test_a_state_without_optimizer_arrays_is_saved_and_restored(tmp_path):
    with Checkpoints(tmp_path, log=print) as checkpoints:
        checkpoints.save(make_state(2)._replace(opt_state=()), IDENTITY, None)
        restored, _ = checkpoints.restore(abstract_state(2)._replace(opt_state=()))
    assert restored.opt_state == () and bits(restored.params) == bits(host_state(2).params)


def test_meta_is_read_without_the_arrays(tmp_path):
    save_all(tmp_path, (4, 2.5), 6)
    sums = {"nats": 0.1 + 0.2, "symbols": 3}
    with Checkpoints(tmp_path, log=print) as checkpoints:
        checkpoints.save(make_state(7), IDENTITY, None, sums)
    with Checkpoints(tmp_path, writable=False, log=print) as checkpoints:
        assert (checkpoints.read_meta()["step"], checkpoints.read_meta()["sums"]) == (7, sums)
        assert checkpoints.read_meta(6)["sums"] is None
        meta = checkpoints.read_meta(4)
    assert (meta["identity"], meta["bits_per_symbol"]) == (IDENTITY, 2.5)
    assert meta["arrays"]["params.cells.0.w_h"]["shape"] == [16, 64]
    assert "params.embedding" not in meta["arrays"]


def test_the_newest_and_the_best_are_kept_and_known_after_reopening(tmp_path):
    save_all(tmp_path, (1, 3.0), (2, 1.0), (3, 2.0), keep=2)
    save_all(tmp_path, 4, (5, 1.5), 6, keep=2)
    with Checkpoints(tmp_path, writable=False, log=print) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best() == 2
    assert names(tmp_path) == ["2", "5", "6"]


def test_scores_with_other_settings_are_not_compared_and_the_best_by_either_is_kept(tmp_path):
    save_all(tmp_path, (1, 1.0), (2, 1.5))
    config = IDENTITY["config"] | {"evaluation": {"burn_in": 0, "evaluation_batch_size": 4}}
    with Checkpoints(tmp_path, keep=1, log=print) as checkpoints:
        for step, score in ((3, 2.0), (4, 2.5), (5, None)):
            checkpoints.save(make_state(step), IDENTITY | {"config": config}, score)
    with Checkpoints(tmp_path, writable=False, log=print) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 5], 3)


def test_a_metric_that_is_no_number_never_replaces_the_best(tmp_path):
    infinity = float("inf")
    save_all(
        tmp_path, (2, 4.0), (5, 2.0), (6, float("nan")), (7, infinity), (8, -infinity), (9, None), (10, 3.0), keep=1
    )
    with Checkpoints(tmp_path, log=print) as checkpoints:
        assert checkpoints.best() == 5
        assert checkpoints.steps() == [5, 10]


def test_without_any_metric_there_is_no_best_and_nothing_is_kept_for_ever(tmp_path):
    save_all(tmp_path, 1, 2, 3, 4, 5)
    with Checkpoints(tmp_path, log=print) as checkpoints:
        assert checkpoints.best() is None
        assert checkpoints.steps() == [3, 4, 5]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save_all(tmp_path, 3)
    other = make_state(9)._replace(step=make_state(3).step)
    with Checkpoints(tmp_path, log=print) as checkpoints:
        checkpoints.save(other, IDENTITY, 1.25)
        restored, meta = checkpoints.restore(abstract_state())
    assert bits(restored) == bits(other) and meta["bits_per_symbol"] == 1.25
    assert names(tmp_path) == ["3"]


@pytest.mark.parametrize("announced", [True, pytest.param(False, marks=pytest.mark.long)])
def test_after_going_back_the_next_save_is_the_newest(tmp_path, announced):
    save_all(tmp_path, 10, (20, 1.0), (30, 0.5))
    with Checkpoints(tmp_path, log=print) as checkpoints:
        checkpoints.restore(abstract_state(), step=10)
        if announced:
            checkpoints.discard_after(10)
            assert checkpoints.steps() == [10]
        checkpoints.save(make_state(12), IDENTITY, 2.0)
    with Checkpoints(tmp_path, log=print) as checkpoints:
        assert checkpoints.steps() == [10, 12]
        assert checkpoints.best() == 12
        assert bits(checkpoints.restore(abstract_state())[0]) == bits(host_state(12))
    assert [name.partition("-")[0] for name in names(tmp_path)] == ["10", "12", "20.abandoned", "30.abandoned"]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save_all(tmp_path, 2, 4)
    with Checkpoints(tmp_path, log=print) as checkpoints:
        for ask in (checkpoints.read_meta, lambda step: checkpoints.restore(abstract_state(), step=step)):
            with pytest.raises(ValueError, match=r"no checkpoint 3 .*choose one of 2, 4"):
                ask(3)


def test_an_empty_or_absent_directory_has_no_steps_and_says_so(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with Checkpoints(directory, writable=False, log=print) as checkpoints:
            assert (checkpoints.steps(), checkpoints.best()) == ([], None)
            with pytest.raises(ValueError, match="no checkpoint in"):
                checkpoints.restore(abstract_state())
    assert not (tmp_path / "absent").exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written .*run_dir"):
        Checkpoints(tmp_path / "file" / "checkpoints", log=print)


def as_other_type(state: TrainState) -> TrainState:
    b_out: Any = state.params.b_out
    other: Any = jax.ShapeDtypeStruct(b_out.shape, jnp.bfloat16, sharding=b_out.sharding)
    return state._replace(params=state.params._replace(b_out=other))


def as_other_shape(state: TrainState) -> TrainState:
    b_out = state.params.b_out
    other: Any = jax.ShapeDtypeStruct((6,), b_out.dtype, sharding=b_out.sharding)
    return state._replace(params=state.params._replace(b_out=other))


def as_deeper(state: TrainState) -> TrainState:
    return state._replace(params=state.params._replace(cells=(*state.params.cells, state.params.cells[0])))


def as_shallower(state: TrainState) -> TrainState:
    return state._replace(params=state.params._replace(cells=state.params.cells[:1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_other_type, r"b_out is float32\[5\] there and bfloat16\[5\] here"),
        (as_other_shape, r"b_out is float32\[5\] there and float32\[6\] here"),
        (as_deeper, r"cells.2.b_h is absent there and float32\[64\] here"),
        (as_shallower, r"cells.1.b_h is float32\[64\] there and absent here"),
    ],
)
def test_another_model_is_refused_never_cast_and_never_taken_for_damage(tmp_path, change, words):
    save_all(tmp_path, 1, 2)
    with Checkpoints(tmp_path, log=print) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.restore(change(abstract_state()))
    assert names(tmp_path) == ["1", "2"]


def test_another_format_is_refused_and_never_taken_for_damage(tmp_path):
    save_all(tmp_path, 1, 2)
    rewrite_seal(tmp_path / "2", lambda meta: meta.update(format=99))
    with Checkpoints(tmp_path, log=print) as checkpoints:
        for ask in (checkpoints.read_meta, lambda: checkpoints.restore(abstract_state())):
            with pytest.raises(ValueError, match="format 99 and this version reads 4 and 5"):
                ask()
    assert names(tmp_path) == ["1", "2"]


def test_a_checkpoint_whose_recurrent_state_orbax_has_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "BY_ROWS", "")  # as in format 4
    save_all(tmp_path, 1)
    monkeypatch.undo()
    assert (tmp_path / "1/recurrent_state/manifest.ocdbt").exists()
    rewrite_seal(tmp_path / "1", lambda meta: meta.update(format=4))
    with Checkpoints(tmp_path, log=print) as checkpoints:
        for devices in (1, 8):
            assert bits(checkpoints.restore(abstract_state(devices))[0]) == bits(host_state(1))


def test_the_recurrent_state_that_one_device_has_whole_is_written_by_rows_too(tmp_path):
    state = make_state(1, devices=1)
    whole = jax.device_put(state.recurrent_state, state.step.sharding)  # as an update on one device returns it
    with Checkpoints(tmp_path, log=print) as checkpoints:
        checkpoints.save(state._replace(recurrent_state=whole), IDENTITY, None)
        checkpoints.wait()
        assert names(tmp_path / "1/recurrent_state") == ["rows"]
        assert bits(checkpoints.restore(abstract_state(8))[0]) == bits(host_state(1))


def test_of_arrays_that_are_sent_each_has_arrived_before_the_beat_that_says_so(tmp_path, monkeypatch):
    save_all(tmp_path, 1)
    happened, send = list[str](), array_files._send
    whole = {
        field: tree for field, tree in abstract_state()._asdict().items() if field not in ("step", "recurrent_state")
    }

    @dataclasses.dataclass
    class Sent:
        array: jax.Array

        def block_until_ready(self) -> "Sent":
            happened.append("arrived")
            return self

    monkeypatch.setattr(array_files, "_readers", lambda wanted: dict.fromkeys(wanted, 0))
    monkeypatch.setattr(array_files, "_send", lambda array, leaf: Sent(send(array, leaf)))
    sending = array_files.read(tmp_path / "1", whole, lambda: happened.append("beat"))
    leaves = jax.tree.leaves(whole)
    assert happened == ["beat"] * len(leaves)
    happened.clear()
    found = sending()
    assert happened == ["arrived", "beat"] * len(leaves)
    expected = {field: getattr(host_state(1), field) for field in whole}
    assert bits(jax.tree.map(lambda sent: sent.array, found)) == bits(expected)


def test_what_a_kill_left_unfinished_is_removed_by_the_next_writer_only(tmp_path):
    save_all(tmp_path, 1, 2)
    os.rename(tmp_path / "2", tmp_path / "2.saving")
    (tmp_path / "2.saving" / sealing.SEAL).unlink()
    for left in ("3.saving.orbax-checkpoint-tmp", "4.removed-0123", "notes", "5.corrupt-0123"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("something")
    before = names(tmp_path)
    with Checkpoints(tmp_path, writable=False, log=print) as checkpoints:
        assert int(checkpoints.restore(abstract_state())[0].step) == 1
    assert names(tmp_path) == before
    with Checkpoints(tmp_path, log=print) as checkpoints:
        assert int(checkpoints.restore(abstract_state())[0].step) == 1
    assert names(tmp_path) == ["1", "5.corrupt-0123", "notes"]


def test_a_checkpoint_that_only_lacked_its_name_when_the_process_was_killed_gets_it(tmp_path):
    save_all(tmp_path, 1)
    os.rename(tmp_path / "1", tmp_path / "1.saving")
    with Checkpoints(tmp_path, log=print) as checkpoints:
        assert bits(checkpoints.restore(abstract_state())[0]) == bits(host_state(1))
    assert names(tmp_path) == ["1"]


def test_saves_in_a_hurry_are_all_made(tmp_path):
    with Checkpoints(tmp_path, keep=9, log=print) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(make_state(step), IDENTITY, None)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3, 4, 5]
        for step in range(1, 6):
            assert bits(checkpoints.restore(abstract_state(), step=step)[0]) == bits(host_state(step))
