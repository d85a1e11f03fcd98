"""Who verifies which file of a checkpoint, and how its files come onto the disk."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from charlstm.run import sealing
from tests.compiling import xla_flags
from tests.conftest import ROOT

FILES = ("params/_METADATA", "params/d/1", "params/d/2", "params/ocdbt.process_0/d/3", "opt_state/d/4", "opt_state/d/5")


@pytest.fixture
def sealed(tmp_path) -> Path:
    for number, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(10 * number + 1))
    sealing.seal(tmp_path, {"step": 1})
    return tmp_path


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_each_file_of_arrays_is_in_one_share_and_what_describes_them_in_all(count):
    sizes = {name: number for number, name in enumerate(FILES)}
    shares = [sealing.shared(sizes, number, count) for number in range(count)]
    assert all(share[0] == FILES[0] for share in shares)
    assert sorted(name for share in shares for name in share[1:]) == sorted(FILES[1:])
    assert shares[0][1] == FILES[-1]  # the largest comes first


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed_by_the_process_whose_share_it_is_in(name, sealed):
    (sealed / name).write_bytes(bytes((sealed / name).stat().st_size))
    found = []
    for number in range(3):
        try:
            sealing.verify(sealed, share=(number, 3))
        except sealing.Damaged as damage:
            found.append(number)
            assert str(damage) == f"{name} was changed after it was written"
    assert len(found) == (3 if name == FILES[0] else 1)


def test_a_long_verification_and_sealing_beat_after_every_file_and_every_piece_of_a_large_one(sealed, monkeypatch):
    monkeypatch.setattr(sealing, "PIECE", 10)
    beats: list[int] = []
    sealing.verify(sealed, beat=lambda: beats.append(1))
    assert len(beats) == sum(-(-(10 * number + 1) // 10) for number in range(len(FILES)))
    (sealed / sealing.SEAL).unlink()
    sealing.seal(sealed, {"step": 1}, beat=lambda: beats.append(2))
    assert beats.count(2) == beats.count(1)


def test_files_are_put_on_disk_side_by_side(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / str(number)).write_bytes(b"x")
    together, fsync = threading.Barrier(4), os.fsync

    def with_the_others(descriptor: int) -> None:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{tmp_path}/checkpoint"):
            together.wait(60)  # which fails where one waits for another to be on disk
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", with_the_others)
    monkeypatch.setattr(sealing, "sync", lambda path: None)
    sealing.seal(tmp_path, {})
    assert len(json.loads((tmp_path / sealing.SEAL).read_text())["files"]) == 4


RESTORE = """
import json, sys
from pathlib import Path
import jax, numpy as np
from charlstm import distributed
from charlstm.run import array_files, sealing
from charlstm.run.checkpoint import Checkpoints
from charlstm.types import TrainState
from tests.run.test_checkpoint import IDENTITY, abstract_state, host_state, shardings

index, port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
distributed.join(f"127.0.0.1:{port}", 2, index, 60)
hashed, sha256 = [], sealing._sha256
opened, read_array = [], array_files._read

def counted(file, beat=lambda: None):
    hashed.append(str(Path(file.name).relative_to(folder)))
    return sha256(file, beat)

def noted(item, name, *rest):
    opened.append(f"{item.name}.{name}")
    return read_array(item, name, *rest)

def place(sharding, tree):
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, lambda at: np.asarray(leaf)[at]), tree
    )

def restored():
    hashed.clear()
    opened.clear()
    state, meta = checkpoints.restore(abstract_state(2, 1))
    expected = jax.tree.leaves(host_state(meta["step"], 1))
    for leaf, whole in zip(jax.tree.leaves(state), expected, strict=True):
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(whole[shard.index]).tobytes()
    found = {"step": meta["step"], "arrays": len(meta["arrays"]), "hashed": hashed, "opened": opened}
    print(json.dumps(found), flush=True)

def damage(step, process):
    # The last file of the share of that process.
    files = sealing._read(folder / str(step))[1]
    own = folder / str(step) / sealing.shared({name: file["size"] for name, file in files.items()}, process, 2)[-1]
    own.write_bytes(bytes(own.stat().st_size))

with Checkpoints(folder, log=lambda line: print(line, flush=True)) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(TrainState(*map(place, shardings(2), host_state(step, 1))), IDENTITY, None)
    checkpoints.wait()
    sealing._sha256, array_files._read = counted, noted
    restored()
    for step, process in ((3, 1), (2, 0)):
        distributed.run_on_first(lambda: damage(step, process))
        restored()
"""


def test_two_processes_verify_and_read_half_each_and_a_damaged_file_in_the_share_of_one_decides_for_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RESTORE, str(index), str(port), str(tmp_path / "checkpoints")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    lines = [out.splitlines() for out, _ in ended]
    of_each = [[json.loads(line) for line in said if line.startswith("{")] for said in lines]
    assert [found["step"] for found in of_each[0]] == [found["step"] for found in of_each[1]] == [3, 2, 1]
    of_arrays = [[name for name in found[0]["hashed"] if name.count("/") > 2] for found in of_each]
    assert min(map(len, of_arrays)) > 9 and not set(of_arrays[0]) & set(of_arrays[1])
    opened = [set(found[0]["opened"]) for found in of_each]
    both = opened[0] & opened[1]  # each reads its own rows
    assert both == {name for name in opened[0] | opened[1] if name.startswith("recurrent_state.")} != set()
    assert min(len(opened[0] - both), len(opened[1] - both)) > 9
    assert len(opened[0] | opened[1]) == of_each[0][0]["arrays"]
    third = next((tmp_path / "checkpoints").glob("3.corrupt-*"))
    files = [path for pattern in ("d/*", "ocdbt.process_*/manifest*", "*.npz") for path in third.rglob(pattern)]
    assert sorted(of_arrays[0] + of_arrays[1]) == sorted(f"3/{path.relative_to(third)}" for path in files)
    assert sorted(path.name for path in third.rglob("*.npz")) == ["000000000.npz", "000000004.npz"]
    assert {path.name for path in third.rglob("ocdbt.process_*")} == {"ocdbt.process_0"}
    for said in lines:
        damaged = [line for line in said if " is damaged: " in line]
        assert ["checkpoint 3" in damaged[0], "checkpoint 2" in damaged[1]] == [True, True]
    assert "is damaged: process 1: " in "".join(lines[0]) and "is damaged: process 0: " in "".join(lines[1])
    aside = sorted(path.name.partition("-")[0] for path in (tmp_path / "checkpoints").iterdir())
    assert aside == ["1", "2.corrupt", "3.corrupt"]
