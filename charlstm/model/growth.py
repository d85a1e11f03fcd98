"""Growing a trained model: other symbols, wider layers, more layers, so that it computes what it computed before.

New parameters are drawn as those of a new model are; the zeros among them keep the function (Chen, Goodfellow and
Shlens, Net2Net, ICLR 2016, arXiv:1511.05641, copies units instead):

    a wider layer     what reads the new units (rows of W_x, W_h and W_out) is zero where it leads to what was there, so
                      the old units and the logits are as before; the new units see everything
    a new layer       on top of a model whose softmax reads the sum of all layers (skip): what makes its h is zero, the
                      block g of an LSTM, n of a GRU, all of tanh units, so h = 0.  Of rectified units without skip:
                      W_x = I, W_h = 0, b = 0, so h is the input, which is never negative
    another symbol    its row of the embedding (or of W_x), its column of W_out and its bias are drawn; those of the
                      symbols that both have are kept

In each case the new parameters get gradients from the first update, or from the second where a zero has to move first.
Layer normalization takes the mean of all units, so there a wider layer cannot be exact.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.types import CellParams, ModelParams

Array = Any  # of NumPy; parameters are declared as arrays of JAX

# What the equations are made of: growing changes none of it.
_FIXED = ("cell", "nonlinearity", "cap_input_gate", "tie_embeddings", "weight_norm", "mogrifier_rounds")
_MAKES_H = {"lstm": 2, "mlstm": 2, "layer_norm_lstm": 2, "gru": 2, "rnn": 0}  # block of the gates that h is a factor of


class Kept(NamedTuple):
    """The symbols that both vocabularies have: the id of each in the grown model, and in the one that was trained."""

    here: Array
    there: Array


def same_arrays(old: ModelConfig, new: ModelConfig) -> bool:
    """True if `old`, which `refusal` lets become `new`, has all its arrays, in the same shapes."""
    names = ("widths", "embedding_size", "train_initial_state")
    return all(getattr(old, name) == getattr(new, name) for name in names)


def refusal(old: ModelConfig, new: ModelConfig) -> str:
    """Why a trained `old` cannot become `new` and compute the same logits, in a sentence's part; "" if it can."""
    for name in (*_FIXED, *(["mogrifier_rank"] if old.mogrifier_rounds else [])):
        if getattr(old, name) != getattr(new, name):
            return f"{name}: {getattr(old, name)} -> {getattr(new, name)} is another model, not a larger one"
    if bool(old.embedding_size) != bool(new.embedding_size) or new.embedding_size < old.embedding_size:
        return f"embedding_size: {old.embedding_size} -> {new.embedding_size} would lose what was learned"
    if old.train_initial_state and not new.train_initial_state:
        return "train_initial_state: True -> False would lose the state that was learned"
    layers, more = len(old.widths), len(new.widths) - len(old.widths)
    if more < 0:
        return f"num_layers: {layers} -> {len(new.widths)} would leave layers out"
    if old.skip != new.skip and layers > 1:
        return f"skip: {old.skip} -> {new.skip} changes what the softmax reads of {layers} layers"
    if narrow := [f"{a} -> {b}" for a, b in zip(old.widths, new.widths, strict=False) if b < a]:
        return f"a layer of {narrow[0]} units would lose what was learned"
    if new.cell == "layer_norm_lstm" and old.widths != new.widths[:layers]:
        return "cell=layer_norm_lstm takes the mean of all units, so more units in a layer would change every one"
    rectified = new.cell == "rnn" and new.nonlinearity == "relu"
    if more and rectified and new.skip:
        return f"a layer more of rectified units that adds nothing to skip's sum would get no gradient: keep {layers}"
    if more and rectified and new.zoneout:
        return (
            f"a layer more of rectified units passes on its input, but with zoneout={new.zoneout} mixes it with old h"
        )
    if more and rectified and len(set(new.widths[layers - 1 :])) > 1:
        return f"new layers of rectified units pass on their input, and {new.widths[layers - 1 :]} are different widths"
    if more and not rectified and not new.skip:
        return (
            f"num_layers: {layers} -> {len(new.widths)} is exact where the softmax reads the sum of all layers "
            f"({'give --skip' if layers == 1 else 'the trained model has no skip'}): another layer of cell={new.cell} "
            "cannot pass on its input as it is"
        )
    return ""


def grow(params: ModelParams, new: ModelConfig, kept: Kept, drawn: ModelParams) -> ModelParams:
    """Returns the parameters of the grown model, NumPy, float32.

    Args:
      params: of the trained model, from which `refusal` finds a way to `new`.
      kept: the symbols that keep their parameters.
      drawn: of a new model of `new` and its vocabulary, as a run draws them.
    """
    params = jax.tree.map(np.asarray, params)
    drawn = jax.tree.map(np.asarray, drawn)
    cells = []
    for layer, fresh in enumerate(drawn.cells):
        one_hot = layer == 0 and drawn.embedding is None
        if layer < len(params.cells):
            cells.append(_grown_cell(fresh, params.cells[layer], kept if one_hot else None))
        else:
            cells.append(_new_cell(fresh, new))
    embedding, w_out, b_out = drawn.embedding, drawn.w_out, drawn.b_out.copy()
    b_out[kept.here] = params.b_out[kept.there]
    if w_out is not None and params.w_out is not None:
        w_out = _rows_by_symbol(w_out.T, params.w_out.T, kept, zero_beyond=True).T
    if embedding is not None:  # tied, its new columns are read by the softmax, in the place of rows of W_out
        embedding = _rows_by_symbol(embedding, params.embedding, kept, zero_beyond=w_out is None)
    return ModelParams(embedding, tuple(cells), w_out, b_out)


def _rows_by_symbol(drawn_VN: Array, old_VN: Array, kept: Kept, zero_beyond: bool) -> Array:
    """`drawn_VN` with the rows of the kept symbols, and in these, if wanted, zeros in the columns that are new."""
    grown = drawn_VN.copy()
    if zero_beyond:
        grown[kept.here] = 0
    grown[kept.here, : old_VN.shape[1]] = old_VN[kept.there]
    return grown


def _grown_cell(drawn: CellParams, old: CellParams, kept: Kept | None) -> CellParams:
    """One layer, with more units or more inputs; `kept` where its inputs are one-hot symbols."""
    H, H_old = drawn.w_h.shape[0], old.w_h.shape[0]

    def matrix(fresh: Array, before: Array) -> Array:
        return _widened(fresh, before, H, H_old)

    def vector(fresh: Any, before: Any) -> Array:
        return _widened(fresh[None], before[None], H, H_old)[0]

    w_x = matrix(drawn.w_x, old.w_x) if kept is None else _one_hot_rows(drawn.w_x, old.w_x, kept, H, H_old)
    first, rounds = drawn.first, None
    if old.first is not None:  # else it starts from zeros, as the state did before
        first = jax.tree.map(vector, drawn.first, old.first)
    if old.rounds is not None:
        rounds = jax.tree.map(_corner, drawn.rounds, old.rounds)
    return CellParams(
        w_x=w_x,
        w_h=matrix(drawn.w_h, old.w_h),
        b_x=vector(drawn.b_x, old.b_x),
        b_h=vector(drawn.b_h, old.b_h),
        gain=None if old.gain is None else vector(drawn.gain, old.gain),
        first=first,
        rounds=rounds,
        norms=old.norms,
    )


def _widened(drawn_JG: Array, old_JG: Array, H: int, H_old: int) -> Array:
    """Blocks of H columns, the first H_old of each from `old_JG`, and zero in the rows that it has not."""
    grown_JBH = drawn_JG.reshape(len(drawn_JG), -1, H).copy()
    grown_JBH[:, :, :H_old] = 0
    grown_JBH[: len(old_JG), :, :H_old] = old_JG.reshape(len(old_JG), -1, H_old)
    return grown_JBH.reshape(drawn_JG.shape)


def _one_hot_rows(drawn_VG: Array, old_VG: Array, kept: Kept, H: int, H_old: int) -> Array:
    """Widens rows of symbols as `_widened` does: those of other symbols are drawn, as no old symbol leads to them."""
    grown_VBH = drawn_VG.reshape(len(drawn_VG), -1, H).copy()
    grown_VBH[kept.here, :, :H_old] = old_VG.reshape(len(old_VG), -1, H_old)[kept.there]
    return grown_VBH.reshape(drawn_VG.shape)


def _corner(drawn: Array, old: Array) -> Array:
    """Widens one block, a matrix or a bias of the mogrifier, as `_widened` does."""
    if old.ndim == 1:
        return np.concatenate([old, drawn[len(old) :]])
    return _widened(drawn, old, drawn.shape[1], old.shape[1])


def _new_cell(drawn: CellParams, config: ModelConfig) -> CellParams:
    """A layer that adds nothing to the features yet; of rectified units, one that passes on its input."""
    H = drawn.w_h.shape[0]
    if config.cell == "rnn" and config.nonlinearity == "relu":
        zero: Array = np.zeros(H, np.float32)
        eye: Array = np.eye(H, dtype=np.float32)
        silent = drawn._replace(b_x=zero, b_h=zero, w_x=eye)
        return silent._replace(w_h=drawn.w_h * 0) if drawn.gain is None else silent._replace(gain=zero)
    block = _MAKES_H[config.cell]
    makes_h = slice(block * H, (block + 1) * H)

    def silent_there(array: Array) -> Array:
        array = array.copy()
        array[..., makes_h] = 0
        return array

    fields = {"w_x": drawn.w_x, "b_x": drawn.b_x, "b_h": drawn.b_h}
    # A column of zeros has no direction, so with weight norm its length is zero instead.
    fields |= {"w_h": drawn.w_h} if drawn.gain is None else {"gain": drawn.gain}
    norms = drawn.norms
    if norms is not None:
        norms = norms._replace(gain_x=silent_there(norms.gain_x), gain_h=silent_there(norms.gain_h))
        fields = {"b_x": drawn.b_x, "b_h": drawn.b_h}
    return drawn._replace(norms=norms, **{name: silent_there(array) for name, array in fields.items()})
