"""Rows that so many devices have written are read in any other division, bit for bit."""

import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.run import row_files

ROWS = 24
RANDOM = np.random.default_rng(0)
ARRAYS = {
    "0.h": RANDOM.integers(0, 256, (ROWS, 5, 4), np.uint8).view(np.float32)[..., 0],  # NaN payloads among them
    "0.c": RANDOM.integers(0, 256, (ROWS, 3, 2), np.uint8).view(jnp.bfloat16)[..., 0],
    "": RANDOM.integers(0, 2, ROWS).astype(bool),
}


def write(directory, first: int, stop: int) -> None:
    """As a process whose devices hold these rows; what it holds of others is not there."""
    count = 8 if (stop - first) % 8 == 0 else 1
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:count]), ("data",)), PartitionSpec("data"))
    own = {name: jax.device_put(array[first:stop], sharding) for name, array in ARRAYS.items()}
    written = row_files.start_writing(directory, own)
    written()
    if first:
        (directory / "rows/000000000.npz").rename(directory / f"rows/{first:09}.npz")


@pytest.mark.parametrize("bounds", [(0, 24), (8, 0, 24), (16, 20, 8, 0, 24)], ids=str)
def test_any_rows_are_read_of_any_files(bounds, tmp_path):
    edges = sorted(bounds)
    for first, stop in zip(edges[-2::-1], edges[:0:-1], strict=True):
        write(tmp_path, first, stop)
    assert row_files.are_in(tmp_path) and not row_files.are_in(tmp_path / "rows")
    assert len(list((tmp_path / "rows").iterdir())) == len(bounds) - 1
    for name, array in ARRAYS.items():
        for start in range(ROWS):
            for stop in (*range(start + 1, ROWS + 1), None):
                found = row_files.read(tmp_path, name, array.dtype, start, stop)
                assert found.dtype == array.dtype and found.shape == array[start:stop].shape
                assert found.tobytes() == array[start:stop].tobytes(), (name, start, stop)


def test_no_file_is_opened_but_those_that_hold_the_rows(tmp_path):
    for first in (16, 8, 0):
        write(tmp_path, first, first + 8)
    for name in ("000000000", "000000016"):
        (tmp_path / f"rows/{name}.npz").write_bytes(b"")
    assert row_files.read(tmp_path, "0.h", np.dtype("f4"), 8, 16).tobytes() == ARRAYS["0.h"][8:16].tobytes()
    with pytest.raises(EOFError):
        row_files.read(tmp_path, "0.h", np.dtype("f4"), 8, 17)


def test_a_damaged_file_is_not_left_open(tmp_path):
    write(tmp_path, 0, ROWS)
    (tmp_path / "rows/000000000.npz").write_bytes(b"PK\3\4 and no more")
    before = _lowest_free_descriptor()
    with pytest.raises(zipfile.BadZipFile) as kept:  # with what its frames refer to
        row_files.read(tmp_path, "0.h", np.dtype("f4"))
    assert _lowest_free_descriptor() == before, kept


def _lowest_free_descriptor() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor
