"""Products with weights, and their reverse passes.

Operands of a product are in the compute dtype; the product is accumulated, and the weights' gradient returned, in the
weights' own dtype (float32), so that a bfloat16 model does not round the gradients of its float32 master weights.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# What is done otherwise on a CPU, of products with LARGE weights or more elements; measured in docs/decisions.md.
LARGE = 1 << 19
PART = 640  # of a whole window: so many rows at a time


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x_TBD: jax.Array, w_DK: jax.Array, b_K: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """y = x W + b, or x W: `[T, B, K]` in the weights' dtype; operands are rounded to `dtype` first."""
    y_TBK = window_matmul(x_TBD.astype(dtype), w_DK)
    return y_TBK if b_K is None else y_TBK + b_K[None, None, :]


def _dense_forward(x_TBD, w_DK, b_K, dtype):
    return dense(x_TBD, w_DK, b_K, dtype), (x_TBD, w_DK, b_K)


def _dense_reverse(dtype, residuals, dy_TBK):
    # dx = dy W'
    x_TBD, w_DK, b_K = residuals
    return (
        window_matmul(dy_TBK.astype(dtype), w_DK, reverse=True).astype(x_TBD.dtype),
        weight_gradient(x_TBD, dy_TBK, dtype, w_DK.dtype),
        None if b_K is None else bias_gradient(dy_TBK, w_DK.dtype),
    )


dense.defvjp(_dense_forward, _dense_reverse)


def window_matmul(x_TBD: jax.Array, w_DK: jax.Array, *, reverse: bool = False) -> jax.Array:
    """x W, or in reverse x W', `[T, B, .]` in the weights' dtype; on a CPU by parts of the window, for its cache."""
    T, B, _ = x_TBD.shape
    size = next(size for size in range(T, 0, -1) if T % size == 0 and (size * B <= PART or size == 1))

    def whole(x_TBD: jax.Array) -> jax.Array:
        axes, w = "tbk,dk->tbd" if reverse else "tbd,dk->tbk", w_DK.astype(x_TBD.dtype)
        return jnp.einsum(axes, x_TBD, w, preferred_element_type=w_DK.dtype)

    def by_parts(x_TBD: jax.Array) -> jax.Array:
        w, parts = w_DK.astype(x_TBD.dtype), x_TBD.reshape(T // size, size * B, -1)
        w = materialize_transpose(w, w.dtype) if reverse else w
        y = jax.lax.map(lambda x_ND: jnp.dot(x_ND, w, preferred_element_type=w_DK.dtype), parts)
        return y.reshape(T, B, -1)

    if w_DK.size < LARGE or size in (1, T):
        return whole(x_TBD)
    return jax.lax.platform_dependent(x_TBD, cpu=by_parts, default=whole)


def materialize_transpose(w_DK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """W', `[K, D]` in `dtype`, as an array of its own: XLA would take the transposition into the products."""
    return jax.lax.optimization_barrier(w_DK.astype(dtype).T)


def recurrent_matmul(
    w_DK: jax.Array, compute_dtype: jax.typing.DTypeLike, dtype: jax.typing.DTypeLike, *, reverse: bool = False
) -> Callable[[jax.Array], jax.Array]:
    """x -> x W, or in reverse x W', of `[B, .]` and accumulated in `dtype`: a product that is made at every symbol.

    What can be prepared is, before the loop.  On a CPU, W is on the left where it is large: on the right it would be
    laid out anew for each product.
    """
    as_it_is, turned = w_DK.astype(compute_dtype), materialize_transpose(w_DK, compute_dtype)
    from_rows, from_columns = (turned, as_it_is) if reverse else (as_it_is, turned)

    def on_the_right(x_BD: jax.Array) -> jax.Array:
        return jnp.dot(x_BD, from_rows, preferred_element_type=dtype)

    def on_the_left(x_BD: jax.Array) -> jax.Array:
        y_KB = jax.lax.dot_general(from_columns, x_BD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return row_major(jax.lax.optimization_barrier(y_KB).T)  # not held, it would be turned into the other one

    def product(x_BD: jax.Array) -> jax.Array:
        x_BD = x_BD.astype(compute_dtype)
        if w_DK.size < LARGE:
            return on_the_right(x_BD)
        return jax.lax.platform_dependent(x_BD, cpu=on_the_left, default=on_the_right)

    return product


def row_major(array: jax.Array) -> jax.Array:
    """`array` laid out in the order of its axes: a transposition, XLA otherwise has each reader make for itself."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def weight_gradient(
    x_TBD: jax.Array, dy_TBK: jax.Array, compute_dtype: jax.typing.DTypeLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """dW = x' dy, `[D, K]` in `dtype`: the sum over all symbols of all streams, as one product.

    On a CPU the transposition is held before it: a product whose left side is read transposed XLA leaves there to a
    library that sums in an order which depends on the number of threads.
    """
    x_TBD, dy_NK = x_TBD.astype(compute_dtype), dy_TBK.astype(compute_dtype).reshape(-1, dy_TBK.shape[2])

    def held(x_TBD: jax.Array, dy_NK: jax.Array) -> jax.Array:
        return _product_of_columns(_columns(x_TBD), dy_NK, dtype)

    return jax.lax.platform_dependent(x_TBD, dy_NK, cpu=held, default=partial(_product_of_rows, dtype=dtype))


def recurrent_weight_gradient(
    first_BH: jax.Array,
    h_TBH: jax.Array,
    reset_TB: jax.Array,
    mask_BH: jax.Array | None,
    dy_TBK: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """dW = s' dy, as `weight_gradient`, where s at each symbol is h after the one before; in the dtype of `first_BH`.

    On a CPU h is turned before it is moved by a symbol, since a transposition that XLA makes together with anything
    else takes 4 to 10 times as long.

    Args:
      first_BH: h before the window.
      reset_TB: where True, s is zero.
      mask_BH: s is that times this; None for no mask.
    """
    dtype, first_BH = first_BH.dtype, first_BH.astype(h_TBH.dtype)
    dy_NK = dy_TBK.astype(compute_dtype).reshape(-1, dy_TBK.shape[2])

    def of_columns(first_BH: jax.Array, h_TBH: jax.Array, dy_NK: jax.Array) -> jax.Array:
        s_HTB = jnp.concatenate([first_BH.T[:, None], _columns(h_TBH)[:, :-1]], axis=1)
        s_HTB = jnp.where(reset_TB[None], 0, s_HTB)
        s_HTB = s_HTB if mask_BH is None else s_HTB.astype(dtype) * mask_BH.T[:, None]
        return _product_of_columns(jax.lax.optimization_barrier(s_HTB.astype(compute_dtype)), dy_NK, dtype)

    def of_rows(first_BH: jax.Array, h_TBH: jax.Array, dy_NK: jax.Array) -> jax.Array:
        s_TBH = jnp.where(reset_TB[:, :, None], 0, jnp.concatenate([first_BH[None], h_TBH[:-1]]))
        s_TBH = s_TBH if mask_BH is None else s_TBH.astype(dtype) * mask_BH[None]
        return _product_of_rows(s_TBH.astype(compute_dtype), dy_NK, dtype)

    return jax.lax.platform_dependent(first_BH, h_TBH, dy_NK, cpu=of_columns, default=of_rows)


def _columns(x_TBD: jax.Array) -> jax.Array:
    """x', `[D, T, B]`, as an array of its own.  Of three axes: that of a matrix XLA would fold into the product."""
    return jax.lax.optimization_barrier(row_major(x_TBD.transpose(2, 0, 1)))


def _product_of_columns(x_DTB: jax.Array, dy_NK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Held: XLA would turn it into the one of the transposed sides where its transposition is wanted (tied weights)."""
    x_DN = x_DTB.reshape(len(x_DTB), -1)
    return jax.lax.optimization_barrier(jnp.dot(x_DN, dy_NK, preferred_element_type=dtype))


def _product_of_rows(x_TBD: jax.Array, dy_NK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.dot(x_TBD.reshape(len(dy_NK), -1).T, dy_NK, preferred_element_type=dtype)


def bias_gradient(dy_TBK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """db, the sum of dy over all symbols of all streams, `[K]` in `dtype`.

    As a product with ones, whose bits are those of any number of threads; those of a sum are not.  Of two rows, since a
    product of one row XLA leaves to the other library, which takes ten times as long for it in bfloat16.
    """
    dy_NK = dy_TBK.reshape(-1, dy_TBK.shape[2])
    return jnp.dot(jnp.ones((2, len(dy_NK)), dy_NK.dtype), dy_NK, preferred_element_type=dtype)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(w_VK: jax.Array, ids_TB: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Row `ids[t, b]` of `w_VK` for each symbol, `[T, B, K]`: the product of the one-hot symbols and W.

    Args:
      dtype: that of the products' operands; static.
    """
    return w_VK[ids_TB]


def _lookup_forward(w_VK, ids_TB, dtype):
    return lookup(w_VK, ids_TB, dtype), (w_VK, ids_TB)


def _lookup_reverse(dtype, residuals, dy_TBK):
    # dW = onehot' dy, one product.  The scatter-add that autodiff would make sums in an order that a GPU does not fix.
    w_VK, ids_TB = residuals
    return weight_gradient(jax.nn.one_hot(ids_TB, w_VK.shape[0], dtype=dtype), dy_TBK, dtype, w_VK.dtype), None


lookup.defvjp(_lookup_forward, _lookup_reverse)
