"""Initial parameters, float32, by the name of the initializer.

    pytorch     uniform within +-1/sqrt(H), weights and biases, as PyTorch's recurrent layers draw them; the embedding
                normal with standard deviation .3
    uniform     uniform within +-scale, weights and biases, as char-rnn does (with 0.08)
    normal      normal with standard deviation scale; biases 0
    glorot      uniform within +-sqrt(6 / (fan in + fan out)); biases 0.  Glorot and Bengio, AISTATS 2010, equation 16
    orthogonal  recurrent weights orthogonal, all others glorot; biases 0.  Saxe, McClelland and Ganguli, 2014
                (arXiv:1312.6120)

An embedding of the deviation of other weights makes the first layer nearly deaf: one symbol is read at a time, so that
nothing adds up, and hundreds of updates pass before the model tells symbols apart.  PyTorch's own has deviation 1: it
begins faster than .3 and ends a little worse (docs/decisions.md).

Gates are layers of their own: fans are those of one gate, and each gate's block of recurrent weights is orthogonal.
"""

import math

import jax
import jax.numpy as jnp

from charlstm import rng
from charlstm.model.ops import compiler
from charlstm.types import CellParams

EMBEDDING_DEVIATION = 0.3
BLOCK = 64  # rows that are made orthonormal to each other one by one


def embedding(name: str, key: jax.Array, shape: tuple[int, int], *, scale: float, hidden_size: int) -> jax.Array:
    """Draws the embedding of an untied softmax, `[V, E]`; arguments as for `weights`."""
    if name == "pytorch":
        return EMBEDDING_DEVIATION * jax.random.normal(key, shape, jnp.float32)
    return weights(name, key, shape, scale=scale, hidden_size=hidden_size)


def weights(name: str, key: jax.Array, shape: tuple[int, int], *, scale: float, hidden_size: int) -> jax.Array:
    """Draws a matrix of weights, `[inputs, outputs]`, that is not recurrent.

    Args:
      name: the initializer.
      shape: (fan in, fan out).
      scale: of "uniform" and "normal"; the others ignore it.
      hidden_size: H of "pytorch"; the others ignore it.
    """
    match name:
        case "pytorch":
            return _uniform(key, shape, 1 / math.sqrt(hidden_size))
        case "uniform":
            return _uniform(key, shape, scale)
        case "normal":
            return scale * jax.random.normal(key, shape, jnp.float32)
        case "glorot" | "orthogonal":
            return _uniform(key, shape, math.sqrt(6 / sum(shape)))
    raise AssertionError(f"no initializer is called {name!r}")


def recurrent_weights(name: str, key: jax.Array, hidden_size: int, *, scale: float) -> jax.Array:
    """Draws one gate's block of recurrent weights, `[H, H]`; arguments as for `weights`."""
    if name == "orthogonal":
        return _orthogonal(key, hidden_size)
    return weights(name, key, (hidden_size, hidden_size), scale=scale, hidden_size=hidden_size)


def biases(name: str, key: jax.Array, width: int, *, scale: float, hidden_size: int) -> jax.Array:
    """Draws a vector of biases, `[width]`; arguments as for `weights`."""
    if name in ("pytorch", "uniform"):
        return _uniform(key, (width,), 1 / math.sqrt(hidden_size) if name == "pytorch" else scale)
    return jnp.zeros((width,), jnp.float32)


def layer(name: str, key: jax.Array, input_width: int, hidden_size: int, gates: int, *, scale: float) -> CellParams:
    """Draws a recurrent layer of `gates` gates, each of its blocks by itself from a named key."""

    def side_by_side(weight, draw):
        return jnp.concatenate([draw(rng.named(key, f"{weight} gate {gate}")) for gate in range(gates)], axis=-1)

    def bias(key):
        return biases(name, key, hidden_size, scale=scale, hidden_size=hidden_size)

    def w_x(key):
        return weights(name, key, (input_width, hidden_size), scale=scale, hidden_size=hidden_size)

    def w_h(key):
        return recurrent_weights(name, key, hidden_size, scale=scale)

    return CellParams(
        w_x=side_by_side("w_x", w_x),
        w_h=side_by_side("w_h", w_h),
        b_x=side_by_side("b_x", bias),
        b_h=side_by_side("b_h", bias),
    )


def _uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def _orthogonal(key: jax.Array, size: int) -> jax.Array:
    """Draws an orthogonal matrix uniformly.  Mezzadri, Notices of the AMS 54(5), 2007 (math-ph/0609050).

    It is the Q of a Gaussian matrix whose R has a positive diagonal, which leaves one Q only, and that a uniform one.
    """
    return _orthonormal_rows(jax.random.normal(key, (size, size), jnp.float32).T).T


@compiler.jit
def _orthonormal_rows(a_HH: jax.Array) -> jax.Array:
    """Gram-Schmidt, a block of rows at a time: row by row within it, by products against the rows before it.

    LAPACK's QR has other bits on another number of cores.  Each block is gone through twice: of some rows little is
    left the first time, with all of its rounding.
    """
    H, size = len(a_HH), min(BLOCK, len(a_HH))

    def one_row(k: jax.Array, rows_SH: jax.Array) -> jax.Array:
        along_S = jnp.where(jnp.arange(size) < k, (rows_SH * rows_SH[k][None]).sum(1), 0)
        left_H = rows_SH[k] - (along_S[:, None] * rows_SH).sum(0)
        return rows_SH.at[k].set(left_H / jnp.linalg.norm(left_H))

    def one_block(number: jax.Array, q_HH: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, H - size)  # the last one reaches back to be whole
        rows_SH = jax.lax.dynamic_slice_in_dim(q_HH, start, size)
        for _ in range(2):
            along_SH = jnp.where(jnp.arange(H)[None] < start, jnp.matmul(rows_SH, q_HH.T, precision="highest"), 0)
            rows_SH = rows_SH - jnp.matmul(along_SH, q_HH, precision="highest")
            rows_SH = jax.lax.fori_loop(0, size, one_row, rows_SH)
        return jax.lax.dynamic_update_slice_in_dim(q_HH, rows_SH, start, 0)

    return jax.lax.fori_loop(0, -(-H // size), one_block, a_HH)
