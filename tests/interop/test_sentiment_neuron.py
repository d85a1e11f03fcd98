"""The sentiment neuron's 15 files become a model with the logits of its equations; damaged files are refused."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm.api import Model
from charlstm.interop import import_run
from charlstm.interop.torch_weights import Roles
from tests.fuzzing import damaged, fuzzed, sentence

V, E, H = 256, 3, 6
TEXT = "\n I loved it, "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the shapes that the published ones have, at a small width."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("neuron")
    shapes = [(V, E), (E, 4 * H), *[(H, H)] * 4, (E, H), (H, H), (4 * H,), (4 * H,), (4 * H,), (H,), (H,), (H, V), (V,)]
    for number, shape in enumerate(shapes):
        np.save(path / f"{number}.npy", random.normal(size=shape).astype(np.float32))
    return path


def by_hand(folder) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[T, 256]` and cell states `[T, H]`, by the published equations, in float64."""
    table, wx, w0, w1, w2, w3, wmx, wmh, b, gx, gh, gmx, gmh, w, b_out = (
        np.load(folder / f"{number}.npy").astype(np.float64) for number in range(15)
    )

    def normed(matrix, gain):
        return matrix / np.linalg.norm(matrix, axis=0) * gain

    wh = normed(np.concatenate([w0, w1, w2, w3], axis=1), gh)
    wx, wmx, wmh = normed(wx, gx), normed(wmx, gmx), normed(wmh, gmh)
    h, c, logits, states = np.zeros(H), np.zeros(H), [], []
    for byte in TEXT.encode():
        x = table[byte]
        m = (x @ wmx) * (h @ wmh)
        i, f, o, u = np.split(x @ wx + m @ wh + b, 4)
        i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
        c = f * c + i * np.tanh(u)
        h = o * np.tanh(c)
        logits.append(h @ w + b_out)
        states.append(c)
    return np.stack(logits), np.stack(states)


def test_it_computes_what_its_equations_say(folder):
    config, vocabulary, params, _ = import_run.read(folder, "", Roles())
    model = Model(config, vocabulary, jax.tree.map(np.asarray, params), 0)
    assert vocabulary.kind == "bytes" and config.model.cell == "mlstm" and config.model.hidden_size == H
    logits, states = by_hand(folder)
    np.testing.assert_allclose(np.asarray(model(vocabulary.encode(TEXT))[0]), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.states(TEXT)[0].c, states, rtol=1e-5, atol=1e-5)


def test_its_symbols_are_not_to_be_said(folder):
    with pytest.raises(ValueError, match=r"needs no vocabulary_file=x\.json or embedding=zip: leave that out"):
        import_run.read(folder, "x.json", Roles(embedding="zip"))


@pytest.mark.parametrize(
    ("number", "content", "why"),
    [
        (7, np.ones((H, H - 1), np.float32), "wx has the shape"),
        (3, np.ones((H + 1, H), np.float32), "do not have the shapes of the sentiment neuron"),
        (13, np.ones(H, np.float32), "do not have the shapes of the sentiment neuron"),
        (9, np.ones(H, np.float32), r"gx has the shape \[6\] where \[24\] belongs"),
        (9, np.full(4 * H, np.inf, np.float32), "9.npy has numbers that are not finite"),
        (9, np.ones(4 * H, np.int32), "of int32 where floats belong"),
        (9, np.array(["a", {}], object), "9.npy cannot be read: .*Python objects"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(number, content, why, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(tmp_path / f"{number}.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=why) as refused:
        import_run.read(tmp_path, "", Roles())
    sentence(refused.value)


def test_a_header_that_claims_a_thousand_terabytes_is_refused_at_once(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (tmp_path / "7.npy").read_bytes()
    claim = content.replace(b"(6, 6), }              ", b"(16777216, 16777216), }", 1)
    assert claim != content and len(claim) == len(content)
    (tmp_path / "7.npy").write_bytes(claim)
    with pytest.raises(ValueError, match=r"7.npy cannot be read"):
        import_run.read(tmp_path, "", Roles())


@fuzzed(40)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_what_it_says(folder, tmp_path_factory, data):
    spoiled, number = tmp_path_factory.mktemp("spoiled"), data.draw(st.integers(0, 14))
    for path in folder.iterdir():
        (spoiled / path.name).symlink_to(path)
    content = (folder / f"{number}.npy").read_bytes()
    (spoiled / f"{number}.npy").unlink()
    (spoiled / f"{number}.npy").write_bytes(data.draw(damaged(content[:300], st.binary(max_size=6))) + content[300:])
    try:
        params = import_run.read(spoiled, "", Roles()).params
    except ValueError as error:
        sentence(error)
    else:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
