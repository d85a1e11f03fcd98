"""Matmuls with weights, with a fixed order of summation and CPU layouts, and their backward passes.

Operands are in the compute dtype.  Sums are accumulated, and weight gradients returned, in the weights' own dtype
(float32): a bfloat16 model does not round the gradients of its float32 master weights.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# On a CPU, matmuls with weights of LARGE or more elements are done differently; measured in docs/decisions.md.
LARGE = 1 << 19
PART = 640  # rows of a window's matmul at a time


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x_TBD: jax.Array, w_DK: jax.Array, b_K: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Returns x W + b, or x W: `[T, B, K]` in the weights' dtype; operands are rounded to `dtype` first."""
    y_TBK = window_matmul(x_TBD.astype(dtype), w_DK)
    return y_TBK if b_K is None else y_TBK + b_K[None, None, :]


def _dense_forward(x_TBD, w_DK, b_K, dtype):
    return dense(x_TBD, w_DK, b_K, dtype), (x_TBD, w_DK, b_K)


def _dense_backward(dtype, residuals, dy_TBK):
    # dx = dy W'
    x_TBD, w_DK, b_K = residuals
    return (
        window_matmul(dy_TBK.astype(dtype), w_DK, transpose=True).astype(x_TBD.dtype),
        weight_gradient(x_TBD, dy_TBK, dtype, w_DK.dtype),
        None if b_K is None else bias_gradient(dy_TBK, w_DK.dtype),
    )


dense.defvjp(_dense_forward, _dense_backward)


def window_matmul(x_TBD: jax.Array, w_DK: jax.Array, *, transpose: bool = False) -> jax.Array:
    """Returns x W, or x W', `[T, B, .]` in the weights' dtype; on a CPU by parts of the window, to fit its cache."""
    T, B, _ = x_TBD.shape
    size = next(size for size in range(T, 0, -1) if T % size == 0 and (size * B <= PART or size == 1))

    def whole(x_TBD: jax.Array) -> jax.Array:
        axes, w = "tbk,dk->tbd" if transpose else "tbd,dk->tbk", w_DK.astype(x_TBD.dtype)
        return jnp.einsum(axes, x_TBD, w, preferred_element_type=w_DK.dtype)

    def by_parts(x_TBD: jax.Array) -> jax.Array:
        w, parts = w_DK.astype(x_TBD.dtype), x_TBD.reshape(T // size, size * B, -1)
        w = materialize_transpose(w, w.dtype) if transpose else w
        y = jax.lax.map(lambda x_ND: jnp.dot(x_ND, w, preferred_element_type=w_DK.dtype), parts)
        return y.reshape(T, B, -1)

    if w_DK.size < LARGE or size in (1, T):
        return whole(x_TBD)
    return jax.lax.platform_dependent(x_TBD, cpu=by_parts, default=whole)


def materialize_transpose(w_DK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns W', `[K, D]` in `dtype`, as an array of its own: XLA would fold the transpose into the matmuls.

    Row-major, as the order in which XLA:CPU sums a product of one row goes by the layout of the weights.
    """
    return jax.lax.optimization_barrier(row_major(w_DK.astype(dtype).T))


def recurrent_matmul(
    w_DK: jax.Array, compute_dtype: jax.typing.DTypeLike, dtype: jax.typing.DTypeLike, *, transpose: bool = False
) -> Callable[[jax.Array], jax.Array]:
    """Returns the matmul of every symbol: x -> x W, or x W', of `[B, .]`, accumulated in `dtype`.

    W is prepared once, before the loop.  On a CPU a large W is the left operand: as the right one it would be laid out
    anew for each matmul.
    """
    w, w_T = w_DK.astype(compute_dtype), materialize_transpose(w_DK, compute_dtype)
    right, left = (w_T, w) if transpose else (w, w_T)

    def on_the_right(x_BD: jax.Array) -> jax.Array:
        return jnp.dot(x_BD, right, preferred_element_type=dtype)

    def on_the_left(x_BD: jax.Array) -> jax.Array:
        y_KB = jax.lax.dot_general(left, x_BD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return row_major(jax.lax.optimization_barrier(y_KB).T)  # without it, XLA makes this `on_the_right`

    def matmul(x_BD: jax.Array) -> jax.Array:
        x_BD = x_BD.astype(compute_dtype)
        if w_DK.size < LARGE:
            return on_the_right(x_BD)
        return jax.lax.platform_dependent(x_BD, cpu=on_the_left, default=on_the_right)

    return matmul


def row_major(array: jax.Array) -> jax.Array:
    """Forces a row-major layout; otherwise XLA:CPU transposes again in every consumer."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def weight_gradient(
    x_TBD: jax.Array, dy_TBK: jax.Array, compute_dtype: jax.typing.DTypeLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns dW = x' dy, `[D, K]` in `dtype`: the sum over all symbols of all streams, as one matmul.

    On a CPU the transpose is materialized first: XLA leaves a matmul with a transposed left operand to a library whose
    order of summation depends on the number of threads.
    """
    x_TBD, dy_NK = x_TBD.astype(compute_dtype), dy_TBK.astype(compute_dtype).reshape(-1, dy_TBK.shape[2])

    def of_columns(x_TBD: jax.Array, dy_NK: jax.Array) -> jax.Array:
        return _matmul_of_columns(_columns(x_TBD), dy_NK, dtype)

    return jax.lax.platform_dependent(x_TBD, dy_NK, cpu=of_columns, default=partial(_matmul_of_rows, dtype=dtype))


def recurrent_weight_gradient(
    first_BH: jax.Array,
    h_TBH: jax.Array,
    reset_TB: jax.Array,
    mask_BH: jax.Array | None,
    dy_TBK: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Returns dW = s' dy, as `weight_gradient`, with s the h before each symbol; in the dtype of `first_BH`.

    On a CPU h is transposed before it is shifted by a symbol: a transpose that XLA fuses with anything else takes 4 to
    10 times as long.

    Args:
      first_BH: h before the window.
      reset_TB: where True, s is zero.
      mask_BH: multiplies s; None for no mask.
    """
    dtype, first_BH = first_BH.dtype, first_BH.astype(h_TBH.dtype)
    dy_NK = dy_TBK.astype(compute_dtype).reshape(-1, dy_TBK.shape[2])

    def of_columns(first_BH: jax.Array, h_TBH: jax.Array, dy_NK: jax.Array) -> jax.Array:
        s_HTB = jnp.concatenate([first_BH.T[:, None], _columns(h_TBH)[:, :-1]], axis=1)
        s_HTB = jnp.where(reset_TB[None], 0, s_HTB)
        s_HTB = s_HTB if mask_BH is None else s_HTB.astype(dtype) * mask_BH.T[:, None]
        return _matmul_of_columns(jax.lax.optimization_barrier(s_HTB.astype(compute_dtype)), dy_NK, dtype)

    def of_rows(first_BH: jax.Array, h_TBH: jax.Array, dy_NK: jax.Array) -> jax.Array:
        s_TBH = jnp.where(reset_TB[:, :, None], 0, jnp.concatenate([first_BH[None], h_TBH[:-1]]))
        s_TBH = s_TBH if mask_BH is None else s_TBH.astype(dtype) * mask_BH[None]
        return _matmul_of_rows(s_TBH.astype(compute_dtype), dy_NK, dtype)

    return jax.lax.platform_dependent(first_BH, h_TBH, dy_NK, cpu=of_columns, default=of_rows)


def _columns(x_TBD: jax.Array) -> jax.Array:
    """Returns x', `[D, T, B]`, as an array of its own.  With three axes: XLA would fold a matrix into the matmul."""
    return jax.lax.optimization_barrier(row_major(x_TBD.transpose(2, 0, 1)))


def _matmul_of_columns(x_DTB: jax.Array, dy_NK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    # The barrier stops XLA from rewriting this as a transposed dot when the transpose is used too (tied weights).
    x_DN = x_DTB.reshape(len(x_DTB), -1)
    return jax.lax.optimization_barrier(jnp.dot(x_DN, dy_NK, preferred_element_type=dtype))


def _matmul_of_rows(x_TBD: jax.Array, dy_NK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.dot(x_TBD.reshape(len(dy_NK), -1).T, dy_NK, preferred_element_type=dtype)


def bias_gradient(dy_TBK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns db, the sum of dy over all symbols of all streams, `[K]` in `dtype`.

    As a matmul with ones, whose bits do not depend on the number of threads; those of a sum do.  With two rows: XLA
    leaves a matmul of one row to another library, which takes ten times as long in bfloat16.
    """
    dy_NK = dy_TBK.reshape(-1, dy_TBK.shape[2])
    return jnp.dot(jnp.ones((2, len(dy_NK)), dy_NK.dtype), dy_NK, preferred_element_type=dtype)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(w_VK: jax.Array, ids_TB: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Embedding lookup: row `ids[t, b]` of `w_VK` for each symbol, `[T, B, K]`; `dtype`, static, as of `dense`."""
    return w_VK[ids_TB]


def _lookup_forward(w_VK, ids_TB, dtype):
    return lookup(w_VK, ids_TB, dtype), (w_VK, ids_TB)


def _lookup_backward(dtype, residuals, dy_TBK):
    # dW = onehot' dy, one matmul.  Autodiff would make a scatter-add, whose order of summation a GPU does not fix.
    w_VK, ids_TB = residuals
    return weight_gradient(jax.nn.one_hot(ids_TB, w_VK.shape[0], dtype=dtype), dy_TBK, dtype, w_VK.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
