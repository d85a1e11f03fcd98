"""Flair's file: what is in it, what flair has no place for, and that flair computes with it what we do."""

import collections
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm.api import Model
from data_pipeline.vocabulary import Vocabulary
from launch import export
from tests.interop.conftest import BYTES, CHARACTERS, MODELS, drawn, each, needs, run
from tests.jobs import ROOT

TEXT = "\nhe fed a big bag éin hie'chief ääßb😀 f\n"  # é is not in the vocabulary
FITS = ["lstm", "lstm one-hot", "lstm of one layer", "lstm of one last layer", "lstm tied", "lstm weight norm"]


def turned(model: Model, reverse: bool, **settings) -> Model:
    """The model in another direction; its weights are the same."""
    config = config_lib.replace(model.config, reverse=reverse, **settings)
    return Model(config, model.vocabulary, model.params, model.step)


class Reader(pickle.Unpickler):
    """Reads the pickle of a file of PyTorch's without PyTorch; of classes it knows the names."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        super().__init__(archive.open(f"{name}/data.pkl"))
        self._archive, self._name = archive, name

    def find_class(self, module, name):
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild,
            ("torch", "FloatStorage"): "<f4",
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("flair.data", "Dictionary"): type("Dictionary", (), {}),
        }
        return known[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, device, size = pid
        assert (kind, device) == ("storage", "cpu")
        array = np.frombuffer(self._archive.read(f"{self._name}/data/{key}"), dtype)
        assert len(array) == size
        return array

    @staticmethod
    def rebuild(storage, offset, shape, strides, needs_gradient, hooks):
        assert not needs_gradient and not hooks
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, [4 * stride for stride in strides])


def read(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.read(f"{path.stem}/version") == b"3\n"
        return Reader(archive, path.stem).load()


@pytest.mark.parametrize("name", ["lstm", "lstm one-hot"])
def test_the_file_has_the_weights_by_flairs_names_and_the_dictionary(name, tmp_path):
    model = drawn(name)
    model.export(tmp_path / "out", "flair")
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "lm-forward.pt"
    content, V, E = read(path), CHARACTERS.size, MODELS[name].get("embedding_size", CHARACTERS.size)
    shapes = {key: array.shape for key, array in content.pop("state_dict").items()}
    assert shapes == {
        "encoder.weight": (V, E), "decoder.weight": (V, 8), "decoder.bias": (V,),
        "rnn.weight_ih_l0": (32, E), "rnn.weight_ih_l1": (32, 8),
        **{f"rnn.{key}_l{layer}": shape for layer in (0, 1) for key, shape in
           {"weight_hh": (32, 8), "bias_ih": (32,), "bias_hh": (32,)}.items()},
    }  # fmt: skip
    weights = read(path)["state_dict"]
    np.testing.assert_array_equal(weights["rnn.weight_hh_l1"], np.asarray(model.params.cells[1].w_h).T)
    np.testing.assert_array_equal(weights["decoder.weight"], np.asarray(model.params.w_out).T)
    embedding = np.eye(V) if model.params.embedding is None else np.asarray(model.params.embedding)
    np.testing.assert_array_equal(weights["encoder.weight"], embedding)
    dictionary = vars(content.pop("dictionary"))
    assert dictionary["idx2item"] == [b"<unk>", *(character.encode() for character in CHARACTERS.characters)]
    assert dictionary["item2idx"] == {item: number for number, item in enumerate(dictionary["idx2item"])}
    assert content == {
        "is_forward_lm": True, "hidden_size": 8, "nlayers": 2, "embedding_size": E, "nout": None, "dropout": 0.0,
        "document_delimiter": "\n", "recurrent_type": "lstm", "has_decoder": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_the_sizes_that_flair_makes_its_layers_of_are_those_of_the_weights(name, tmp_path):
    content = read(drawn(name).export(tmp_path / "out", "flair") / "lm-forward.pt")
    (V, E), H, layers = content["state_dict"]["encoder.weight"].shape, content["hidden_size"], content["nlayers"]
    expected = {"encoder.weight": (V, content["embedding_size"]), "decoder.weight": (V, H), "decoder.bias": (V,)}
    for layer in range(layers):
        expected |= {f"rnn.bias_{part}_l{layer}": (4 * H,) for part in ("ih", "hh")}
        expected |= {f"rnn.weight_ih_l{layer}": (4 * H, H if layer else E), f"rnn.weight_hh_l{layer}": (4 * H, H)}
    assert {key: array.shape for key, array in content["state_dict"].items()} == expected


def test_a_backward_model_says_so_and_has_its_separator_as_it_reads_it(tmp_path):
    how = {"reset_state": "document", "document_separator": "ab", "output_dropout": 0.25}
    turned(drawn("lstm"), True, **how).export(tmp_path / "out", "flair")
    (path,) = (tmp_path / "out").iterdir()
    content = read(path)
    assert path.name == "lm-backward.pt" and content["is_forward_lm"] is False
    assert (content["document_delimiter"], content["dropout"]) == ("ba", 0.25)


def test_the_same_model_has_the_same_bytes(tmp_path):
    paths = [drawn("lstm").export(tmp_path / name, "flair") / "lm-forward.pt" for name in ("one", "other")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", each([name for name in MODELS if name not in FITS]))
def test_what_flair_has_no_place_for_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=r"^format=flair has no place for (\w+)=.*; format=safetensors has one$"):
        drawn(name).export(tmp_path / "out", "flair")
    assert not (tmp_path / "out").exists()


def test_bytes_are_refused_and_the_program_writes_the_file(tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="vocabulary=bytes, as flair reads characters: train with --vocabulary=char"):
        drawn("lstm", BYTES).export(tmp_path / "out", "flair")
    monkeypatch.setattr("charlstm.api.load", lambda run_dir, checkpoint: drawn("lstm"))
    flags = ("--run_dir=it", "--format=flair", f"--output={tmp_path / 'out'}")
    assert export.main(["export", *flags]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out' / 'lm-forward.pt'}  ")


# A program for the other interpreter: what flair computes with the file.
FLAIR = """
import json, sys
from flair.data import Sentence
from flair.embeddings import FlairEmbeddings
from flair.models import LanguageModel

found = []
for path, text in json.load(open("asked.json")):
    model = LanguageModel.load_language_model(path)
    sentence = Sentence("he fed a bag", use_tokenizer=False)
    FlairEmbeddings(path).embed(sentence)
    embedded = [token.get_embedding().tolist() for token in sentence]
    written, surprise = model.generate_text("he ", 20)
    found.append([model.is_forward_lm, model.calculate_perplexity(text), embedded, written])
print("FOUND", json.dumps(found))
"""


@pytest.mark.interop
def test_flair_computes_the_perplexities_and_the_embeddings_that_we_do(other_python, tmp_path):
    needs(other_python, "flair")
    models = [turned(drawn(name), reverse) for name in FITS for reverse in (False, True)]
    asked = []
    for number, model in enumerate(models):
        (path,) = model.export(tmp_path / str(number), "flair").iterdir()
        asked.append([str(path), TEXT])
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "read.py").write_text(FLAIR)
    printed = run(other_python, "read.py", cwd=tmp_path)
    found = json.loads(printed.rpartition("FOUND")[2])
    for model, (is_forward, perplexity, embedded, written) in zip(models, found, strict=True):
        backward = model.config.streams.reverse
        assert is_forward is not backward
        bits = model.bits(TEXT)[slice(None, -1) if backward else slice(1, None)]  # all but the one read first
        assert perplexity == pytest.approx(2 ** bits.mean(dtype=np.float64), rel=1e-5)
        # Flair takes the state after the space that follows a word; a backward model comes from the other side.
        read_text = " he fed a bag\n" if backward else "\nhe fed a bag "
        states = np.asarray(model.states(read_text)[-1].h)
        places = [place for place, character in enumerate(read_text) if character == " "]
        np.testing.assert_allclose(embedded, states[places], rtol=0, atol=1e-5)
        # Flair draws the unknown symbol, too, and turns all characters around; a backward model is given what it reads.
        written = written.replace("<unk>", "?").replace(">knu<", "?")
        assert len(embedded) == 4 and len(written) == 23
        assert written.endswith(" eh") if backward else written.startswith("he ")


def test_the_recipe_of_flairs_models_makes_a_model_that_is_exported(tmp_path):
    config = config_lib.Config.from_flagfile(ROOT / "configs" / "flair_news.flags")
    small = config_lib.replace(config, hidden_size=8, embedding_size=5)
    assert (config.model.widths, config.model.embedding_size) == ((2048,), 100)
    model = drawn("lstm of one layer")
    vocabulary = Vocabulary("characters", CHARACTERS.characters)
    Model(small, vocabulary, model.params, 1).export(tmp_path / "out", "flair")
    content = read(tmp_path / "out" / "lm-forward.pt")
    assert content["state_dict"]["rnn.weight_hh_l0"].shape == (32, 8) and content["dropout"] == 0.25
