"""An imported model is a run: of our own export with the same bits, and of PyTorch's files with PyTorch's logits."""

import errno
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm import api
from charlstm.interop import import_run
from charlstm.interop.exported import folded
from charlstm.interop.import_run import import_model
from charlstm.interop.torch_weights import Roles
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from launch import evaluate, export, inspect, sample, serve, train
from launch import import_model as program
from launch.support import cli
from tests.fuzzing import fuzzed, sentence, spoiled
from tests.interop.conftest import BYTES, MODELS, assert_close, drawn, each, logits_of, needs, run
from tests.jobs import ROOT
from tests.launch.conftest import TINY, refusal

pytest.importorskip("safetensors", reason="safetensors is not installed")
TEXT = "bade a cab dig a fig\n" * 3


def bits(params) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("name", each(MODELS))
def test_an_exported_model_comes_back_with_its_bits_and_its_settings(name, tmp_path):
    model = drawn(name)
    back = import_run.read(model.export(tmp_path / "folder"), "", Roles())
    assert bits(back.params) == bits(folded(model.params)) and back.vocabulary == model.vocabulary
    assert jax.tree.structure(back.params) == jax.tree.structure(folded(model.params))
    settings = {"weight_norm": False}  # it is folded
    assert back.config.model == api.config_lib.replace(model.config, **settings).model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a model, its folder, the run that was made of the folder)."""
    folder = tmp_path_factory.mktemp("exported")
    model = drawn("lstm", reset_state="document", document_separator=r"\n")
    import_model(model.export(folder / "model"), folder / "runs" / "theirs")
    return model, folder / "model", folder / "runs" / "theirs"


def test_the_run_writes_and_scores_with_the_same_bits_as_the_model_that_was_exported(exported):
    model, folder, run_dir = exported
    theirs = api.load(run_dir)
    assert theirs.step == 0 and theirs.separator == model.separator == tuple(model.vocabulary.encode("\n"))
    assert theirs.sample("ab", 40, seed=3) == model.sample("ab", 40, seed=3)
    np.testing.assert_array_equal(theirs.bits(TEXT), model.bits(TEXT))
    again = theirs.export(folder.with_name("again"))
    card = (again / "README.md").read_text()
    assert "It was imported: on which text and how it was trained is not known." in card
    assert "# A character-level language model\n" in card and "datasets:" not in card
    assert not re.search('updates|trained with|[Aa]dam|text"|seed \\|', card)
    ours, other = ((path / "model.safetensors").read_bytes() for path in (folder, again))
    assert ours == other


def test_a_model_that_reads_backward_stays_one_and_what_writes_from_left_to_right_refuses_it(tmp_path):
    model = drawn("lstm", reverse=True, reset_state="document", document_separator="ab")
    import_model(model.export(tmp_path / "folder"), tmp_path / "theirs")
    theirs = api.load(tmp_path / "theirs")
    assert theirs.config.streams.reverse and theirs.separator == model.separator
    assert theirs.separator == tuple(model.vocabulary.encode("ab")[::-1])
    assert theirs.sample("ab", 20, seed=3) == model.sample("ab", 20, seed=3)
    assert "reads backward" in refusal(sample.main, f"--run_dir={tmp_path / 'theirs'}", "--interactive")
    with pytest.raises(ValueError, match="this model reads backward"):
        model.export(tmp_path / "page", "html")
    pytest.importorskip("uvicorn", reason="the server's packages are not installed")
    assert "reads backward" in refusal(serve.main, f"--run_dir={tmp_path / 'theirs'}")


def test_where_nothing_can_be_written_is_said_in_a_sentence(exported, tmp_path):
    model, folder, _ = exported
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output=.*file/x cannot be written: "):
        model.export(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match=r"run_dir=.*file/x cannot be written: "):
        import_model(folder, tmp_path / "file" / "x")


def test_every_program_works_on_it_or_says_in_a_sentence_that_it_has_no_text(exported, tmp_path, capsys):
    _, _, run_dir = exported
    assert run_dir.stat().st_mode & 0o777 == 0o755 and list(run_dir.parent.iterdir()) == [run_dir]
    (tmp_path / "text.txt").write_text(TEXT)
    text = f"--text={tmp_path / 'text.txt'}"
    assert evaluate.main(["evaluate", f"--run_dir={run_dir}", text]) == cli.DONE
    assert re.search("bits per character at step 0", capsys.readouterr().out)
    assert inspect.main(["inspect", f"--run_dir={run_dir}", text, "--unit=1:3"]) == cli.DONE
    assert export.main(["export", f"--run_dir={run_dir}", f"--output={tmp_path / 'out'}"]) == cli.DONE
    none = "this model was imported and has no corpus of its own"
    assert refusal(inspect.main, f"--run_dir={run_dir}", "--unit=1:3").endswith(f"{none}: give --text")
    remedy = ": give --text, or with --corpus the text that it was trained on"
    assert refusal(evaluate.main, f"--run_dir={run_dir}").endswith(none + remedy)
    capsys.readouterr()
    assert export.main(["export", f"--run_dir={run_dir}", "--format=html", f"--output={tmp_path / 'page'}"]) == cli.DONE
    assert f"no held-out text: {none}\n" in capsys.readouterr().err
    assert "It has learned from" not in (tmp_path / "page" / "index.html").read_text()
    (tmp_path / "long.txt").write_text("bade a cab dig a fig\n" * 300)
    corpus = api.load_corpus(tmp_path / "long.txt", cache_dir=tmp_path).directory
    sentence = refusal(evaluate.main, f"--run_dir={run_dir}", f"--corpus={corpus}")
    assert "and the corpus given has a vocabulary of" in sentence and sentence.endswith(remedy)
    flags = [TINY, f"--corpus={tmp_path / 'long.txt'}", f"--cache_dir={tmp_path}"]
    for text in (flags, [], ["--corpus=nowhere"]):
        sentence = refusal(train.main, *text, f"--run_dir={run_dir}")
        assert "an imported model" in sentence
        assert f"--flagfile={run_dir}/flags.txt --initial_checkpoint={run_dir} --corpus=TEXT" in sentence


def test_a_run_starts_from_it_with_its_flags_on_another_text_of_other_symbols(exported, tmp_path):
    model, _, run_dir = exported
    (tmp_path / "text.txt").write_text("Bade a cab; dig ä fig!\n" * 300)
    flags = [TINY, f"--flagfile={run_dir / 'flags.txt'}", f"--corpus={tmp_path / 'text.txt'}", "--num_steps=1"]
    flags += ["--learning_rate=0", f"--cache_dir={tmp_path}", f"--run_dir={tmp_path / 'run'}"]
    assert train.main(["train", *flags, f"--initial_checkpoint={run_dir}"]) == cli.DONE
    mine = api.load(tmp_path / "run")
    known = sorted(set("Bade a cab; dig ä fig!\n") & set(model.vocabulary.characters))
    here, there = mine.vocabulary.encode("".join(known)), model.vocabulary.encode("".join(known))
    np.testing.assert_array_equal(mine.params.embedding[here], model.params.embedding[there])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{len(known) + 1} of {mine.vocabulary.size} symbols keep their parameters, those of 3 ('!' ';' 'B')" in log


def test_what_fails_leaves_nothing_behind(exported, tmp_path, monkeypatch):
    _, folder, run_dir = exported
    assert "is there already" in refusal(program.main, f"--from={folder}", f"--run_dir={run_dir}")
    assert "is not there" in refusal(program.main, "--from=nowhere", f"--run_dir={tmp_path / 'a' / 'run'}")
    flags = ["--vocabulary_file=x.json", "--recurrent=nope", "--embedding=zip", "--output_layer=zap"]
    said = refusal(program.main, f"--from={folder}", *flags, "--nonlinearity=relu", f"--run_dir={tmp_path / 'r'}")
    for flag in (*flags, "nonlinearity=relu: leave that out"):
        assert flag.removeprefix("--") in said
    assert "--from is required" in refusal(program.main, f"--run_dir={tmp_path / 'run'}")
    (tmp_path / "x.t7").touch()
    assert "as in docs/interop.md" in refusal(
        program.main, f"--from={tmp_path / 'x.t7'}", f"--run_dir={tmp_path / 'r'}"
    )
    (tmp_path / "x.t7").unlink()
    assert "neither one that" in refusal(program.main, f"--from={tmp_path}", f"--run_dir={tmp_path / 'r'}")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_make_staging", full)
    with pytest.raises(OSError, match="No space left"):
        import_model(folder, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Checkpoints, "_name", full)
    with pytest.raises(OSError, match=r"No space left on device: run_dir=.*run was not written") as caught:
        import_model(folder, tmp_path / "run")
    assert caught.value.errno == errno.EIO and not list(tmp_path.iterdir())


def test_the_note_of_a_run_says_where_it_comes_from_and_its_flags_are_a_flagfile(exported):
    model, folder, run_dir = exported
    note, *lines = (run_dir / "flags.txt").read_text().splitlines()
    assert note == f"# imported from {str(folder)!a}"
    assert {"--vocabulary=characters", "--embedding_size=5", "--hidden_size=8", "--reset_state=document"} <= set(lines)
    config = api.config_lib.Config.from_flagfile(run_dir / "flags.txt")
    assert config.model == run_directory.read(run_dir)[0].model == model.config.model


@fuzzed(40)
@given(st.data())
def test_a_damaged_folder_is_refused_or_read_as_what_it_says(exported, tmp_path_factory, data):
    folder, spoil = (
        tmp_path_factory.mktemp("fuzz"),
        data.draw(st.sampled_from(["config.json", "vocabulary.json", "lost"])),
    )
    for path in exported[1].iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(data.draw(spoiled(content)) if path.name == spoil else content)
    if spoil == "lost":
        (folder / data.draw(st.sampled_from(["config.json", "vocabulary.json", "model.safetensors"]))).unlink()
    try:
        read = import_run.read(folder, "", Roles())
    except ValueError as error:
        sentence(error)
    else:
        assert bits(read.params) == bits(exported[0].params)


# With PyTorch itself.

MAKE = """
import json, sys, torch
from safetensors.torch import save_file
from torch import nn

torch.manual_seed(0)
ids = torch.tensor(json.loads(sys.argv[1]))
for name, make, options in (("lstm", nn.LSTM, {}), ("gru", nn.GRU, {}), ("relu", nn.RNN, {"nonlinearity": "relu"})):
    rnn = make(6, 8, num_layers=2, **options)
    net = nn.ModuleDict({"encoder": nn.Embedding(256, 6), "rnn": rnn, "decoder": nn.Linear(8, 256)})
    with torch.inference_mode():
        logits = net["decoder"](net["rnn"](net["encoder"](ids))[0])
    save_file(net.state_dict(), name + ".safetensors")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, name + ".pt")
    torch.save({n: t.to(torch.bfloat16) for n, t in net.state_dict().items()}, name + ".bin")
    torch.save(net, name + ".pth")
    json.dump(logits.tolist(), open(name + ".json", "w"))
"""
# In our interpreter, with the PyTorch of the other one behind all that is ours.
READ = """
import sys
sys.path.append(sys.argv[1])
from pathlib import Path
from charlstm.interop import torch_weights
import numpy as np
try:
    found = torch_weights.read(Path(sys.argv[2]))
    np.savez(sys.argv[3], **{name: array.astype(np.float32) for name, array in found.items()})
except ValueError as error:
    print(error)
"""


@pytest.mark.interop
def test_models_that_pytorch_saved_have_its_logits(other_python, tmp_path):
    needs(other_python, "torch", "safetensors")
    ids = np.random.default_rng(0).integers(0, 256, 40)
    run(other_python, "-c", MAKE, json.dumps(ids.tolist()), cwd=tmp_path)
    packages = run(other_python, "-c", "import torch; print(torch.__path__[0])", cwd=tmp_path).strip()
    for name in ("lstm", "gru", "relu"):
        how = Roles(nonlinearity="relu" if name == "relu" else "tanh")
        imported = import_run.read(tmp_path / f"{name}.safetensors", "bytes", how)
        model = api.Model(imported.config, BYTES, imported.params, 0)
        logits = logits_of(model, ids[None, None])[0, 0]
        assert_close(logits, json.loads((tmp_path / f"{name}.json").read_text()))
    for kind in ("pt", "bin", "pth"):
        command = [sys.executable, "-c", READ, packages.removesuffix("/torch"), f"lstm.{kind}", f"{kind}.npz"]
        done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if kind == "pth":  # a whole module is pickled, and is not unpickled here
            assert "is not a file of tensors alone" in done.stdout and "state_dict()" in done.stdout
            continue
        whole, found = import_run.torch_weights.read(tmp_path / "lstm.safetensors"), np.load(tmp_path / f"{kind}.npz")
        assert sorted(found) == sorted(whole)
        for tensor, array in whole.items():
            np.testing.assert_allclose(found[tensor], array, rtol=1e-2 if kind == "bin" else 0)
