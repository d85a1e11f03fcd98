"""Cross-entropy against the plain equation, where its exponentials would overflow too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.training.loss import cross_entropy


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_value_and_gradient_are_those_of_the_plain_equation_however_large_the_logits(shift):
    random = np.random.default_rng(0)
    logits = (3 * random.normal(size=(4, 3, 5)) + shift).astype(np.float32)
    targets = random.integers(0, 5, (4, 3))
    nats, pull = jax.vjp(lambda x: cross_entropy(x, jnp.asarray(targets)), jnp.asarray(logits))
    expected = jax.nn.log_softmax(jnp.asarray(logits), axis=2)
    np.testing.assert_allclose(nats, -np.take_along_axis(np.asarray(expected), targets[:, :, None], 2)[:, :, 0], 1e-4)
    weights = random.normal(size=(4, 3)).astype(np.float32)
    gradient = (np.exp(expected) - np.eye(5)[targets]) * weights[:, :, None]
    np.testing.assert_allclose(pull(jnp.asarray(weights))[0], gradient, atol=1e-6)
