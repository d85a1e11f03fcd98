"""launch.export on a run: what it prints, writes and refuses, and that the weights are those that are evaluated."""

import io
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import charlstm as cl
from charlstm import distributed
from charlstm.interop.folder import load_numpy
from charlstm.run import corpus as corpus_lib
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from launch import export, import_model, train
from launch.support import cli
from tests.launch.conftest import refusal, tree


@pytest.fixture(scope="module")
def run_dir(folder, arguments) -> Path:
    """A run of 12 steps that keeps an average, validated after the last one; checkpoints of 6 and 12."""
    path = folder / "averaged to be exported"
    flags = ("--average=ema", "--ema_decay=0.9", "--num_steps=12", "--checkpoint_every=6")
    assert train.main(["train", *arguments, *flags, f"--run_dir={path}"]) == cli.DONE
    return path


def parts(card: str) -> tuple[dict, str]:
    """The front matter of a model card, and the rest."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_folder_that_it_names_file_by_file_has_the_average_and_the_score_of_the_run(run_dir, tmp_path, capsys):
    assert export.main(["export", f"--run_dir={run_dir}", f"--output={tmp_path / 'made'}"]) == cli.DONE
    printed = capsys.readouterr().out.splitlines()
    files = sorted((tmp_path / "made").iterdir())
    assert printed == [f"{path}  {path.stat().st_size:,} bytes" for path in files] and len(files) == 6

    config, identity = run_directory.read(run_dir)
    mesh = distributed.make(list(distributed.make().devices.flat[:1]))
    abstract = train_state.abstract(config, identity.vocabulary.size, mesh).params
    with Checkpoints(run_dir / "checkpoints", writable=False, log=print) as checkpoints:
        average, last = (checkpoints.restore_params(abstract, step=12, item=i)[0] for i in ("average", "params"))
    found = load_file(tmp_path / "made" / "model.safetensors")
    np.testing.assert_array_equal(found["linear.bias"], average.b_out)
    np.testing.assert_array_equal(found["lstm.weight_ih_l0"], average.cells[0].w_x.T)
    assert (found["linear.bias"] != last.b_out).any()

    front, text = parts((tmp_path / "made" / "README.md").read_text("utf-8"))
    (record,) = (
        line
        for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "valid"
    )
    (measured,) = front["model-index"][0]["results"]
    scores = {metric["type"]: metric["value"] for metric in measured["metrics"]}
    assert scores == {name: round(record[name], 4) for name in front["metrics"]} and "bits_per_byte" in scores
    assert f"{record['scored_symbols']:,} symbols of the validation split" in text
    assert front["library_name"] == "charlstm" and front["datasets"] == ["text"] and "license" not in front
    assert "average=ema" in text and "after 12 updates" in text and str(run_dir.parent) not in text


def test_the_card_says_how_its_score_was_measured_whatever_the_run_has_been_set_to_since(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    before = (settings["evaluation"]["eval_chunk"], settings["evaluation"]["burn_in"])
    settings["evaluation"] |= {"eval_chunk": 77, "burn_in": 5}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    card = (cl.load(tmp_path / "run").export(tmp_path / "made") / "README.md").read_text("utf-8")
    assert "in chunks of {:,} symbols, each after {:,} symbols".format(*before) in card and before != (77, 5)


def test_the_numpy_program_of_the_folder_scores_as_the_run_does(run_dir, tmp_path):
    model = cl.load(run_dir)
    read = load_numpy.Model(model.export(tmp_path / "made"))
    ids = read.encode("abcdefgh\n" * 9)
    logits = read(ids[:-1])[0]
    nats = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nats / np.log(2), model.bits("abcdefgh\n" * 9)[1:], rtol=1e-5)


def test_a_checkpoint_that_was_not_validated_has_no_score(run_dir, tmp_path):
    flags = [f"--run_dir={run_dir}", f"--output={tmp_path / 'made'}", "--checkpoint=6"]
    assert export.main(["export", *flags]) == cli.DONE
    front, text = parts((tmp_path / "made" / "README.md").read_text("utf-8"))
    assert "metrics" not in front and "model-index" not in front
    assert "It was not measured" in text and "after 6 updates" in text


def test_what_it_cannot_do_is_refused_in_one_sentence_and_leaves_nothing(run_dir, tmp_path):
    assert "--run_dir is required" in refusal(export.main, f"--output={tmp_path / 'made'}")
    assert "--output is required" in refusal(export.main, f"--run_dir={run_dir}")
    assert "--format=pickle: use one of safetensors" in refusal(export.main, f"--run_dir={run_dir}", "--format=pickle")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    sentence = refusal(export.main, f"--run_dir={run_dir}", f"--output={tmp_path / 'full'}")
    assert "is there already: name a new directory" in sentence and tree(tmp_path) == before
    assert "is there already" in refusal(export.main, "--run_dir=nowhere", f"--output={tmp_path}")  # before it is read


@pytest.mark.parametrize("makes", [export.main, import_model.main])
def test_a_link_is_followed_and_a_directory_that_cannot_be_replaced_is_refused_before_the_work(
    makes, run_dir, tmp_path, monkeypatch
):
    named, flag = [f"--run_dir={run_dir}"], "output"
    if makes is import_model.main:
        named, flag = [f"--from={cl.load(run_dir).export(tmp_path / 'exported')}"], "run_dir"
    for name in ("here", "mount", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    assert makes(["program", *named, f"--{flag}={tmp_path / 'link'}"]) == cli.DONE
    assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "real").iterdir())) > 3
    before = tree(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mount")
    assert "mount is a mount point" in refusal(makes, *named, f"--{flag}={tmp_path / 'mount'}")
    monkeypatch.chdir(tmp_path / "here")
    for here in (".", "../here", str(tmp_path / "here")):
        assert "is the directory that you are in" in refusal(makes, *named, f"--{flag}={here}")
    assert tree(tmp_path) == before and os.listdir(".") == []


def test_a_page_goes_into_a_directory_that_is_there_whatever_its_name(run_dir, tmp_path):
    (tmp_path / "site.html").mkdir()
    cl.load(run_dir).export(tmp_path / "site.html", "html")
    assert [path.name for path in (tmp_path / "site.html").iterdir()] == ["index.html"]


@pytest.mark.parametrize("format", ["safetensors", "html"])
def test_a_full_disk_is_told_of_in_a_sentence_and_leaves_nothing(run_dir, tmp_path, monkeypatch, format):
    model, open_file = cl.load(run_dir), io.open

    def opened(path, mode="r", *rest, **more):
        if "w" in mode and str(path).endswith((".safetensors", ".html")):
            path = "/dev/full"
        return open_file(path, mode, *rest, **more)

    monkeypatch.setattr(io, "open", opened)
    with pytest.raises(OSError, match=f"No space left on device: output={tmp_path / 'made'} was not written"):
        model.export(tmp_path / "made", format)
    assert not list(tmp_path.iterdir())


def test_a_page_has_the_score_of_its_rounded_weights_beside_that_of_the_run(run_dir, tmp_path, capsys):
    assert export.main(["export", f"--run_dir={run_dir}", "--format=html", f"--output={tmp_path / 'page'}"]) == cli.DONE
    model, said = cl.load(run_dir), capsys.readouterr().err
    score = model.evaluate(cl.load_corpus(model.config.corpus.corpus, cache_dir=model.config.corpus.cache_dir).valid)
    assert f"{score.bits_per_symbol:.4f} as trained" in said and "with weights of float16" in said
    page = (tmp_path / "page" / "index.html").read_text("utf-8")
    assert f"{score.bits_per_symbol:.3f} before its weights" in page
    assert (
        export.main(["export", f"--run_dir={run_dir}", "--format=html", f"--output={tmp_path / 'a.html'}"]) == cli.DONE
    )
    assert (tmp_path / "a.html").read_text("utf-8") == page and {path.name for path in tmp_path.iterdir()} == {
        "page",
        "a.html",
    }


def test_a_page_of_a_mixture_has_the_score_by_the_shares_of_its_texts(folder, arguments, tmp_path, capsys):
    texts = [folder / f"mixed {name}.txt" for name in ("letters", "digits")]
    for path, letters in zip(texts, ("abcdefgh\n", "12345678\n"), strict=True):
        path.write_text("".join(np.random.default_rng(0).choice(list(letters), 9000)), "utf-8")
    others = [flag for flag in arguments if not flag.startswith(("--corpus=", "--num_steps"))]
    named = f"--mixture=letters={texts[0]}:3,digits={texts[1]}:1"
    run_dir = f"--run_dir={folder / 'mixed'}"
    assert train.main(["train", *others, "--corpus=", named, "--num_steps=1", run_dir]) == cli.DONE
    capsys.readouterr()
    assert export.main(["export", run_dir, "--format=html", f"--output={tmp_path / 'page'}"]) == cli.DONE
    model, said = cl.load(folder / "mixed"), capsys.readouterr().err
    corpus = corpus_lib.load(model.config)
    one, other = (model.evaluate(text).bits_per_symbol for text in corpus.texts("valid").values())
    assert f"{0.75 * one + 0.25 * other:.4f} as trained" in said and abs(one - other) > 1e-3


def test_a_page_of_a_run_whose_text_may_not_be_read_has_no_score(run_dir, tmp_path, capsys, monkeypatch):
    def refused(config):
        assert config.corpus.remote_patience <= 20
        raise PermissionError(13, "Permission denied", "/home/other/text.txt")

    monkeypatch.setattr(export.corpus_lib, "load", refused)
    command = ["export", f"--run_dir={run_dir}", "--format=html", f"--output={tmp_path / 'a'}"]
    assert export.main(command) == cli.DONE and (tmp_path / "a" / "index.html").exists()
    said = capsys.readouterr().err
    assert "no held-out text: " in said and "was not measured" in said


def test_a_page_of_a_run_whose_text_has_gone_has_no_score_and_says_so(run_dir, tmp_path, capsys, monkeypatch):
    moved = run_dir.parent / "moved away"
    text = Path(cl.load(run_dir).config.corpus.corpus)
    text.rename(moved)
    try:
        assert (
            export.main(["export", f"--run_dir={run_dir}", "--format=html", f"--output={tmp_path / 'a'}"]) == cli.DONE
        )
    finally:
        moved.rename(text)
    said = capsys.readouterr().err
    assert "no held-out text: " in said and "was not measured" in said
