"""Cross-entropy of the next symbol, in nats: always a sum; whoever reports it divides by the count, once."""

import math

import jax
import jax.numpy as jnp

NATS_PER_BIT = math.log(2.0)


@jax.custom_vjp
def cross_entropy(logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """-log p(target) of each symbol, `[T, B]` nats: logsumexp(logits) - logits[target]."""
    picked_TB1 = jnp.take_along_axis(logits_TBV, targets_TB[:, :, None], axis=2)
    return jax.nn.logsumexp(logits_TBV, axis=2) - picked_TB1[:, :, 0]


def _cross_entropy_forward(logits_TBV, targets_TB):
    return cross_entropy(logits_TBV, targets_TB), (logits_TBV, targets_TB)


def _cross_entropy_reverse(residuals, dnats_TB):
    # dlogits = softmax(logits) - onehot(target): elementwise, where autodiff would scatter.
    logits_TBV, targets_TB = residuals
    onehot_TBV = jax.nn.one_hot(targets_TB, logits_TBV.shape[2], dtype=logits_TBV.dtype)
    return (jax.nn.softmax(logits_TBV, axis=2) - onehot_TBV) * dnats_TB[:, :, None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_reverse)
