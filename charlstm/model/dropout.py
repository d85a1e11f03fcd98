"""Dropout masks of a window, each drawn by the name of its purpose.

A mask m is 0 with probability `rate`, else 1 / (1 - rate).  Its mean is 1, and evaluation and sampling, without masks,
need no scaling.  Rate 0 is no dropout, bit for bit.

    drop            x_t <- m x_t      m [width] of each stream: locked dropout       Gal & Ghahramani 2016
                    x_t <- m_t x_t    m_t [width] of each stream and symbol          Zaremba et al. 2014
    drop_symbols    the same of one-hot x_t: a stream does not see the symbols that its m drops
    drop_rows       E_v <- m_v E_v    m [V]: no stream sees the symbols it drops     Merity et al. 2018
    drop_weights    W <- m W          m of each weight, for all streams              Wan et al. 2013, Merity et al. 2018

Gal and Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks; Zaremba, Sutskever and
Vinyals, Recurrent Neural Network Regularization (arXiv:1409.2329); Wan et al., Regularization of Neural Networks using
DropConnect; Merity, Keskar and Socher, Regularizing and Optimizing LSTM Language Models (arXiv:1708.02182, AWD-LSTM).

A stream's mask depends on (seed, step, name, row of the global batch), and a mask of all streams on (seed, step, name):
never on the devices, on the logical shards or on other draws.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from charlstm import rng


class DropoutKey(NamedTuple):
    """Determines the masks of one window, wherever they are computed."""

    key: jax.Array  # of the seed and the step
    rows_B: jax.Array  # int32: each row's number in the global batch


def row_mask(dropout_key: DropoutKey, rate: float, name: str, width: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns m of each stream, `[B, width]`."""
    return keep_mask(dropout_key, rate, name, (width,)).astype(dtype) / (1 - rate)


def drop(
    x_TBD: jax.Array, dropout_key: DropoutKey | None, rate: float, name: str, each_symbol: bool = False
) -> jax.Array:
    """Multiplies `x_TBD` by the streams' masks: one for the window, or one for each symbol."""
    if dropout_key is None or not rate:
        return x_TBD
    T, _, D = x_TBD.shape
    if each_symbol:
        return _scaled(x_TBD, keep_mask(dropout_key, rate, name, (T, D)).swapaxes(0, 1), rate)
    return _scaled(x_TBD, keep_mask(dropout_key, rate, name, (D,))[None], rate)


def drop_symbols(
    y_TBK: jax.Array,
    ids_TB: jax.Array,
    vocabulary_size: int,
    dropout_key: DropoutKey | None,
    rate: float,
    name: str,
    each_symbol: bool = False,
) -> jax.Array:
    """Applies `drop` to the one-hot symbols `ids_TB`, given their matmul `y_TBK` with weights W: (m onehot) W."""
    if dropout_key is None or not rate:
        return y_TBK
    if each_symbol:
        kept_BT = keep_mask(dropout_key, rate, name, ids_TB.shape[:1])
    else:
        kept_BT = jnp.take_along_axis(keep_mask(dropout_key, rate, name, (vocabulary_size,)), ids_TB.T, axis=1)
    return _scaled(y_TBK, kept_BT.T[:, :, None], rate)


def drop_rows(w_VE: jax.Array, dropout_key: DropoutKey | None, rate: float, name: str) -> jax.Array:
    """Zeroes rows of `w_VE`, the same for all streams."""
    if dropout_key is None or not rate:
        return w_VE
    return _scaled(w_VE, _kept(rng.named(dropout_key.key, name), rate, (w_VE.shape[0], 1)), rate)


def drop_weights(w_HG: jax.Array, dropout_key: DropoutKey | None, rate: float, name: str) -> jax.Array:
    """Zeroes weights of `w_HG`, the same for all streams."""
    if dropout_key is None or not rate:
        return w_HG
    return _scaled(w_HG, _kept(rng.named(dropout_key.key, name), rate, w_HG.shape), rate)


def _kept(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, 1 - rate, shape)


def keep_mask(dropout_key: DropoutKey, rate: float, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns True where m is not 0, bool `[B, *shape]`."""
    key = rng.named(dropout_key.key, name)
    return jax.vmap(lambda row: _kept(jax.random.fold_in(key, row), rate, shape))(dropout_key.rows_B)


def _scaled(x: jax.Array, kept: jax.Array, rate: float) -> jax.Array:
    # By selection: the backward pass keeps a byte per element of the mask.  In x's own dtype: XLA's fusions may keep a
    # higher precision, and not the same for every number of devices.
    return jnp.where(kept, x * (1 / (1 - rate)), 0)
