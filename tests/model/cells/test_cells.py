"""The fast recurrences against their textbook twins, finite differences and the contracts of resets and dtypes."""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from benchmarks.peers import textbook
from charlstm.model import layer
from charlstm.model.cells import gru, layer_norm_lstm, lstm, mlstm, rnn
from charlstm.model.ops import matmul
from charlstm.model.ops.scan import recurrence
from charlstm.types import CellParams, CellState

T, B, D, H = 7, 4, 3, 5
MASK_BH = np.random.default_rng(5).choice([0.0, 1.25], (B, H))


def variant(cell: ModuleType, name: str) -> ModuleType:
    """The cell with one of its variants in place of the first."""
    chosen = ModuleType(cell.__name__)
    chosen.__dict__.update(vars(cell) | {"step_projected": partial(cell.step_projected, variant=name), "VARIANT": name})
    return chosen


def masked(cell: ModuleType) -> ModuleType:
    """The cell with state dropout."""
    chosen = ModuleType(cell.__name__)
    step = partial(cell.step_projected, mask_BH=MASK_BH)
    chosen.__dict__.update(vars(cell) | {"step_projected": step, "MASK_BH": MASK_BH})
    return chosen


DERIVED = {name: cell for name, cell in layer.CELLS.items() if hasattr(cell, "backward")}  # by hand
VARIANTS = {"rnn relu": variant(rnn, "relu")} | {
    f"{name} capped": variant(DERIVED[name], "capped") for name in ("lstm", "mlstm", "layer_norm_lstm")
}
ALL = DERIVED | VARIANTS | {f"{name} masked": masked(cell) for name, cell in DERIVED.items()}
CELLS = pytest.mark.parametrize("cell", DERIVED.values(), ids=DERIVED)
ONE_CELL = pytest.mark.parametrize(  # of what the twin of each cell says as well
    "cell", [pytest.param(c, marks=() if n == "mlstm" else pytest.mark.long) for n, c in DERIVED.items()], ids=DERIVED
)
# One variant and one mask with all cells: they enter after the products, which are what a CPU does another way.
LARGE_EQUATIONS = pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=() if n in (*DERIVED, "lstm masked") else pytest.mark.long) for n, cell in ALL.items()],
    ids=ALL,
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield np.float64


class Problem(NamedTuple):
    """A cell's inputs, and random cotangents of its outputs, which make one number of them."""

    params: CellParams
    state: CellState
    x_TBD: jax.Array
    reset_TB: jax.Array
    dfinal: CellState
    dh_TBH: jax.Array


def problem(cell: ModuleType, dtype: Any = np.float32, *, resets: bool = False, symbols: int = T) -> Problem:
    rng = np.random.default_rng(17)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def draw_state():
        return jax.tree.map(lambda s_BH: draw(*s_BH.shape), cell.zero_state(B, H, dtype))

    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), D, H, "normal", 1.0, 0.0))
    params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
    reset_TB = jnp.asarray(rng.random((symbols, B)) < (0.3 if resets else 0.0))
    assert reset_TB.any() == resets
    return Problem(params, draw_state(), draw(symbols, B, D), reset_TB, draw_state(), draw(symbols, B, H))


def project(params, x_TBD):
    return jnp.einsum("tbd,dg->tbg", x_TBD, params.w_x)


def fast(cell, params, state, x_TBD, reset_TB):
    z_TBG, b = project(params, x_TBD), cell.vectors(params)
    settings = getattr(cell, "VARIANT", ""), getattr(cell, "MASK_BH", None)
    return recurrence(cell, params.w_h, b, state, z_TBG, reset_TB, z_TBG.dtype, *settings)


def step(cell, params, state, x_BD, variant=""):
    state, _ = cell.step_projected(params, state, x_BD @ params.w_x, variant)
    return state, state.h


@partial(jax.jit, static_argnums=(0, 1))
def run(window, cell, p: Problem):
    """The outputs, and the gradients of their product with the cotangents by parameters, initial state and inputs."""
    outputs, pull = jax.vjp(lambda *args: window(cell, *args, p.reset_TB), p.params, p.state, p.x_TBD)
    return outputs, pull((p.dfinal, p.dh_TBH))


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# Resets are the harder case; without them the loop is the same for all cells.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cell", "resets"),
    [
        pytest.param(cell, resets, marks=() if resets or name == "lstm" else pytest.mark.long, id=f"{name}, {resets}")
        for name, cell in ALL.items()
        for resets in (False, True)
    ],
)
def test_the_fast_recurrence_equals_its_textbook_twin_in_value_and_every_gradient(cell, resets, float64):
    p = problem(cell, float64, resets=resets)
    got = run(fast, cell, p)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(float64)}
    assert_close(got, run(textbook.unroll, cell, p), 1e-10)


@LARGE_EQUATIONS
def test_so_it_does_with_large_weights_which_a_cpu_has_on_the_left_in_its_loops(cell, float64, monkeypatch):
    p = problem(cell, float64, resets=True)
    monkeypatch.setattr(matmul, "LARGE", 0)
    window = jax.jit(lambda p: run.__wrapped__(fast, cell, p))  # of its own: JAX keeps what it has traced
    assert_close(window(p), run(textbook.unroll, cell, p), 1e-10)


@ONE_CELL
def test_every_gradient_equals_central_finite_differences(cell, float64):
    p, rng, epsilon = problem(cell, float64, resets=True), np.random.default_rng(3), 1e-5
    point, structure = jax.tree.flatten((p.params, p.state, p.x_TBD))

    def value(leaves):
        params, state, x_TBD = jax.tree.unflatten(structure, leaves)
        outputs, _ = run(fast, cell, p._replace(params=params, state=state, x_TBD=x_TBD))
        return sum(jax.tree.leaves(jax.tree.map(np.vdot, (p.dfinal, p.dh_TBH), outputs)))

    for n, gradient in enumerate(jax.tree.leaves(run(fast, cell, p)[1])):
        direction = jnp.asarray(rng.normal(size=point[n].shape))
        ends = [value([*point[:n], point[n] + e * direction, *point[n + 1 :]]) for e in (epsilon, -epsilon)]
        np.testing.assert_allclose(np.vdot(gradient, direction), (ends[0] - ends[1]) / (2 * epsilon), rtol=1e-6)


@ONE_CELL
def test_a_long_window_equals_short_windows_with_carried_state(cell, float64):
    p = problem(cell, float64, resets=True)
    expected, _ = run(fast, cell, p)
    state, pieces = p.state, []
    for start, end in ((0, 3), (3, 6), (6, T)):
        piece = slice(start, end)
        short = p._replace(state=state, x_TBD=p.x_TBD[piece], reset_TB=p.reset_TB[piece], dh_TBH=p.dh_TBH[piece])
        (state, h_TBH), _ = run(fast, cell, short)
        pieces.append(h_TBH)
    assert_close((state, jnp.concatenate(pieces)), expected, 1e-12)


@pytest.mark.gpu
@CELLS
def test_resetting_one_stream_leaves_the_others_bit_identical(cell):
    p, one = problem(cell), 2
    others = np.asarray([b for b in range(B) if b != one])
    ((state, h), (_, dstate, dx)), ((state_reset, h_reset), (_, dstate_reset, dx_reset)) = (
        run(fast, cell, q) for q in (p, p._replace(reset_TB=p.reset_TB.at[3, one].set(True)))
    )
    for a, b in ((h, h_reset), (dx, dx_reset)):
        np.testing.assert_array_equal(a[:, others], b[:, others])
        assert (a[:, one] != b[:, one]).any()
    for a, b in zip(jax.tree.leaves((state, dstate)), jax.tree.leaves((state_reset, dstate_reset)), strict=True):
        np.testing.assert_array_equal(a[others], b[others])
        assert (a[one] != b[one]).any()


@pytest.mark.gpu
@CELLS
def test_a_nan_in_the_state_of_a_stream_that_is_reset_is_gone(cell):
    p, one = problem(cell), 1
    p = p._replace(reset_TB=p.reset_TB.at[0, one].set(True))
    poisoned, clean = (
        p._replace(state=jax.tree.map(lambda s_BH, v=value: s_BH.at[one].set(v), p.state)) for value in (jnp.nan, 0.0)
    )
    got, expected = run(fast, cell, poisoned), run(fast, cell, clean)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@CELLS
def test_gradients_do_not_cross_a_reset(cell):
    p, one, when = problem(cell), 1, 4
    p = p._replace(
        reset_TB=p.reset_TB.at[when, one].set(True),
        dh_TBH=p.dh_TBH.at[:when].set(0),  # only what is read from the reset on counts
    )
    _, (_, dstate, dx_TBD) = run(fast, cell, p)
    for gradient in (*jax.tree.leaves(dstate), dx_TBD[when - 1]):
        assert (gradient[one] == 0).all()
        assert (gradient[one + 1] != 0).any()
    assert (dx_TBD[when, one] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cell", "z_dtype"),
    [
        pytest.param(cell, dtype, marks=() if dtype is jnp.bfloat16 or name == "lstm" else pytest.mark.long)
        for dtype in (jnp.bfloat16, jnp.float32)
        for name, cell in DERIVED.items()
    ],
    ids=[f"{name}, z {dtype}" for dtype in ("bfloat16", "float32") for name in DERIVED],
)
def test_bfloat16_products_leave_state_and_gradients_float32(cell, z_dtype):
    p = problem(cell, resets=True)
    w_h = p.params.w_h / 4  # a contracting recurrence, or rounding errors grow from symbol to symbol
    z_TBG = project(p.params, p.x_TBD).astype(z_dtype)

    @partial(jax.jit, static_argnums=0)
    def outputs_and_gradients(dtype, z_TBG):
        def window(w_h, b, state, z_TBG):
            return recurrence(cell, w_h, b, state, z_TBG, p.reset_TB, dtype)

        (state, h), pull = jax.vjp(window, w_h, cell.vectors(p.params), p.state, z_TBG)
        return state, h, *pull((p.dfinal, p.dh_TBH.astype(h.dtype)))

    got = outputs_and_gradients(jnp.bfloat16, z_TBG)
    expected = outputs_and_gradients(jnp.float32, z_TBG.astype(jnp.float32))
    state, h_TBH, dw_h, db, dstate, dz_TBG = got
    assert h_TBH.dtype == jnp.bfloat16 and dz_TBG.dtype == z_dtype
    for leaf in jax.tree.leaves((state, dstate, dw_h, db)):
        assert leaf.dtype == jnp.float32
        assert (leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)).any(), "rounded to bfloat16 on the way"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.04 * float(jnp.abs(b).max()))


def equations(jaxpr, in_scan=False):
    """All equations of a program as a CPU runs it, each with whether it stands inside a scan."""
    for equation in jaxpr.eqns:
        yield equation, in_scan
        params = dict(equation.params)
        if "branches" in params:  # of a choice by platform, where a CPU's is the first
            params["branches"] = params["branches"][0]
        for inner in jax.tree.leaves(params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, in_scan or equation.primitive.name == "scan")


def weight_shaped(window, cell, p):
    """Of the program of all the gradients: (products shaped like w_h outside scans, inside, scan carries so shaped)."""
    width = cell.GATES * H
    shapes = {(H, width), (width, H), p.params.w_h.shape} | {(H, n * H) for n in cell.MATRICES}
    outside = inside = carried = 0
    for equation, in_scan in equations(jax.make_jaxpr(lambda p: run(window, cell, p))(p).jaxpr):
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape in shapes:
            inside, outside = inside + in_scan, outside + (not in_scan)
        if equation.primitive.name == "scan":
            carried += sum(v.aval.shape in shapes for v in equation.outvars)  # what it stacks has a T besides
    return outside, inside, carried


@CELLS
def test_the_gradient_of_the_recurrent_weights_is_one_product_after_the_loop(cell):
    p = problem(cell)
    matrices = len(cell.MATRICES)
    assert weight_shaped(fast, cell, p) == (matrices, 0, 0)
    assert weight_shaped(textbook.unroll, cell, p)[1:] == (matrices, 1), "autodiff does it in the loop"


@pytest.mark.parametrize(
    "cell",
    [lstm, mlstm, *(pytest.param(cell, marks=pytest.mark.long) for cell in (gru, rnn, layer_norm_lstm))],
    ids=["lstm", "mlstm", "gru", "rnn", "layer_norm_lstm"],
)
def test_shards_taken_in_turn_on_many_devices_give_what_one_shard_alone_gives(cell):
    """Inside `shard_map` with its check of what varies over the mesh, and inside a loop over the shards of a device."""
    devices, shards = 4, 8
    assert jax.device_count() >= devices
    p = problem(cell, resets=True)
    factors = jnp.linspace(0.5, 1.5, shards)
    windows = jax.tree.map(lambda a: factors.reshape(-1, *[1] * a.ndim) * a[None], (p.state, p.x_TBD, p.dh_TBH))
    windows = (*windows, jnp.stack([jnp.roll(p.reset_TB, s, axis=0) for s in range(shards)]))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(params, window):
        state, x_TBD, dh_TBH, reset_TB = window

        def loss(params, state):
            return jnp.vdot(fast(cell, params, state, x_TBD, reset_TB)[1], dh_TBH)

        return jax.grad(loss, argnums=(0, 1))(params, state)

    def device(params, windows):
        params = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), params)
        return jax.lax.map(lambda window: shard(params, window), windows)

    spec = PartitionSpec("data")
    spread = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=True))
    got = spread(p.params, windows)
    alone = jax.jit(shard)
    for s in range(shards):
        expected = alone(p.params, jax.tree.map(lambda a, s=s: a[s], windows))
        assert_close(jax.tree.map(lambda g, s=s: g[s], got), expected, 1e-5)


def saturated(cell, **gates: float) -> CellParams:
    """Parameters that hold each named gate at the given activation's end, and ignore input and state."""
    width = len(gates) * H
    b_x = jnp.repeat(jnp.asarray(list(gates.values()), jnp.float32) * 100, H)
    assert len(gates) == cell.GATES
    return CellParams(jnp.zeros((D, width)), jnp.zeros((H, width)), b_x, jnp.zeros(width))


def test_the_lstms_gates_are_input_forget_candidate_output():
    p = problem(lstm)
    write, _ = step(lstm, saturated(lstm, i=1, f=-1, g=1, o=-1), p.state, p.x_TBD[0])
    np.testing.assert_allclose(write.c, jnp.ones((B, H)), atol=1e-6)
    np.testing.assert_allclose(write.h, jnp.zeros((B, H)), atol=1e-6)
    keep, h_BH = step(lstm, saturated(lstm, i=-1, f=1, g=1, o=1), p.state, p.x_TBD[0])
    np.testing.assert_allclose(keep.c, p.state.c, atol=1e-6)
    np.testing.assert_allclose(h_BH, jnp.tanh(p.state.c), atol=1e-6)


def test_the_grus_gates_are_reset_update_candidate():
    p = problem(gru)
    keep, _ = step(gru, saturated(gru, r=-1, u=1, n=1), p.state, p.x_TBD[0])
    np.testing.assert_allclose(keep.h, p.state.h, atol=1e-6)
    forgetful = saturated(gru, r=-1, u=-1, n=0)._replace(b_h=jnp.repeat(jnp.asarray([0.0, 0.0, 3.0]), H))
    np.testing.assert_allclose(step(gru, forgetful, p.state, p.x_TBD[0])[1], jnp.zeros((B, H)), atol=1e-6)
    recalling = saturated(gru, r=1, u=-1, n=0)._replace(b_h=forgetful.b_h)
    np.testing.assert_allclose(step(gru, recalling, p.state, p.x_TBD[0])[1], jnp.full((B, H), np.tanh(3)), atol=1e-6)


def test_the_mlstm_is_an_lstm_that_sees_the_factor_in_place_of_the_state(float64):
    p = problem(mlstm, float64)
    params, G = p.params, 4 * H
    m_BH = (p.x_TBD[0] @ params.w_x[:, G:]) * (p.state.h @ params.w_h[:, G:])
    gates = CellParams(params.w_x[:, :G], params.w_h[:, :G], params.b_x, params.b_h)
    expected = step(lstm, gates, p.state._replace(h=m_BH), p.x_TBD[0])
    assert_close(step(mlstm, params, p.state, p.x_TBD[0]), expected, 1e-12)


def test_a_capped_cell_lets_in_no_more_than_was_forgotten():
    p = problem(lstm)
    full = saturated(lstm, i=1, f=1, g=1, o=1)
    np.testing.assert_allclose(step(lstm, full, p.state, p.x_TBD[0], "capped")[0].c, p.state.c, atol=1e-6)
    np.testing.assert_allclose(step(lstm, full, p.state, p.x_TBD[0])[0].c, p.state.c + 1, atol=1e-6)
    empty = saturated(lstm, i=1, f=-1, g=1, o=1)
    np.testing.assert_allclose(step(lstm, empty, p.state, p.x_TBD[0], "capped")[0].c, jnp.ones((B, H)), atol=1e-6)


@CELLS
def test_a_layer_starts_float32_with_its_gates_side_by_side_and_its_state_at_zero(cell):
    params = cell.init(jax.random.key(0), D, H, "orthogonal", 0.08, 1.5)
    width, factor = cell.GATES * H, H if cell is mlstm else 0
    assert [w.shape for w in params[:4]] == [(D, width + factor), (H, width + factor), (width,), (width,)]
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(params))
    for block in jnp.split(params.w_h, params.w_h.shape[1] // H, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(H), atol=1e-5)
    forget = slice(H, 2 * H) if cell in (lstm, mlstm, layer_norm_lstm) else slice(0, 0)
    expected = np.zeros(width, np.float32)
    expected[forget] = 1.5
    np.testing.assert_array_equal(params.b_x, expected)
    np.testing.assert_array_equal(params.b_h, jnp.zeros(width))
    state = cell.zero_state(B, H)
    assert (state.c is None) == (cell in (gru, rnn))
    for s_BH in jax.tree.leaves(state):
        np.testing.assert_array_equal(s_BH, np.zeros((B, H), np.float32))


def test_the_forget_bias_replaces_one_draw_and_leaves_the_other():
    params = lstm.init(jax.random.key(0), D, H, "uniform", 0.08, 1.0)
    assert (params.b_x[H : 2 * H] == 1).all()
    assert (jnp.abs(params.b_h) <= 0.08).all() and (params.b_h[H : 2 * H] != 0).all()
