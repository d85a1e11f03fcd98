"""Arrays that are split by rows over processes, in one file of each process: NumPy's .npz, named by its first row.

    <directory>/rows/000000000.npz   rows 0 to 255 of every array, by name
                     000000256.npz   the next ones

Any number of processes reads what another number wrote.  Bits are kept as unsigned integers, as NumPy's files know no
bfloat16.  What is read is not verified here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROWS = "rows"


def start_writing(directory: Path, arrays: dict[str, jax.Array]) -> Callable[[], None]:
    """Copies the rows of this process's devices to the host; what is returned writes them.

    Args:
      arrays: by name, each [rows, ...], with the same rows on the same devices.
    """
    shards = {name: sorted(array.addressable_shards, key=_first) for name, array in arrays.items()}
    own = {name: np.concatenate([np.asarray(shard.data) for shard in split]) for name, split in shards.items()}
    (first,) = {_first(split[0]) for split in shards.values()}

    def write() -> None:
        (directory / ROWS).mkdir(exist_ok=True)
        named: dict[str, Any] = {name: rows.view(_bits(rows.dtype)) for name, rows in own.items()}
        with open(directory / ROWS / f"{first:09}.npz", "wb") as file:
            np.savez(file, **named)

    return write


def are_in(directory: Path) -> bool:
    """True if arrays were written so in `directory`."""
    return bool(_files(directory))


def read(directory: Path, name: str, dtype: np.dtype, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` (None: the last) of an array; opens no file but those that hold them.

    Raises:
      OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: as NumPy does, of a damaged file.
    """
    files, pieces = _files(directory), list[np.ndarray]()
    for path, following in zip(files, [*files[1:], None], strict=True):
        first = int(path.stem)
        if (stop is None or first < stop) and (following is None or start < int(following.stem)):
            with open(path, "rb") as file, np.load(file) as held:  # given a path, NumPy leaves a damaged file open
                pieces.append(held[name][max(0, start - first) : None if stop is None else stop - first])
    return np.concatenate(pieces).view(dtype)


def _files(directory: Path) -> list[Path]:
    return sorted((directory / ROWS).glob("*.npz"), key=lambda path: int(path.stem))


def _first(shard: jax.Shard) -> int:
    return shard.index[0].start or 0


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")
