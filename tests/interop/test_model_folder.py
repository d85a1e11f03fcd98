"""A folder of weights: what is in it, and that its programs compute what the model computes."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import charlstm as cl
from charlstm.interop import model_card
from charlstm.interop.folder import load_numpy
from charlstm.interop.model_folder import MISSING, PROGRAMS, module_of
from data_pipeline.vocabulary import Vocabulary
from tests.interop.conftest import (
    BYTES,
    CHARACTERS,
    MODELS,
    assert_close,
    drawn,
    each,
    logits_of,
    needs,
    run,
    windows_of,
)
from tests.jobs import ROOT

FILES = {"README.md", "config.json", "load_numpy.py", "load_torch.py", "model.safetensors", "vocabulary.json"}
IN_PYTORCH = [name for name in MODELS if name.split()[0] in ("lstm", "gru", "rnn")]
IN_PYTORCH = [name for name in IN_PYTORCH if not re.search("zoneout|initial state|mogrifier", name)]
IN_LOAD_TORCH = [*IN_PYTORCH, "layer_norm_lstm", "layer_norm_lstm one-hot"]
WITH_TORCH = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from load_torch import load

for folder in sys.argv[1:]:
    model, ids = load(folder), torch.from_numpy(np.load(folder + "/ids.npy"))
    with torch.inference_mode():
        state, found = None, []
        for window in ids:
            logits, state = model(window, state)
            found.append(logits.numpy())
        np.save(folder + "/logits.npy", np.stack(found))
"""
AS_ONE_LSTM = """
import torch
from safetensors.torch import load_file

weights = load_file("model.safetensors")
net = torch.nn.LSTM(5, 8, num_layers=2, batch_first=True)
net.load_state_dict({name.partition(".")[2]: array for name, array in weights.items() if name.startswith("lstm.")})
torch.nn.Embedding(17, 5).load_state_dict({"weight": weights["embedding.weight"]})
torch.nn.Linear(8, 17).load_state_dict({name: weights[f"linear.{name}"] for name in ("weight", "bias")})
"""


@pytest.mark.parametrize("name", each(MODELS))
def test_the_numpy_program_has_the_models_logits_over_windows_with_carried_state(name, tmp_path):
    model = drawn(name)
    read = load_numpy.Model(model.export(tmp_path / "folder"))
    ids, state, found = windows_of(model), None, []
    for window in ids[:, 0]:
        logits, state = read(window, state)
        found.append(logits)
    assert all(array.dtype == np.float32 for array in found)
    assert_close(np.stack(found)[:, None], logits_of(model, ids))


def test_of_a_backward_model_the_numpy_program_writes_what_stands_before_the_prompt(tmp_path):
    how = {"reset_state": "document", "document_separator": "ab"}
    model = drawn("lstm", reverse=True, **how)
    read = load_numpy.Model(model.export(tmp_path / "folder"))
    assert (read.config["reverse"], read.config["separator"]) == (True, CHARACTERS.encode("ba").tolist())
    ids = list(read.write("he fed", length=30, temperature=0))
    text = b"".join(read.symbols[symbol] for symbol in reversed(ids)).decode()
    assert text == model.sample("he fed", 30, temperature=0) and text.endswith("he fed")
    printed = run(
        sys.executable, "load_numpy.py", "--prompt=he fed", "--length=30", "--temperature=0", cwd=tmp_path / "folder"
    )
    assert printed == text + "\n"
    assert "`reverse` in `config.json`" in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.interop
def test_the_pytorch_program_has_the_models_logits_over_windows_with_carried_state(other_python, tmp_path):
    models = {name: drawn(name) for name in IN_LOAD_TORCH}
    folders = {name: model.export(tmp_path / name.replace(" ", "_")) for name, model in models.items()}
    for name, model in models.items():
        np.save(folders[name] / "ids.npy", windows_of(model, batch=3))
    run(other_python, "-c", WITH_TORCH, *folders.values(), cwd=tmp_path)
    for name, model in models.items():
        # Layer normalization enlarges what was rounded where c is small: both are as far from float64.
        relative = 5e-5 if name.startswith("layer_norm_lstm") else 1e-5
        assert_close(np.load(folders[name] / "logits.npy"), logits_of(model, windows_of(model, batch=3)), relative)


@pytest.mark.interop
def test_the_names_and_layouts_are_those_of_one_lstm_of_pytorch(other_python, tmp_path):
    run(other_python, "-c", AS_ONE_LSTM, cwd=drawn("lstm").export(tmp_path / "folder"))


@pytest.mark.interop
def test_the_numpy_program_runs_where_there_is_numpy_and_the_pytorch_one_refuses_what_it_cannot(other_python, tmp_path):
    folder = drawn("mlstm").export(tmp_path / "folder")
    needs(other_python, "numpy")
    text = run(other_python, "load_numpy.py", "--prompt=abc", "--length=9", cwd=folder)
    assert text.startswith("abc") and len(text) == 3 + 9 + 1
    refused = "import load_torch\ntry: load_torch.load()\nexcept ValueError as error: print(error)"
    assert "(mlstm): use load_numpy.py" in run(other_python, "-c", refused, cwd=folder)


@pytest.mark.parametrize("name", each(IN_PYTORCH, ("lstm capped", "lstm last layer", "gru one-hot", "rnn")))
def test_arrays_have_pytorchs_names_and_shapes_where_it_has_the_layer(name, tmp_path):
    model = drawn(name)
    found = load_file(model.export(tmp_path / "folder") / "model.safetensors")
    settings, V = model.config.model, model.vocabulary.size
    layer = "capped_lstm" if settings.cap_input_gate else settings.cell
    gates, inputs = {"lstm": 4, "gru": 3, "rnn": 1}[settings.cell], settings.embedding_size or V
    expected = {"linear.bias": (V,)}
    if settings.embedding_size:
        expected["embedding.weight"] = (V, settings.embedding_size)
    if not settings.tie_embeddings:
        expected["linear.weight"] = (V, settings.widths[-1])
    for number, H in enumerate(settings.widths):
        expected |= {f"{layer}.{bias}_l{number}": (gates * H,) for bias in ("bias_ih", "bias_hh")}
        expected |= {
            f"{layer}.weight_ih_l{number}": (gates * H, inputs),
            f"{layer}.weight_hh_l{number}": (gates * H, H),
        }
        inputs = H
    assert {name: array.shape for name, array in found.items()} == expected


@pytest.mark.parametrize("name", each(sorted(set(MODELS) - set(IN_PYTORCH))))
def test_other_cells_have_names_of_their_own_which_no_layer_of_pytorch_takes(name, tmp_path):
    folder = drawn(name).export(tmp_path / "folder")
    assert not [array for array in load_file(folder / "model.safetensors") if "_l0" in array]
    assert json.loads((folder / "config.json").read_text())["module"] is None


@pytest.mark.parametrize(
    "settings",
    [{"zoneout": 0.1}, {"zoneout_cell": 0.1}, {"train_initial_state": True}, {"mogrifier_rounds": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_each_setting_that_pytorchs_layers_lack_alone_takes_their_names_away(settings):
    config = cl.Config(embedding_size=8).model
    assert module_of(config) == "lstm" and module_of(dataclasses.replace(config, **settings)) is None


@pytest.mark.parametrize("name", each(MODELS))
def test_the_card_names_the_pytorch_program_where_that_computes_the_model(name, tmp_path):
    card = (drawn(name).export(tmp_path / "folder") / "README.md").read_text()
    assert ("from load_torch import load" in card) == (name in IN_LOAD_TORCH)


def test_a_folder_has_these_files_and_the_programs_as_they_are(tmp_path):
    model = drawn("lstm capped")
    folder = model.export(tmp_path / "folder")
    assert {path.name for path in folder.iterdir()} == FILES
    for name in PROGRAMS:
        assert (folder / name).read_bytes() == (ROOT / "charlstm" / "interop" / "folder" / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["cap_input_gate"] and config["module"] == "capped_lstm" and config["separator"] == []
    assert config["vocabulary_size"] == model.vocabulary.size and config["hidden_sizes"] == [8, 8]
    assert json.loads((folder / "vocabulary.json").read_text()) == model.vocabulary.to_json()


def written(model: load_numpy.Model, **how) -> bytes:
    return b"".join(model.symbols[symbol] for symbol in model.write(**how))


def test_the_numpy_program_writes_the_models_most_probable_text_and_what_seed_and_top_k_say(tmp_path):
    model = drawn("gru")
    read = load_numpy.Model(model.export(tmp_path / "folder"))
    said = written(read, prompt="abß", length=30, temperature=0).decode()
    assert said == model.sample("abß", 30, temperature=0) == written(read, prompt="abß", length=30, top_k=1).decode()
    assert written(read, length=30, temperature=0).decode() == model.sample("", 30, temperature=0)
    texts = [written(read, length=40, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    logits = read(read.encode("a"))[0][0]
    logits[0] = logits.max() + 3  # the unknown symbol, which is never drawn
    assert read.choose(logits, 0, 0, None) == 1 + logits[1:].argmax()
    random, best = np.random.default_rng(0), 1 + np.argsort(logits[1:])[-3:]
    assert {read.choose(logits, 5.0, 3, random) for _ in range(200)} == set(best)
    drawn_ids = [read.choose(logits, 2.0, 0, random) for _ in range(4000)]
    expected = np.exp(logits[1:] / 2) / np.exp(logits[1:] / 2).sum()
    np.testing.assert_allclose(np.bincount(drawn_ids, minlength=len(logits))[1:] / 4000, expected, atol=0.03)
    with pytest.raises(ValueError, match="'z' is not in the vocabulary"):
        read.encode("az")


def test_a_model_that_starts_documents_anew_does_so_in_the_numpy_program(tmp_path):
    model = drawn("lstm", reset_state="document", document_separator="\\n\\n")
    read = load_numpy.Model(model.export(tmp_path / "folder"))
    for prompt in ("", "ab", "ab\n\ncd"):
        expected = model.sample(prompt, 60, temperature=0)
        assert written(read, prompt=prompt, length=60, temperature=0).decode() == expected
    end = read.encode("\n\n")
    read.b_out = np.where(np.arange(len(read.b_out)) == end[0], np.float32(1e4), read.b_out)
    for prompt in ("ab", "", "ab\n"):
        assert written(read, prompt=prompt, length=60) == prompt.encode()
    assert written(read, prompt="ab", length=1) == b"ab\n"  # which may have been the end, but nothing comes after it
    made = iter("abaababb")
    read.config["separator"], read.choose = read.encode("abab"), lambda *how: read.encode(next(made))[0]
    assert written(read, prompt="ß", length=8) == "ßaba".encode()


def test_bytes_that_are_no_utf8_go_through_the_numpy_program(tmp_path, monkeypatch, capfdbinary):
    folder = drawn("rnn", BYTES).export(tmp_path / "folder")
    read = load_numpy.Model(folder)
    assert read.encode("ä\udcff") == [0xC3, 0xA4, 0xFF]
    made = written(read, prompt="ä\udcff", length=50)
    assert made[:3] == b"\xc3\xa4\xff" and len(made) == 53
    monkeypatch.setattr(load_numpy, "__file__", str(folder / "load_numpy.py"))
    monkeypatch.setattr(sys, "argv", ["load_numpy.py", "--prompt=ä\udcff", "--length=50", "--temperature=1"])
    load_numpy.main()
    assert capfdbinary.readouterr().out == made + b"\n"
    for wrong in ("--length=-1", "--temperature=nan", "--seed=-1"):
        monkeypatch.setattr(sys, "argv", ["load_numpy.py", wrong])
        with pytest.raises(SystemExit):
            load_numpy.main()


def test_a_card_without_a_run_has_no_score_and_no_folder_of_the_text(tmp_path):
    model = drawn("lstm zoneout", corpus="/home/someone/my novel.txt")
    card = (model.export(tmp_path / "folder") / "README.md").read_text()
    assert "- my-novel\n" not in card and '- "my-novel"\n' in card and "/home" not in card
    assert "It was not measured" in card and "metrics:" not in card and "PyTorch has no layer" in card
    assert model_card.texts_of(drawn("gru", mixture="data/web:0.6,books=b/v2:0.4").config) == ["web", "books"]
    globs = {
        "news/*.txt": "news",
        "s3://bucket/2024-*/part-*.jsonl": "bucket",
        "*.txt": "text",
        "novel [1].txt": "novel [1]",
    }
    for corpus, name in globs.items():
        assert model_card.texts_of(drawn("gru", corpus=corpus).config) == [name]


@pytest.mark.parametrize(
    ("characters", "prompt"),
    [(" The", "The "), (" aehtz", "the "), ("\n !абв", "абв"), ('!"{}', "{}"), ('\n"', ""), ("", "The ")],
)
def test_the_examples_of_a_card_have_symbols_of_the_model(characters, prompt, tmp_path):
    model = drawn("mlstm", Vocabulary("characters", "".join(sorted(characters))) if characters else BYTES)
    read = load_numpy.Model(model.export(tmp_path / "folder"))
    card = (tmp_path / "folder" / "README.md").read_text("utf-8")
    assert f'--prompt="{prompt}" --length' in card and f'model.encode("{prompt}")' in card
    assert len(read.encode(prompt)) == len(prompt)


def test_without_safetensors_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ValueError, match=re.escape(MISSING)):
        drawn("lstm").export(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
