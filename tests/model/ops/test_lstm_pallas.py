"""The window by a product and a kernel a symbol: what the loop of lstm.py gives, its values and its gradients.

The kernels' blocks are run one after the other by JAX, and on a CPU by Mosaic's interpreter where this JAX has one;
where there is a GPU for them, it runs them as they are.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.config.model import ModelConfig
from charlstm.model import language_model
from charlstm.model.cells import lstm
from charlstm.model.dropout import DropoutKey
from charlstm.model.ops import lstm_pallas, scan
from charlstm.training import step as step_lib
from charlstm.training import train_state
from charlstm.types import CellState
from data_pipeline.batch import Batch

pytestmark = pytest.mark.gpu

T, B, H = 3, 2, 256  # two blocks for each stream
SETTINGS = {
    "plain": ("plain", "float32", False),
    "capped, masked, bfloat16": ("capped", "bfloat16", True),
}


by_loop = partial(scan.recurrence, lstm)


class Given:
    """An array that is indexed as a kernel indexes what it reads."""

    def __init__(self, array):
        self._array = array

    def __getitem__(self, index):
        array = self._array
        for axis, i in reversed(list(enumerate(index if isinstance(index, tuple) else (index,)))):
            if hasattr(i, "size") and hasattr(i, "start"):
                array = jax.lax.dynamic_slice_in_dim(array, i.start, i.size, axis)
            else:
                array = jax.lax.dynamic_index_in_dim(array, i, axis, keepdims=False)
        return array


def run_by_blocks(monkeypatch):
    place = {}

    def kernel(of_block, grid, grid_names):
        def run(*args):
            refs = [Given(a) if hasattr(a.at, "add") else a for a in args]  # the others are references
            for indices in itertools.product(*map(range, grid)):
                place.update(zip(grid_names, indices, strict=True))
                of_block(*refs)

        return run

    monkeypatch.setattr(lstm_pallas.plgpu, "kernel", kernel)
    monkeypatch.setattr(jax.lax, "axis_index", lambda name: place[name])


def on_machines(short: dict[str, list]):
    """Parametrizes by machine and case: `short` has the cases of each machine that are not long."""
    cases = list(dict.fromkeys(case for of_machine in short.values() for case in of_machine))
    return pytest.mark.parametrize(
        ("machine", "case"),
        [
            pytest.param(machine, case, marks=() if case in of_machine else pytest.mark.long, id=f"{machine}, {case}")
            for machine, of_machine in short.items()
            for case in cases
        ],
        indirect=["machine"],
    )


@pytest.fixture
def machine(request, monkeypatch):
    """Has the kernels run without a GPU, or with one."""
    monkeypatch.setattr(lstm_pallas, "UNROLL", 2)  # a turn of the loop, and a symbol more
    if request.param == "by blocks":
        run_by_blocks(monkeypatch)
        yield request.param
    elif request.param == "interpreted":
        if not hasattr(mosaic_gpu, "InterpretGPUParams"):
            pytest.skip(f"JAX {jax.__version__} has no interpreter of Mosaic's kernels")
        if jax.default_backend() != "cpu":
            pytest.skip("the interpreter runs kernels on a CPU")
        with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams()):
            yield request.param
    else:
        if not distributed.has_mosaic(distributed.make()):
            pytest.skip("there is no GPU that runs Mosaic's kernels")
        yield request.param


def value_and_gradients(recurrence, variant, compute_dtype, masked, z_dtype="float32", forget_bias=0.0):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    reset_TB = np.zeros((T, B), bool)
    reset_TB[0, 1] = reset_TB[1, 0] = reset_TB[2, 1] = True
    state = CellState(draw(B, H).at[1].set(jnp.nan), draw(B, H).at[1].set(jnp.nan))  # which must not survive
    w_h, b, z_TBG, by_h, by_c = draw(H, 4 * H) / 16, draw(4 * H), draw(T, B, 4 * H), draw(T, B, H), draw(B, H)
    b, z_TBG = b.at[H : 2 * H].add(forget_bias), z_TBG.astype(z_dtype)
    mask_BH = jnp.asarray(random.integers(0, 2, (B, H)) * 2.0, jnp.float32) if masked else None

    def value(w_h, b, state, z_TBG):
        final, h_TBH = recurrence(
            w_h, b, state, z_TBG, jnp.asarray(reset_TB), jnp.dtype(compute_dtype), variant, mask_BH
        )
        return (h_TBH.astype(by_h.dtype) * by_h).sum() + (final.h**3).sum() + (final.c * by_c).sum(), (final, h_TBH)

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True))(w_h, b, state, z_TBG)


@on_machines({"by blocks": ["capped, masked, bfloat16"], "interpreted": ["plain"], "on a GPU": [*SETTINGS]})
def test_a_window_and_its_gradients_are_those_of_the_loop(machine, case):
    got, expected = (value_and_gradients(way, *SETTINGS[case]) for way in (lstm_pallas.recurrence, by_loop))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(b), (jax.tree_util.keystr(path), a, b)


# Near the cap, where i = 1 - f, either gradient is right, and rounding chooses: so not "capped" with a bias of 1.
@on_machines({"by blocks": [("plain", 7)], "interpreted": [], "on a GPU": [("plain", 1), ("plain", 7), ("capped", 7)]})
def test_no_gate_loses_its_gradient_where_forget_gates_would_round_to_1_in_bfloat16(machine, case):
    variant, forget_bias = case
    settings = variant, "bfloat16", False, "bfloat16", forget_bias
    (_, got), (_, expected) = (value_and_gradients(way, *settings) for way in (lstm_pallas.recurrence, by_loop))
    for leaf in (1, 3):  # by b and by z
        for gate, a, b in zip(
            "ifgo", *(np.split(np.asarray(g[leaf], float), 4, -1) for g in (got, expected)), strict=True
        ):
            assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b), (leaf, gate)


@on_machines({"by blocks": [], "interpreted": [], "on a GPU": ["masked"]})
def test_a_model_of_layers_that_are_read_fused_is_the_same_model(machine, case):
    remat = machine != "interpreted"  # the interpreter has effects, which jax.checkpoint does not take

    def value(backend):
        config = ModelConfig(
            hidden_size=128, embedding_size=5, state_dropout=0.2, weight_drop=0.2, lstm_backend=backend, remat=remat,
        )  # fmt: skip
        params, state = language_model.init(config, 9, jax.random.key(1)), language_model.zero_state(config, 2)
        ids_BT, dropout_key = (
            jnp.arange(8).reshape(2, 4) % 7,
            DropoutKey(jax.random.key(3), jnp.arange(2, dtype=jnp.int32)),
        )

        def loss(params):
            new, features_TBH = language_model.features(config, params, state, ids_BT, ids_BT == 6, dropout_key)
            return jnp.sin(features_TBH).sum() + sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(new))

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(loss))(params)

    got, expected = value("fused"), value("scan")
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cell": "gru"}, "cell=gru"),
        ({"zoneout": 0.1}, "zoneout=0.1"),
        ({"train_initial_state": True}, "train_initial_state=True"),
        ({"hidden_size": 200}, "hidden_size=200"),
        ({"last_hidden_size": 64}, "last_hidden_size=64"),
    ],
)
def test_what_is_not_read_fused_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=f"lstm_backend=fused does not know {named}: use auto or scan"):
        ModelConfig(lstm_backend="fused", **settings)
    assert ModelConfig(lstm_backend="auto", **settings).unsupported_by("fused") == named


SMALL = {"batch_size": 4, "window": 4, "hidden_size": 128, "embedding_size": 8, "state_dropout": 0.1}
LOWERED = {
    "small, bfloat16, masked": config_lib.replace(Config(), **SMALL, compute_dtype="bfloat16"),
    "small, float32, capped, masked": config_lib.replace(Config(), **SMALL, cap_input_gate=True),
    "small, float32, without masks": config_lib.replace(Config(), **SMALL | {"state_dropout": 0.0}),
    "large.flags": Config.recipe("large"),
}


@pytest.mark.parametrize("backend", ["scan", "fused"])
@pytest.mark.parametrize("name", LOWERED)
def test_the_whole_step_is_lowered_for_a_gpu_by_every_jax_that_is_offered_it(backend, name):
    if backend == "fused" and jax.__version_info__ < distributed.MOSAIC_SINCE:
        pytest.skip(f"JAX {jax.__version__} is not offered it")
    mesh = distributed.make(jax.devices("cpu")[:1])
    config = config_lib.fill_automatic(config_lib.replace(LOWERED[name], lstm_backend=backend), 1)
    ids = jax.ShapeDtypeStruct((config.streams.batch_size, config.streams.window), np.uint8)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, np.bool_))
    state, batch = train_state.abstract(config, 256, mesh), distributed.abstract(mesh, distributed.BY_STREAM, batch)
    traced = step_lib.make(config, 256, mesh, 100).trace(state, batch)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in lowered) == (backend == "fused")


def test_kernels_of_our_own_are_for_gpus_of_the_hopper_generation_and_a_jax_that_can_trace_them(monkeypatch):
    class Device:
        platform, compute_capability = "gpu", "9.0"

    class Mesh:
        devices = np.array([Device()])

    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert distributed.has_mosaic(Mesh())
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 9))
    assert not distributed.has_mosaic(Mesh())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    for other in ("8.6", "gfx942"):  # Ampere; AMD
        monkeypatch.setattr(Device, "compute_capability", other)
        assert not distributed.has_mosaic(Mesh())
    assert not distributed.has_mosaic(distributed.make(jax.devices("cpu")[:1]))
