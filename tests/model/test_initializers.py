"""What the parameters are at the start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.config.model import ModelConfig
from charlstm.model import initializers, language_model

NAMES = ("pytorch", "uniform", "normal", "glorot", "orthogonal")
D, H, GATES, SCALE = 40, 64, 4, 0.08


def layer(name, **changes):
    sizes = {"input_width": D, "hidden_size": H, "gates": GATES, "scale": SCALE} | changes
    return initializers.layer(name, jax.random.key(0), **sizes)


def assert_uniform(values, limit):
    """Within +-limit, out to its ends, and with the deviation and mean of a uniform distribution."""
    assert 0.95 * limit < jnp.abs(values).max() <= limit
    np.testing.assert_allclose(values.std(), limit / math.sqrt(3), rtol=0.1)
    assert jnp.abs(values.mean()) < 0.15 * limit


@pytest.mark.parametrize(("name", "limit"), [("pytorch", 1 / math.sqrt(H)), ("uniform", SCALE)])
def test_pytorch_and_uniform_draw_weights_and_biases_within_one_limit(name, limit):
    for values in jax.tree.leaves(layer(name)):
        assert_uniform(values, limit)


@pytest.mark.parametrize(("tied", "deviation"), [(False, 0.3), (True, 1 / math.sqrt(3 * H))])
def test_the_embedding_is_drawn_for_the_one_symbol_that_is_read_unless_the_softmax_shares_it(tied, deviation):
    config = ModelConfig(hidden_size=H, embedding_size=H, tie_embeddings=tied)
    embedding = language_model.init(config, 100, jax.random.key(0)).embedding
    np.testing.assert_allclose(embedding.std(), deviation, rtol=0.05)
    assert abs(float(embedding.mean())) < 0.05 * deviation


def test_normal_weights_have_the_deviation_asked_for_and_no_bias():
    params = layer("normal")
    for values in (params.w_x, params.w_h):
        np.testing.assert_allclose(values.std(), SCALE, rtol=0.05)
        assert jnp.abs(values).max() > 3 * SCALE
    assert not params.b_x.any() and not params.b_h.any()


def test_glorot_weights_keep_to_the_limit_of_one_gate():
    params = layer("glorot")
    assert_uniform(params.w_x, math.sqrt(6 / (D + H)))
    assert_uniform(params.w_h, math.sqrt(6 / (H + H)))
    assert not params.b_x.any() and not params.b_h.any()


@pytest.mark.parametrize("H", [1, 3, 64, 150])
def test_each_gates_recurrent_block_is_orthogonal_and_the_inputs_are_glorot(H):
    params = layer("orthogonal", hidden_size=H)
    for block in jnp.split(params.w_h, GATES, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(H), atol=1e-5)
    if H > 3:
        assert_uniform(params.w_x, math.sqrt(6 / (D + H)))
    assert not params.b_x.any() and not params.b_h.any()


def test_an_orthogonal_matrix_is_the_q_whose_r_has_a_positive_diagonal():
    key, size = jax.random.key(4), 2 * initializers.BLOCK + 9
    q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (size, size), jnp.float32), np.float64))
    found = initializers.recurrent_weights("orthogonal", key, size, scale=0.0)
    np.testing.assert_allclose(found, q * np.sign(np.diagonal(r)), atol=1e-5)


def test_orthogonal_matrices_favour_no_direction():
    """The trace of a uniform one has mean 0 and variance 1; that of a bare Q of Householder's QR does not."""
    traces = jnp.stack(
        [jnp.trace(initializers.recurrent_weights("orthogonal", jax.random.key(n), 3, scale=0.0)) for n in range(200)]
    )
    assert abs(float(traces.mean())) < 4 / math.sqrt(200)
    np.testing.assert_allclose(traces.var(), 1.0, rtol=0.4)


@pytest.mark.parametrize("name", NAMES)
def test_no_block_of_a_layer_repeats_another_and_the_same_key_draws_the_same(name):
    params = layer(name, input_width=H)  # square blocks, so that a repetition would be seen
    blocks = [b for w in (params.w_x, params.w_h) for b in jnp.split(w, GATES, axis=1)]
    for n, block in enumerate(blocks):
        assert not any((block == other).any() for other in blocks[:n])
    jax.tree.map(np.testing.assert_array_equal, params, layer(name, input_width=H))


@pytest.mark.parametrize("name", NAMES)
def test_a_gates_block_does_not_depend_on_how_many_gates_follow(name):
    one, four = layer(name, gates=1), layer(name)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[..., :H]), one, four)


@pytest.mark.parametrize("name", NAMES)
def test_all_parameters_are_float32(name):
    assert {w.dtype for w in jax.tree.leaves(layer(name))} == {jnp.dtype("float32")}
