"""What a CPU does otherwise where weights are large: the products themselves stay what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import projection

B, D, K = 4, 3, 5


@pytest.mark.parametrize(("part", "parts"), [(7, 12), (8, 6), (12, 4), (47, 2), (48, 1)])
def test_the_gradient_of_an_input_may_be_taken_in_parts_of_the_window(part, parts, monkeypatch):
    T = 12
    monkeypatch.setattr(projection, "LARGE", 1)
    monkeypatch.setattr(projection, "PART", part)
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w, b, dy = (jnp.asarray(random.normal(size=s)) for s in ((T, B, D), (D, K), (K,), (T, B, K)))
        gradient = jax.jit(jax.grad(lambda x: (projection.dense(x, w, b, jnp.float64) * dy).sum()))
        np.testing.assert_allclose(gradient(x), dy @ w.T, rtol=1e-12)
        taken = parts if parts in (2, 4, 6) else 1  # symbols one by one would be less than a part
        assert (f"tensor<{taken}x" in gradient.lower(x).as_text()) == (taken > 1)
