"""The update rules against optax and against numbers worked by hand; clipping and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm.config.training import OptimizerConfig
from charlstm.training import optimizers
from charlstm.types import CellParams, ModelParams

NUM_UPDATES = 100
RATES = 0.02 * (0.5 + np.random.default_rng(7).random(NUM_UPDATES))  # a learning rate that changes at every update

CASES = {
    "sgd": (dict(optimizer="sgd"), optax.sgd),
    "sgd, momentum": (dict(optimizer="sgd", momentum=0.9), lambda r: optax.sgd(r, momentum=0.9)),
    # optax has adagrad's epsilon inside the root: alike only where it is too small to matter.
    "adagrad": (dict(optimizer="adagrad", epsilon=1e-30), lambda r: optax.adagrad(r, 0.0, eps=1e-30)),
    "rmsprop": (dict(optimizer="rmsprop"), lambda r: optax.rmsprop(r, decay=0.95, eps_in_sqrt=False)),
    "rmsprop, other": (
        dict(optimizer="rmsprop", rms_decay=0.8, epsilon=0.03),
        lambda r: optax.rmsprop(r, decay=0.8, eps=0.03, eps_in_sqrt=False),
    ),
    "adam": (dict(optimizer="adam"), optax.adam),
    "adam, beta1 0": (
        dict(optimizer="adam", beta1=0.0, beta2=0.99, epsilon=1e-5),
        lambda r: optax.adam(r, b1=0.0, b2=0.99, eps=1e-5),
    ),
    "adam, other": (
        dict(optimizer="adam", beta1=0.6, beta2=0.97, epsilon=0.03),
        lambda r: optax.adam(r, b1=0.6, b2=0.97, eps=0.03),
    ),
    "adamw": (dict(optimizer="adamw", weight_decay=0.1), lambda r: optax.adamw(r, weight_decay=0.1)),
    "adam, l2": (dict(optimizer="adam", l2=0.1), lambda r: optax.chain(optax.add_decayed_weights(0.1), optax.adam(r))),
    "sgd, l2": (dict(optimizer="sgd", l2=0.1), lambda r: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(r))),
}
NAMES = tuple(optimizers.RULES)


def tree(rng: np.random.Generator, dtype=np.float32, scale: float = 1.0) -> ModelParams:
    """A tree of a model's structure, None and all, with an output row that is exactly zero."""

    def draw(*shape):
        return np.asarray(scale * rng.normal(size=shape), dtype)

    cells = tuple(CellParams(draw(3, 8), draw(2, 8), draw(8), draw(8)) for _ in range(2))
    params = ModelParams(None, cells, draw(2, 5) * np.array([[1], [0]], dtype), draw(5))
    return jax.tree.map(jnp.asarray, params)


def assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_every_choice_has_a_rule_and_every_rule_an_oracle():
    assert OptimizerConfig.__dataclass_fields__["optimizer"].metadata["choices"] == NAMES, "one order"
    assert {settings["optimizer"] for settings, _ in CASES.values()} == set(NAMES), "a case in CASES for each"


IN_FLOAT32 = ("sgd, momentum", "rmsprop, other", "adagrad", "adam", "adamw")  # in `make test`; the others in float64


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [
        pytest.param(
            *(case, dtype, tolerance),
            marks=() if (case in IN_FLOAT32) == (dtype is np.float32) else pytest.mark.long,
            id=f"{case}, {dtype.__name__}",
        )
        for case in CASES
        for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-12))
    ],
)
def test_a_hundred_updates_equal_those_of_optax_in_float64(case, dtype, tolerance):
    # Optax always in float64: its float32 Adam is itself 3e-5 off, by the rounding of 1 - beta**n.
    settings, of_rate = CASES[case]
    with jax.enable_x64(True):
        rates = jnp.asarray(RATES)
        ours, theirs = optimizers.make(OptimizerConfig(**settings)), of_rate(lambda count: rates[count])

        @jax.jit
        def both(grads, step, params, state, their_params, their_state):
            params, state = ours.update(cast(grads), state, params, rates[step].astype(dtype))
            with jax.numpy_dtype_promotion("standard"):  # optax is not written for the strict one
                updates, their_state = theirs.update(grads, their_state, their_params)
            return params, state, optax.apply_updates(their_params, updates), their_state

        def cast(t):
            return jax.tree.map(lambda leaf: leaf.astype(dtype), t)

        rng = np.random.default_rng(0)
        start = tree(rng, np.float64)
        run = (cast(start), ours.init(cast(start)), start, theirs.init(start))
        for step in range(NUM_UPDATES):
            run = both(tree(rng, np.float64, scale=10.0 ** rng.integers(-3, 2)), step, *run)
        for a, b, before in zip(*(jax.tree.leaves(t) for t in (run[0], run[2], start)), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(np.asarray(b)).max())
            assert np.abs(np.asarray(b) - np.asarray(before)).max() > 0.01, "nothing moved: the comparison says nothing"


def test_clipping_and_adam_with_l2_equal_pytorchs_clip_grad_norm_and_adam_with_weight_decay():
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(optimizer="adam", l2=0.05, clip_norm=0.25)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in (("w", (3, 4)), ("b", (4,)))}
        theirs = {name: torch.tensor(np.array(p), requires_grad=True) for name, p in params.items()}
        adam = torch.optim.Adam(theirs.values(), lr=0.01, weight_decay=0.05)
        optimizer = optimizers.make(config)
        state = optimizer.init(params)

        @jax.jit
        def update(grads, state, params):
            clipped = optimizers.clip(grads, optimizers.global_norm(grads), config)
            return optimizer.update(clipped, state, params, jnp.asarray(0.01))

        for scale in (0.01, 1.0, 100.0) * 3:  # clipped or not
            grads = {name: jnp.asarray(scale * rng.normal(size=p.shape)) for name, p in params.items()}
            for name, p in theirs.items():
                p.grad = torch.tensor(np.array(grads[name]))
            torch.nn.utils.clip_grad_norm_(theirs.values(), 0.25)
            adam.step()
            params, state = update(grads, state, params)
        for name, p in params.items():
            np.testing.assert_allclose(p, theirs[name].detach().numpy(), rtol=1e-5)  # theirs divides by norm + 1e-6


def test_the_epsilon_of_adagrad_is_added_to_the_root():
    optimizer = optimizers.make(OptimizerConfig(optimizer="adagrad", epsilon=1.0))
    params = jnp.float32(10.0)
    params, state = optimizer.update(jnp.float32(3.0), optimizer.init(params), params, jnp.float32(0.5))
    assert params == np.float32(10 - 0.5 * 3 / (3 + 1))
    params, state = optimizer.update(jnp.float32(-4.0), state, params, jnp.float32(3.0))
    assert params == np.float32(10 - 0.375 + 3 * 4 / (5 + 1))


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.9999), (0.0, 0.99), (0.0, 0.0), (0.999, 0.99999)])
def test_adam_moves_by_the_learning_rate_at_every_step_of_a_constant_gradient(beta1, beta2):
    # Bias-corrected means of a constant are that constant; a float32 1 - beta**n misses it by 1e-4 at first.
    optimizer = optimizers.make(OptimizerConfig(optimizer="adam", beta1=beta1, beta2=beta2))
    update, rate = jax.jit(optimizer.update), jnp.float32(1e-3)
    zero = jnp.zeros((2,), jnp.float32)
    state = optimizer.init(zero)
    for _ in range(200):
        moved, state = update(jnp.array([0.7, -300.0], jnp.float32), state, zero, rate)
        np.testing.assert_allclose(moved, [-1e-3, 1e-3], rtol=1e-5)


def test_adam_still_moves_by_the_learning_rate_after_two_thousand_million_updates():
    optimizer = optimizers.make(OptimizerConfig(optimizer="adam"))
    g = jnp.float32(0.5)
    state = optimizers.AdamState(jnp.int32(2**31 - 2), mean=g, mean_square=g * g)
    moved, state = optimizer.update(g, state, jnp.float32(0), jnp.float32(1e-3))
    np.testing.assert_allclose(moved, -1e-3, rtol=1e-5)
    assert state.updates == 2**31 - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_structure_and_is_float32(name):
    optimizer = optimizers.make(OptimizerConfig(optimizer=name))
    params = tree(np.random.default_rng(0))
    before = optimizer.init(params)
    new_params, after = jax.jit(optimizer.update)(params, before, params, jnp.float32(0.1))
    for old, new in ((params, new_params), (before, after)):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        assert [a.dtype for a in jax.tree.leaves(old)] == [a.dtype for a in jax.tree.leaves(new)]
    moments = [leaf for leaf in jax.tree.leaves(after) if leaf.ndim]
    assert len(moments) == optimizers.RULES[name].moments * len(jax.tree.leaves(params))
    assert all(leaf.dtype == jnp.float32 for leaf in moments)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(after) if not leaf.ndim)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_always_zero_moves_nothing(name):
    optimizer = optimizers.make(OptimizerConfig(optimizer=name, weight_decay=0.0))
    params = start = tree(np.random.default_rng(0))
    zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    for _ in range(3):
        params, state = jax.jit(optimizer.update)(zeros, state, params, jnp.float32(0.1))
    assert_same_bits(params, start)


@pytest.mark.parametrize("name", NAMES)
def test_an_element_does_not_depend_on_its_neighbors(name):
    rng = np.random.default_rng(0)
    optimizer = optimizers.make(OptimizerConfig(optimizer=name, momentum=0.9))
    params, grads = (jnp.asarray(rng.normal(size=1003), jnp.float32) for _ in range(2))

    @jax.jit
    def thrice(params, grads):
        state = optimizer.init(params)
        for rate in (0.1, 0.02, 0.003):
            params, state = optimizer.update(grads, state, params, jnp.float32(rate))
        return params

    whole = thrice(params, grads)
    for part in (slice(0, 1), slice(0, 500), slice(501, 1003), slice(5, 22)):
        # But for rounding: XLA may compute the end of an array otherwise than its middle.
        np.testing.assert_allclose(thrice(params[part], grads[part]), whole[part], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["adagrad", "rmsprop", "adam", "adamw"])
def test_an_epsilon_of_zero_is_refused(name):
    with pytest.raises(ValueError, match=r"epsilon=0.0 must be more than 0 for optimizer=" + name):
        optimizers.make(OptimizerConfig(optimizer=name, epsilon=0.0))


def test_the_global_norm_is_that_of_all_elements_together():
    grads = tree(np.random.default_rng(0))
    everything = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(grads)])
    norm = jax.jit(optimizers.global_norm)(grads)
    assert norm.shape == () and norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.linalg.norm(everything), rtol=1e-6)


@pytest.mark.gpu
def test_the_norm_of_millions_of_elements_keeps_its_digits():
    # A running float32 sum of 2^24 squares of .1 would stop growing, and give a norm of 163.
    norm = jax.jit(optimizers.global_norm)(jnp.full((2**24 + 2**23,), 0.1, jnp.float32))
    np.testing.assert_allclose(norm, 0.1 * np.sqrt(2.0**24 + 2.0**23), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0.25, 3.0, 1e6])
def test_clipping_equals_optax(limit):
    grads = tree(np.random.default_rng(0))
    norm = optimizers.global_norm(grads)
    for config, theirs in (
        (OptimizerConfig(clip_norm=limit), optax.clip_by_global_norm(limit)),
        (OptimizerConfig(clip_value=limit), optax.clip(limit)),
        (
            OptimizerConfig(clip_norm=limit, clip_value=limit / 5),
            optax.chain(optax.clip_by_global_norm(limit), optax.clip(limit / 5)),
        ),
    ):
        expected, _ = theirs.update(grads, theirs.init(grads))
        clipped = jax.jit(lambda g, n, config=config: optimizers.clip(g, n, config))(grads, norm)
        for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "limits", [dict(), dict(clip_norm=1e3), dict(clip_value=1e3), dict(clip_norm=1e3, clip_value=50.0)]
)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_gradient_within_the_limits_keeps_its_bits(limits, scale):
    grads = tree(np.random.default_rng(0), scale=scale)
    assert_same_bits(optimizers.clip(grads, optimizers.global_norm(grads), OptimizerConfig(**limits)), grads)


def test_a_huge_gradient_is_scaled_to_the_limit():
    grads = [jnp.array([3e18, -4e18], jnp.float32)]
    norm = optimizers.global_norm(grads)
    np.testing.assert_allclose(norm, 5e18, rtol=1e-6)
    np.testing.assert_allclose(optimizers.clip(grads, norm, OptimizerConfig(clip_norm=1.0))[0], [0.6, -0.8], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("element", [1e30, np.inf, np.nan])
def test_a_diverged_gradient_shows_in_its_norm_and_is_not_passed_off_as_a_step(element):
    grads = [jnp.array([element, 1.0], jnp.float32)]
    norm = optimizers.global_norm(grads)
    assert not jnp.isfinite(norm)
    clipped = optimizers.clip(grads, norm, OptimizerConfig(clip_norm=1.0))[0]
    assert jnp.isnan(clipped[0]) if not np.isfinite(element) else not clipped.any()
