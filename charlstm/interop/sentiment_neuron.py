"""The weights of the sentiment neuron: an mLSTM of 4,096 units that read Amazon reviews, as 15 files of NumPy.

Source: Radford, Jozefowicz and Sutskever, Learning to Generate Reviews and Discovering Sentiment, 2017
(arXiv:1704.01444); the files are those in model/ of github.com/openai/generating-reviews-discovering-sentiment, and its
encoder.py has the equations.  The symbols are bytes.

    0 embedding [256, E]    1 wx [E, 4H]    2-5 wh [H, 4H], some of its columns each    6 wmx [E, H]    7 wmh [H, H]
    8 b [4H]    9 gx [4H]    10 gh [4H]    11 gmx [H]    12 gmh [H]    13 w [H, 256]    14 b of the output [256]

The gates have the order i f o u, u being our g.  wx, wh, wmx and wmh are directions, whose columns have the lengths g;
the products are what is kept, so the model has no weight norm any more.
"""

from pathlib import Path

import numpy as np

from charlstm.interop.torch_weights import Array, Weights
from charlstm.types import CellParams, ModelParams

FILES = 15
NAMES = ("wx", "wh", "wmx", "wmh", "b", "gx", "gh", "gmx", "gmh", "w", "b_out")  # after the embedding
LEAST_SQUARES = 1e-12  # of a column: what tf.nn.l2_normalize divides by at least
_OUR_ORDER = (0, 1, 3, 2)  # of the blocks i f o u


def is_one(folder: Path) -> bool:
    """True if a directory has files of such names."""
    return all((folder / f"{number}.npy").is_file() for number in range(FILES))


def read(folder: Path) -> Weights:
    """Reads the model.  Raises ValueError where a file is damaged, or has another shape than the rest."""
    parts = [_load(folder / f"{number}.npy") for number in range(FILES)]
    if any(part.ndim != 2 for part in (*parts[:8], parts[13])) or len({len(part) for part in parts[2:6]}) > 1:
        raise ValueError(
            f"{folder}: the matrices among the {FILES} files do not have the shapes of the sentiment neuron"
        )
    named: dict[str, Array] = dict(zip(NAMES, [parts[1], np.concatenate(parts[2:6], axis=1), *parts[6:]], strict=True))
    embedding = parts[0]
    V, E = embedding.shape
    H = named["wmh"].shape[1]
    expected = {"wx": (E, 4 * H), "wh": (H, 4 * H), "wmx": (E, H), "wmh": (H, H), "b": (4 * H,), "gx": (4 * H,)}
    expected |= {"gh": (4 * H,), "gmx": (H,), "gmh": (H,), "w": (H, V), "b_out": (V,)}
    for name, shape in expected.items():
        if named[name].shape != shape:
            raise ValueError(f"{folder}: {name} has the shape {list(named[name].shape)} where {list(shape)} belongs")

    def joined(gates: str, factor: str, gate_lengths: str, factor_lengths: str) -> Array:
        of_gates = _our_order(_with_lengths(named[gates], named[gate_lengths]))
        return np.concatenate([of_gates, _with_lengths(named[factor], named[factor_lengths])], axis=1)

    cell = CellParams(
        w_x=joined("wx", "wmx", "gx", "gmx"),
        w_h=joined("wh", "wmh", "gh", "gmh"),
        b_x=_our_order(named["b"][None])[0],
        b_h=np.zeros_like(named["b"]),
    )
    settings = {"cell": "mlstm", "num_layers": 1, "hidden_size": H, "embedding_size": E}
    params = ModelParams(embedding, (cell,), named["w"], named["b_out"])
    return Weights(settings, params, "the 15 files of the sentiment neuron")


def _load(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may claim any size
        if array.dtype.kind != "f" or not array.size:
            raise ValueError(f"{list(array.shape)} of {array.dtype} where floats belong")
    except Exception as error:  # a damaged header is evaluated as Python: NumPy's errors are of many types
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None
    return _finite(array, str(path))


def _finite(array: Array, name: str) -> Array:
    with np.errstate(over="ignore"):
        array = np.array(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has numbers that are not finite in float32")
    return array


def _with_lengths(directions: Array, lengths: Array) -> Array:
    squares = np.einsum("ij,ij->j", directions, directions, dtype=np.float64)  # which cannot overflow
    return _finite(
        directions * (lengths / np.sqrt(np.maximum(squares, LEAST_SQUARES)))[None], "a matrix with its lengths"
    )


def _our_order(blocks: Array) -> Array:
    """i f o u -> i f g o."""
    return np.concatenate([np.split(blocks, 4, axis=1)[place] for place in _OUR_ORDER], axis=1)
