"""State dicts of PyTorch become models with the same logits, whatever their tensors are called; others are refused."""

import json
import re
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm.api import Model
from charlstm.interop import import_run, symbol_table, torch_weights
from charlstm.interop.torch_weights import Roles
from tests.fuzzing import fuzzed, sentence, spoiled

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

TOKENS = list("ba \ndc")  # in an order of their own
V, E, H = len(TOKENS), 4, 5
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def state_dict(cell="lstm", widths=(H, H), inputs=E, names=("encoder", "rnn", "decoder"), **without) -> dict:
    random = np.random.default_rng(0)

    def drawn(*shape):
        return random.normal(size=shape).astype(np.float32)

    embedding, rnn, output = names
    tensors = {f"{embedding}.weight": drawn(V, inputs)} if embedding else {}
    for layer, (D, width) in enumerate(zip((inputs if embedding else V, *widths), widths, strict=False)):
        G = GATES[cell] * width
        tensors[f"{rnn}.weight_ih_l{layer}"], tensors[f"{rnn}.weight_hh_l{layer}"] = drawn(G, D), drawn(G, width)
        if without.get("bias", True):
            tensors[f"{rnn}.bias_ih_l{layer}"], tensors[f"{rnn}.bias_hh_l{layer}"] = drawn(G), drawn(G)
    if output:
        tensors[f"{output}.weight"] = drawn(V, widths[-1])
        if without.get("bias", True):
            tensors[f"{output}.bias"] = drawn(V)
    return tensors


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def logits_by_hand(tensors, ids, cell="lstm", names=("encoder", "rnn", "decoder"), nonlinearity="tanh") -> np.ndarray:
    """PyTorch's equations in float64, one symbol after the other: `[T, V]`."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    embedding, rnn, output = names
    layers = sum(name.startswith(f"{rnn}.weight_ih_l") for name in t)
    sizes = [t[f"{rnn}.weight_hh_l{layer}"].shape[1] for layer in range(layers)]
    h, c, found = [np.zeros(n) for n in sizes], [np.zeros(n) for n in sizes], []
    for number in ids:
        x = t[f"{embedding}.weight"][number] if embedding else np.eye(V)[number]
        for layer in range(layers):
            b_ih, b_hh = (t.get(f"{rnn}.bias_{kind}_l{layer}", 0) for kind in ("ih", "hh"))
            z, q = t[f"{rnn}.weight_ih_l{layer}"] @ x + b_ih, t[f"{rnn}.weight_hh_l{layer}"] @ h[layer] + b_hh
            if cell == "lstm":
                i, f, g, o = np.split(z + q, 4)
                c[layer] = sigmoid(f) * c[layer] + sigmoid(i) * np.tanh(g)
                h[layer] = sigmoid(o) * np.tanh(c[layer])
            elif cell == "gru":
                (z_r, z_u, z_n), (q_r, q_u, q_n) = np.split(z, 3), np.split(q, 3)
                u = sigmoid(z_u + q_u)
                h[layer] = (1 - u) * np.tanh(z_n + sigmoid(z_r + q_r) * q_n) + u * h[layer]
            else:
                h[layer] = np.maximum(z + q, 0) if nonlinearity == "relu" else np.tanh(z + q)
            x = h[layer]
        found.append(t[f"{output}.weight"] @ x + t.get(f"{output}.bias", 0))
    return np.stack(found)


@pytest.fixture
def symbols(tmp_path):
    (tmp_path / "symbols.json").write_text(json.dumps(TOKENS))
    return tmp_path / "symbols.json"


def imported(tensors, symbols, **roles) -> Model:
    """The model of a file with these tensors."""
    path = symbols.with_name("model.safetensors")
    safetensors.save_file(tensors, path)
    config, vocabulary, params, _ = import_run.read(path, str(symbols), Roles(**roles))
    return Model(config, vocabulary, jax.tree.map(np.asarray, params), 0)


def assert_equal_logits(model: Model, expected_TV: np.ndarray, theirs: list[int]) -> None:
    text = "".join(TOKENS[number] for number in theirs)
    found, _ = model(model.vocabulary.encode(text))
    place = model.vocabulary.encode("".join(TOKENS))
    np.testing.assert_allclose(np.asarray(found)[:, place], expected_TV, rtol=1e-5, atol=1e-5)
    unknown = np.asarray(found)[:, 0]
    assert (unknown < np.asarray(found)[:, place].max(1) - 29).all()


IDS = [0, 3, 1, 1, 5, 2, 4, 0, 2, 3, 5]
FORMS = {
    "lstm": {},
    "gru": {"cell": "gru"},
    "rnn": {"cell": "rnn"},
    "other names": {"names": ("emb", "lstm", "fc")},
    "names that say nothing": {"names": ("a", "b", "c")},
    "no biases": {"bias": False},
    "one-hot": {"names": ("", "rnn", "decoder")},
    "one layer": {"widths": (H,)},
    "a last layer of its own": {"widths": (H, H, 3)},
    "as wide as the embedding": {"inputs": H},
    "as wide as the embedding, with other names": {"inputs": H, "names": ("x", "y", "z")},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_becomes_a_model_with_its_logits(form, symbols):
    how = FORMS[form]
    tensors = state_dict(**how)
    of_hand = {key: value for key, value in how.items() if key in ("cell", "names")}
    assert_equal_logits(imported(tensors, symbols), logits_by_hand(tensors, IDS, **of_hand), IDS)


def test_rectified_units_are_told_by_a_flag(symbols):
    tensors = state_dict("rnn")
    expected = logits_by_hand(tensors, IDS, "rnn", nonlinearity="relu")
    assert_equal_logits(imported(tensors, symbols, nonlinearity="relu"), expected, IDS)
    with pytest.raises(ValueError, match=r"nonlinearity=relu is of nn\.RNN, and .* has a lstm: leave it out"):
        imported(state_dict(), symbols, nonlinearity="relu")
    with pytest.raises(ValueError, match="nonlinearity='sigmoid' is not one of tanh, relu"):
        imported(tensors, symbols, nonlinearity="sigmoid")


@pytest.mark.parametrize("stored", ["once", "twice", "once, by the output layer"])
def test_tied_weights_are_found_however_they_are_stored(stored, symbols):
    tensors = state_dict(inputs=H)
    tensors["decoder.weight"] = tensors["encoder.weight"]
    expected = logits_by_hand(tensors, IDS)
    if stored != "twice":
        del tensors["decoder.weight" if stored == "once" else "encoder.weight"]
    model = imported(tensors, symbols)
    assert model.config.model.tie_embeddings and model.params.w_out is None
    assert_equal_logits(model, expected, IDS)


@pytest.mark.parametrize("numbers", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_of_other_types_are_read_as_float32(numbers, symbols):
    tensors = {name: array.astype(numbers) for name, array in state_dict().items()}
    assert_equal_logits(imported(tensors, symbols), logits_by_hand(tensors, IDS), IDS)


def test_a_list_of_modules_of_one_layer_is_read_in_the_order_of_its_numbers(symbols):
    tensors = state_dict(widths=(H,) * 12)
    expected = logits_by_hand(tensors, IDS)
    renamed = {re.sub(r"^rnn\.(\w+)_l(\d+)$", r"rnns.\2.\1_l0", name): array for name, array in tensors.items()}
    assert "rnns.10.weight_ih_l0" in renamed
    assert_equal_logits(imported(renamed, symbols), expected, IDS)
    of_cells = {name.removesuffix("_l0"): array for name, array in renamed.items()}  # nn.LSTMCell
    assert_equal_logits(imported(of_cells, symbols), expected, IDS)


def test_of_several_recurrent_modules_and_layers_a_flag_names_the_one(symbols):
    tensors = state_dict(inputs=H)
    both = tensors | {"other.weight_ih_l0": np.ones((20, 5), np.float32)}
    with pytest.raises(ValueError, match="several recurrent modules, other, rnn: say which with --recurrent"):
        imported(both, symbols)
    swapped = {"x.weight": tensors["encoder.weight"], "y.weight": tensors["decoder.weight"]}
    swapped |= {name: array for name, array in tensors.items() if name.startswith("rnn")}
    with pytest.raises(
        ValueError, match=r"x.weight \[6, 5\], y.weight \[6, 5\], and which is which is not clear: give"
    ):
        imported(swapped, symbols)
    expected = logits_by_hand(tensors | {"decoder.bias": np.zeros(V)}, IDS)
    assert_equal_logits(imported(swapped, symbols, embedding="x", output_layer="y.weight"), expected, IDS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rnn.weight_ih_l0_reverse": np.ones((20, 4), np.float32)}, "a layer that reads backward"),
        ({"rnn.weight_hr_l0": np.ones((3, 5), np.float32)}, "has projections"),
        ({"rnn.weight_ih_l0": None}, "rnn.weight_hh_l0 and no weight_ih beside them"),
        ({"rnn.weight_hh_l0": np.ones((20, 6), np.float32)}, r"are not the shapes of one layer, \[gH, D\]"),
        ({"rnn.weight_hh_l0": np.float32(1)}, "are not the shapes of one layer"),
        ({"rnn.weight_ih_l1": np.ones((20, 7), np.float32)}, "5 units is followed by one that reads 7"),
        ({f"rnn.{kind}_l0": None for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}, "some are missing"),
        ({"rnn.bias_ih_l0": np.ones(19, np.float32)}, "are not the shapes of one layer"),
        ({"rnn.bias_ih_l0": np.full(20, np.nan, np.float32)}, r"bias_ih_l0 \[20\] has numbers that are not finite"),
        ({"rnn.bias_ih_l0": np.full(20, 1e300)}, "not finite"),
        ({"rnn.bias_ih_l0": np.ones(20, np.int64)}, "is of type int64: float16, bfloat16, 32 or 64 are read"),
        ({"norm.weight": np.ones(5, np.float32)}, r"norm.weight \[5\] has no place in a model"),
        ({"fc.weight": np.ones((5, 5), np.float32)}, "which are not an embedding"),
        ({"decoder.weight": None, "decoder.bias": None}, "which are not an embedding"),
        ({"encoder.weight": np.ones((0, 4), np.float32), "decoder.weight": np.ones((0, 5), np.float32)}, "is empty"),
    ],
)
def test_what_is_no_such_model_is_refused_with_what_was_found(change, why, symbols):
    tensors = {name: array for name, array in (state_dict() | change).items() if array is not None}
    with pytest.raises(ValueError, match=why) as refused:
        imported({name: np.asarray(array) for name, array in tensors.items()}, symbols)
    assert "model.safetensors" in sentence(refused.value)


# Symbols.


@pytest.mark.parametrize(
    "written",
    [
        json.dumps({token: number for number, token in enumerate(TOKENS)}),
        json.dumps(dict(enumerate(TOKENS))),
        '"ba \\ndc"',
    ],
    ids=["symbol to id", "id to symbol", "a string"],
)
def test_a_vocabulary_may_be_written_in_several_ways(written, symbols):
    expected = symbol_table.read(str(symbols), V)
    symbols.write_text(written)
    found = symbol_table.read(str(symbols), V)
    assert found.vocabulary == expected.vocabulary and found.theirs.tolist() == expected.theirs.tolist()
    assert found.vocabulary.characters == "\n abcd" and found.theirs.tolist() == [-1, 3, 2, 1, 0, 5, 4]


def test_of_a_text_the_distinct_characters_are_taken_in_order(tmp_path):
    (tmp_path / "text.txt").write_bytes("zß\r\na".encode())
    assert symbol_table.read(str(tmp_path / "text.txt"), 4).vocabulary.characters == "\nazß"
    assert symbol_table.read(str(tmp_path / "text.txt"), 5).vocabulary.characters == "\n\razß"


def test_tokens_that_are_no_characters_get_code_points_of_their_own_and_unknown_is_unknown(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps(["<pad>", "b", "<unk>", "a", "\ue000"]))
    table = symbol_table.read(str(tmp_path / "v.json"), 5)
    assert table.vocabulary.characters == "ab\ue000\ue001" and table.theirs.tolist() == [2, 3, 1, 4, 0]
    assert table.remarks == ["'<pad>' is no character: U+E001 stands for it"]


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("[1, 2]", "neither a list of symbols nor an object"),
        ('["a", ""]', "neither a list of symbols nor an object"),
        ('{"a": 0, "b": 2}', "neither a list of symbols nor an object"),
        ('{"a": 0, "b": 0}', "neither a list of symbols nor an object"),
        ('["a", "b", "a"]', "has the symbol 'a' twice"),
        ('["a", "b"]', "has 2 symbols and the weights are of 3"),
        ("[" * 100_000, "is not json"),
        ("5", "neither a list of symbols"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(written, why, tmp_path):
    (tmp_path / "v.json").write_text(written)
    with pytest.raises(ValueError, match=why) as refused:
        symbol_table.read(str(tmp_path / "v.json"), 3)
    sentence(refused.value)


def test_bytes_are_bytes_and_without_a_vocabulary_it_is_asked_for():
    assert symbol_table.read("bytes", 256).theirs.tolist() == list(range(256))
    with pytest.raises(ValueError, match=r"are of 256 symbols, .* or --vocabulary_file=bytes"):
        symbol_table.read("", 256)
    with pytest.raises(ValueError, match="are of 65 symbols, and do not say of which: give --vocabulary_file"):
        symbol_table.read("", 65)
    with pytest.raises(ValueError, match="vocabulary_file=bytes is of 256 symbols and the weights are of 257: give"):
        symbol_table.read("bytes", 257)
    with pytest.raises(ValueError, match="home directory of a user who has none here"):
        symbol_table.read("~nobody of that name/v.json", 65)


# Files that are damaged, or made to do harm.


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not a whole safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "is not a whole safetensors file: .*too large"),
        (struct.pack("<Q", 2) + b"{]", "is not a whole safetensors file"),
        (b'{"a": 1}', "is not a whole safetensors file"),
    ],
    ids=["empty", "a header of an exabyte", "no json", "no header"],
)
def test_a_file_that_is_no_safetensors_is_refused(content, why, symbols):
    path = symbols.with_name("model.safetensors")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why) as refused:
        import_run.read(path, str(symbols), Roles())
    sentence(refused.value)


def file_of(header: bytes, numbers: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + numbers


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 2), ("F4", 1), ("C64", 16)])
def test_a_type_of_numbers_that_is_not_read_is_refused(dtype, size, symbols):
    header = json.dumps({"rnn.weight_ih_l0": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}})
    path = symbols.with_name("model.safetensors")
    path.write_bytes(file_of(header.encode(), b"\0" * size))
    with pytest.raises(ValueError) as refused:
        import_run.read(path, str(symbols), Roles())
    sentence(refused.value)


SMALL = safetensors.save(state_dict(widths=(2,), inputs=2))
LENGTH = struct.unpack("<Q", SMALL[:8])[0]


@fuzzed(60)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_what_it_says(tmp_path_factory, data):
    """Never with a traceback; and nothing is left behind."""
    header, numbers = SMALL[8 : 8 + LENGTH], SMALL[8 + LENGTH :]
    spoil = data.draw(st.sampled_from(["header", "numbers", "cut", "vocabulary"]))
    if spoil == "header":
        header = data.draw(spoiled(header))
    elif spoil == "numbers":
        place = data.draw(st.integers(0, len(numbers) - 1))
        numbers = numbers[:place] + data.draw(st.binary(max_size=4)) + numbers[place + data.draw(st.integers(0, 4)) :]
    folder = tmp_path_factory.mktemp("fuzz")
    whole = file_of(header, numbers)
    cut = data.draw(st.integers(0, len(whole))) if spoil == "cut" else len(whole)
    (folder / "model.safetensors").write_bytes(whole[:cut])
    tokens = json.dumps(TOKENS).encode()
    (folder / "symbols.json").write_bytes(data.draw(spoiled(tokens)) if spoil == "vocabulary" else tokens)
    try:
        config, vocabulary, params, _ = import_run.read(
            folder / "model.safetensors", str(folder / "symbols.json"), Roles()
        )
    except ValueError as error:
        sentence(error)
    else:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        assert len(params.b_out) == vocabulary.size and config.model.num_layers == 1
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "symbols.json"]


def test_a_pt_file_is_not_unpickled_by_us(tmp_path, monkeypatch):
    """Without PyTorch it is refused; what it would run is not run."""
    import builtins
    import pickle

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Harm()))
    usual = builtins.__import__

    def without_torch(name, *rest):
        if name == "torch":
            raise ModuleNotFoundError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(ValueError, match="needs PyTorch, to be read safely"):
        torch_weights.read(tmp_path / "model.pt")
    assert not (tmp_path / "harm").exists()
