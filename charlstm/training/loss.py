"""Cross-entropy of the next symbol, in nats, and penalties of activations: sums over symbols; the step divides once.

Every symbol of a training window counts; in evaluation, inference/evaluate.py masks those that are not to be scored.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.config.training import OptimizerConfig

NATS_PER_BIT = math.log(2.0)


@jax.custom_vjp
def cross_entropy(logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """-log p(target) of each symbol, `[T, B]` nats: logsumexp(logits) - logits[target]."""
    return _cross_entropy_forward(logits_TBV, targets_TB)[0]


def _cross_entropy_forward(logits_TBV, targets_TB):
    greatest_TB1 = logits_TBV.max(2, keepdims=True)
    sum_TB1 = jnp.exp(logits_TBV - greatest_TB1).sum(2, keepdims=True)
    picked_TB1 = jnp.take_along_axis(logits_TBV, targets_TB[:, :, None], axis=2)
    nats_TB = (jnp.log(sum_TB1) + greatest_TB1 - picked_TB1)[:, :, 0]
    return nats_TB, (logits_TBV, greatest_TB1, sum_TB1, targets_TB)


def _cross_entropy_reverse(residuals, dnats_TB):
    # dlogits = softmax(logits) - onehot(target): elementwise, where autodiff would scatter.
    logits_TBV, greatest_TB1, sum_TB1, targets_TB = residuals
    softmax_TBV = jnp.exp(logits_TBV - greatest_TB1) / sum_TB1
    onehot_TBV = jax.nn.one_hot(targets_TB, logits_TBV.shape[2], dtype=logits_TBV.dtype)
    return (softmax_TBV - onehot_TBV) * dnats_TB[:, :, None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_reverse)


@jax.custom_vjp
def _apart(x: jax.Array) -> jax.Array:
    """Returns `x`; its gradient is rounded before it is added to another.

    The `where` changes no value.  It keeps XLA from contracting a product with an addition, which it would do for some
    numbers of devices and not for others.
    """
    return x


_apart.defvjp(lambda x: (x, x), lambda x, dx: (jnp.where(jnp.isnan(x), x, dx),))


def activation_penalties(
    config: OptimizerConfig, features_TBH: jax.Array, dropped_TBH: jax.Array, reset_TB: jax.Array
) -> jax.Array:
    """AR and TAR of h, summed over all symbols; m h is h after dropout.  Divided by the count they are

        activation_penalty mean((m h_t)^2)  +  activation_change_penalty mean((h_t - h_{t-1})^2)

    Source: Merity, McCann and Socher, Revisiting Activation Regularization for Language RNNs (arXiv:1708.01009); the
    means, as in their AWD-LSTM, are over units too.  The T - 1 changes of a window are those within it, and none is
    counted where a stream is reset.

    Args:
      features_TBH, dropped_TBH: h and m h, in the compute dtype.
      reset_TB: bool; True where the stream's state was zeroed before the symbol.

    Returns:
      Nats, a scalar of the precision of float32 at least.
    """
    dtype = np.promote_types(features_TBH.dtype, np.float32)
    T, _, H = features_TBH.shape
    total = jnp.zeros((), dtype)
    if config.activation_penalty:
        total += config.activation_penalty / H * jnp.square(_apart(dropped_TBH.astype(dtype))).sum()
    if config.activation_change_penalty and T > 1:
        h_TBH = _apart(features_TBH.astype(dtype))
        change_TBH = _apart(jnp.where(reset_TB[1:, :, None], 0, h_TBH[1:] - h_TBH[:-1]))
        total += config.activation_change_penalty / H * T / (T - 1) * jnp.square(change_TBH).sum()
    return total
