"""What onnxruntime computes of an exported model is what the model computes, window by window."""

import json
import sys

import numpy as np
import pytest

from charlstm.interop import onnx_model
from charlstm.interop.export import export
from charlstm.interop.exported import Exported, folded
from data_pipeline.vocabulary import Vocabulary
from tests.interop.conftest import BYTES, CHARACTERS, MODELS, assert_close, drawn, logits_of, windows_of

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
REFUSED = {
    "lstm capped": "cap_input_gate=True",
    "lstm zoneout": "zoneout=0.2",
    "gru initial state": "zoneout=0.1",
    "mlstm": "cell=mlstm",
    "mlstm capped": "cell=mlstm",
    "mlstm mogrifier": "cell=mlstm",
    "layer_norm_lstm": "cell=layer_norm_lstm",
    "layer_norm_lstm mogrifier": "cell=layer_norm_lstm",
    "layer_norm_lstm one-hot": "cell=layer_norm_lstm",
    "lstm mogrifier": "cap_input_gate=True",
    "lstm mogrifier rank": "mogrifier_rounds=4",
}
# Of the others, those that together have everything.
SHORT = ("lstm one-hot", "lstm last layer", "lstm skip", "lstm initial state", "gru", "rnn relu")


def written(model, folder, **settings):
    """The session of an exported model."""
    path = model.export(folder / "exported", "onnx") / "model.onnx"
    return onnxruntime.InferenceSession(path, **settings)


def logits_by(session, model, ids_NBT):
    """Logits of windows, one after the other, from the state that the metadata names."""
    first = json.loads(session.get_modelmeta().custom_metadata_map["first_state"])
    batch, found = ids_NBT.shape[1], []
    state = {
        node.name: np.tile(np.array(first.get(node.name, np.zeros(node.shape[1])), np.float32), (batch, 1))
        for node in session.get_inputs()[1:]
    }
    assert [node.name for node in session.get_outputs()] == ["logits", *(f"next_{name}" for name in state)]
    for ids_BT in ids_NBT:
        logits, *after = session.run(None, {"ids": ids_BT, **state})
        state = dict(zip(state, after, strict=True))
        found.append(logits)
    return np.stack(found)


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in MODELS if name not in REFUSED],
)
def test_logits_over_three_windows_are_those_of_the_model(name, tmp_path):
    model = drawn(name)
    session = written(model, tmp_path)
    ids_NBT = windows_of(model, batch=3, length=7)
    expected = logits_of(model, ids_NBT)
    assert_close(logits_by(session, model, ids_NBT), expected)
    # One text alone, a symbol at a time.
    alone = ids_NBT[:, :1].reshape(-1, 1, 1)
    assert_close(logits_by(session, model, alone), expected[:, :1].reshape(len(alone), 1, 1, -1))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_operator_is_refused_by_name_and_leaves_nothing(name, tmp_path):
    with pytest.raises(ValueError, match=f"no operator for {REFUSED[name]}: train without it, or use format=html"):
        drawn(name).export(tmp_path / "exported", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocabulary", [BYTES, CHARACTERS], ids=lambda vocabulary: vocabulary.kind)
def test_the_file_has_the_vocabulary_and_settings_and_says_which_operators_it_needs(vocabulary, tmp_path):
    of_trainer = {"corpus": "/home/someone/secret.txt", "cache_dir": "/home/someone/cache"}
    model = drawn("lstm", vocabulary, reset_state="document", document_separator=r"\nj", **of_trainer)
    path = model.export(tmp_path / "exported", "onnx") / "model.onnx"
    read = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in read.opset_import] == [("", onnx_model.OPSET)]
    found = {entry.key: json.loads(entry.value) for entry in read.metadata_props}
    assert Vocabulary.from_json(found["vocabulary"]) == vocabulary
    assert found["separator"] == vocabulary.encode("\nj").tolist()
    assert found["config"]["cell"] == "lstm" and found["step"] == 7 and found["first_state"] == {}
    assert found["config"]["reverse"] is False and b"someone" not in path.read_bytes()
    assert {node.op_type for node in read.graph.node if node.op_type in onnx_model.OPERATORS.values()} == {"LSTM"}


def test_tied_weights_are_there_once(tmp_path):
    tied = onnx.load(drawn("lstm tied").export(tmp_path / "tied", "onnx") / "model.onnx")
    apart = onnx.load(drawn("lstm", embedding_size=8).export(tmp_path / "apart", "onnx") / "model.onnx")
    shapes = [[tuple(weight.dims) for weight in graph.graph.initializer] for graph in (tied, apart)]
    assert len(shapes[1]) - len(shapes[0]) == 1 and (CHARACTERS.size, 8) in shapes[0]


def test_weights_that_are_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, "LARGEST_FILE", 100)
    model = drawn("gru", hidden_size=32)
    session = written(model, tmp_path)
    assert (tmp_path / "exported" / "model.onnx.data").stat().st_size > 1000
    ids_NBT = windows_of(model)
    assert_close(logits_by(session, model, ids_NBT), logits_of(model, ids_NBT))


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = drawn("rnn")
    exported = Exported(model.config, model.vocabulary, folded(model.params), model.step)
    with pytest.raises(ValueError, match=r"pip install 'charlstm\[export\]'"):
        export(exported, tmp_path / "exported", "onnx")
