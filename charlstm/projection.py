"""Products with weights, and their reverse passes.

Operands of a product are in the compute dtype; the product is accumulated, and the weights' gradient returned, in the
weights' own dtype (float32), so that a bfloat16 model does not round the gradients of its float32 master weights.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x_TBD: jax.Array, w_DK: jax.Array, b_K: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """y = x W + b: `[T, B, K]` in the weights' dtype; operands are rounded to `dtype` first."""
    y_TBK = jnp.einsum("tbd,dk->tbk", x_TBD.astype(dtype), w_DK.astype(dtype), preferred_element_type=w_DK.dtype)
    return y_TBK + b_K[None, None, :]


def _dense_forward(x_TBD, w_DK, b_K, dtype):
    return dense(x_TBD, w_DK, b_K, dtype), (x_TBD, w_DK)


def _dense_reverse(dtype, residuals, dy_TBK):
    # dx = dy W',  dW = x' dy,  db = sum of dy
    x_TBD, w_DK = residuals
    dy = dy_TBK.astype(dtype)
    dx_TBD = jnp.einsum("tbk,dk->tbd", dy, w_DK.astype(dtype), preferred_element_type=w_DK.dtype)
    dw_DK = jnp.einsum("tbd,tbk->dk", x_TBD.astype(dtype), dy, preferred_element_type=w_DK.dtype)
    return dx_TBD.astype(x_TBD.dtype), dw_DK, dy_TBK.sum((0, 1))


dense.defvjp(_dense_forward, _dense_reverse)


@jax.custom_vjp
def lookup(w_VK: jax.Array, ids_TB: jax.Array) -> jax.Array:
    """Row `ids[t, b]` of `w_VK` for each symbol, `[T, B, K]`: the product of the one-hot symbols and W."""
    return w_VK[ids_TB]


def _lookup_forward(w_VK, ids_TB):
    return lookup(w_VK, ids_TB), (w_VK, ids_TB)


def _lookup_reverse(residuals, dy_TBK):
    # dW = onehot' dy, one product.  The scatter-add that autodiff would make sums in an order that a GPU does not fix.
    w_VK, ids_TB = residuals
    onehot_TBV = jax.nn.one_hot(ids_TB, w_VK.shape[0], dtype=dy_TBK.dtype)
    return jnp.einsum("tbv,tbk->vk", onehot_TBV, dy_TBK, preferred_element_type=w_VK.dtype), None


lookup.defvjp(_lookup_forward, _lookup_reverse)
