"""What a CPU does otherwise where weights are large: the products themselves stay what they are, as elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.model.ops import matmul

pytestmark = pytest.mark.gpu

B, D, K = 4, 3, 5
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["x W", "x W'"])


@pytest.fixture(params=["a CPU's", "a GPU's"], autouse=True)
def on_cpu(request, monkeypatch) -> bool:
    """True where matmuls are done as on a CPU; else as on every other device, which a CPU can do, too."""
    if request.param == "a GPU's":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))
        return False
    return jax.default_backend() == "cpu"


@REVERSE
@pytest.mark.parametrize(("large", "on_the_left"), [(15, True), (16, False)])
def test_large_weights_are_on_the_left_and_give_the_same_product(reverse, large, on_the_left, on_cpu, monkeypatch):
    monkeypatch.setattr(matmul, "LARGE", large)
    random = np.random.default_rng(0)
    w = random.normal(size=(D, K)).astype(np.float32)
    weights = w.T if reverse else w
    x = random.normal(size=(B, len(weights))).astype(np.float32)
    for compute_dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.03)):
        program = jax.jit(
            lambda x, d=compute_dtype: matmul.recurrent_matmul(jnp.asarray(w), d, jnp.float32, transpose=reverse)(x)
        )
        y = program(x)
        assert (y.shape, y.dtype) == ((B, weights.shape[1]), np.float32)
        np.testing.assert_allclose(y, x @ weights, atol=tolerance)
        of_the_transpose = f"tensor<{weights.shape[1]}x{B}xf32>"  # the product's own type, then
        assert (of_the_transpose in program.lower(x).as_text()) == (on_the_left and on_cpu)


@pytest.mark.parametrize(("part", "parts"), [(7, 12), (8, 6), (12, 4), (47, 2), (48, 1)])
def test_a_window_may_be_projected_in_parts_and_the_gradient_of_an_input_taken_so(part, parts, on_cpu, monkeypatch):
    T = 12
    monkeypatch.setattr(matmul, "LARGE", 1)
    monkeypatch.setattr(matmul, "PART", part)
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w, b, dy = (jnp.asarray(random.normal(size=s)) for s in ((T, B, D), (D, K), (K,), (T, B, K)))
        taken = parts if parts in (2, 4, 6) else 1  # symbols one by one would be less than a part
        for given, expected in ((b, x @ w + b[None, None]), (None, x @ w)):
            project = jax.jit(lambda x, b=given: matmul.dense(x, w, b, jnp.float64))
            gradient = jax.jit(jax.grad(lambda x, b=given: (matmul.dense(x, w, b, jnp.float64) * dy).sum()))
            for program, value in ((project, expected), (gradient, dy @ w.T)):
                np.testing.assert_allclose(program(x), value, rtol=1e-12)
                in_parts = f"tensor<{taken}x{T * B // taken}x" in program.lower(x).as_text()
                assert in_parts == (taken > 1 and on_cpu)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_recurrent_weights_is_of_what_each_symbol_saw(masked, dtype):
    T = 6
    random = np.random.default_rng(0)
    first, h, dy = (random.normal(size=shape).astype(np.float32) for shape in ((B, D), (T, B, D), (T, B, K)))
    reset, mask = random.random((T, B)) < 0.3, random.random((B, D)).astype(np.float32) if masked else None
    h = np.asarray(jnp.asarray(h, dtype), np.float32)  # as the window gives it
    seen = np.where(reset[:, :, None], 0, np.concatenate([first[None], h[:-1]])) * (1 if mask is None else mask)
    gradient = jax.jit(
        lambda *args: matmul.recurrent_weight_gradient(*args, mask_BH=mask, dy_TBK=dy, compute_dtype=dtype)
    )(first, h.astype(dtype), reset)
    assert gradient.dtype == jnp.float32
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(gradient, np.einsum("tbd,tbk->dk", seen, dy), atol=tolerance)
