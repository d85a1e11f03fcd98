"""The corpus that a command names: splits that are too short for the plan, and separators that are not there."""

from contextlib import nullcontext

import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import corpus as corpus_lib
from charlstm.run import prepared
from data_pipeline import mixture
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import Corpus, open_corpus
from launch import train
from launch.support import cli
from tests.launch.conftest import refusal


def corpus_of(text: str, folder, **values) -> Corpus:
    (folder / "text.txt").write_text(text)
    chosen = CorpusSettings(str(folder / "text.txt"), cache_dir=str(folder / "cache"), test_fraction=0, **values)
    return open_corpus(prepare(chosen, shard_bytes=64))


@pytest.mark.parametrize("start", range(6))
def test_a_separator_is_found_wherever_it_stands(start, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_lib, "CHUNK", 4)
    split = corpus_of("." * start + "ab" + "." * 10, tmp_path, valid_fraction=0).splits["train"]
    assert corpus_lib._occurs(split, tuple(b"a")) and corpus_lib._occurs(split, tuple(b"ab"))
    assert corpus_lib._occurs(split, tuple(b"ab" + b"." * 10))
    assert not any(corpus_lib._occurs(split, tuple(separator)) for separator in (b"ba", b"aa", b"c", b"." * 11 + b"a"))


def test_a_separator_that_is_not_there_is_said_and_of_a_long_text_how_much_was_searched(tmp_path, monkeypatch):
    corpus = corpus_of("one\ntwo\n" * 100, tmp_path)
    config = config_lib.replace(Config(), reset_state="document")
    assert corpus_lib.remarks_on_separator(config, corpus, (ord("\n"),)) == []
    assert corpus_lib.remarks_on_separator(config, corpus, ()) == []
    said = r"document_separator='\\x00' does not occur in {}the training split, where no state will be zeroed for it"
    (line,) = corpus_lib.remarks_on_separator(config, corpus, (0,))
    assert line.startswith(said.format(""))
    monkeypatch.setattr(corpus_lib, "SEARCHED", 100)
    (line,) = corpus_lib.remarks_on_separator(config, corpus, (0,))
    assert line.startswith(said.format("the first 100 symbols of "))


@pytest.mark.parametrize("names", [("valid_fraction", "test_fraction"), ("split", "valid_fraction", "test_fraction")])
@pytest.mark.parametrize("split", ["contiguous", "columns:5x10", "hash"])
def test_the_fractions_of_a_prepared_corpus_are_compared_with_the_split_that_it_has(split, names, tmp_path):
    corpus = corpus_of("one\ntwo\n" * 111, tmp_path, split=split, valid_fraction=0.07)
    given = {"split": split} if "split" in names else {}
    prepared.check(CorpusSettings(valid_fraction=0.07, test_fraction=0, **given), corpus, set(names))
    other = CorpusSettings(valid_fraction=0.2, test_fraction=0, **given)
    with pytest.raises(ValueError, match=f"split={split}, valid_fraction=0.2 ") if split != "hash" else nullcontext():
        prepared.check(other, corpus, set(names))


def test_the_fractions_are_not_compared_with_texts_of_their_own_for_each_split(tmp_path):
    (tmp_path / "train.txt").write_text("one\n" * 100)
    corpus = open_corpus(prepare(CorpusSettings(train=str(tmp_path / "train.txt"), cache_dir=str(tmp_path))))
    prepared.check(CorpusSettings(valid_fraction=0.2), corpus, {"valid_fraction"})


def test_settings_of_preparing_are_told_of_where_they_have_no_effect(tmp_path):
    corpus = corpus_of("one\ntwo\n" * 100, tmp_path, split="hash", valid_fraction=0)
    text, where = str(tmp_path / "text.txt"), str(corpus.directory)
    how = {"vocabulary": "characters", "min_count": 2, "include": "*.txt", "test_fraction": 0.1}

    def said(of: Corpus = corpus, **values) -> list[str]:
        return prepared.remarks(config_lib.replace(Config(), **values), of)

    idle = f"without effect on {corpus.name}, prepared before: min_count=2"
    assert said(corpus=where, **how) == [f"{idle}, include='*.txt', test_fraction=0.1"]
    assert said(corpus=where) == said(corpus=text, **how) == said(corpus="python", train=text, valid_fraction=0) == []
    of_characters = ["without effect: min_count=2 is of characters: give --vocabulary=characters, or leave it out"]
    assert said(corpus=text, min_count=2) == said(corpus="python", train=text, min_count=2) == of_characters
    (line,) = said(corpus="python", train=text, valid_fraction=0.3)
    assert line.startswith("without effect: valid_fraction=0.3 divides one text")


def test_each_corpus_of_a_mixture_is_judged_by_itself(tmp_path):
    corpus = corpus_of("one\ntwo\n" * 100, tmp_path)
    text, where = str(tmp_path / "text.txt"), str(corpus.directory)

    def said(mixed: str, **values) -> list[str]:
        of = mixture.load(mixture.parse(mixed), lambda name: corpus)
        return prepared.remarks(config_lib.replace(Config(), corpus="", mixture=mixed, min_count=2, **values), of)

    idle = f"without effect on {corpus.name}, prepared before: min_count=2"
    assert said(f"{where}:1,{text}:1", vocabulary="characters") == [idle]
    assert len(said(f"{where}:1,{text}:1", vocabulary="bytes")) == 2
    assert said(f"{where}:1,b={where}:1") == [idle.replace(corpus.name, f"{corpus.name}, {corpus.name}")]


def test_another_vocabulary_than_that_of_a_prepared_corpus_is_refused_unless_the_run_is_there(arguments, tmp_path):
    for name in ("ab", "abc"):
        (tmp_path / name).mkdir()
        corpus_of(name * 4000, tmp_path / name, vocabulary="characters", valid_fraction=0.1)
    where = {name: str(next((tmp_path / name / "cache" / "corpora").glob("*-*"))) for name in ("ab", "abc")}
    run = (*arguments, f"--corpus={where['ab']}", "--vocabulary=characters", f"--run_dir={tmp_path / 'run'}")
    said = refusal(train.main, *run, f"--vocabulary_of={where['abc']}")
    assert f"--vocabulary_of={where['abc']} has the vocabulary " in said and f"{where['ab']} is prepared with " in said
    assert train.main(["train", *run, "--num_steps=1", f"--vocabulary_of={where['ab']}", "--min_count=3"]) == cli.DONE
    assert "without effect on " in (tmp_path / "run" / "log.txt").read_text()
    assert train.main(["train", *run, "--num_steps=2", f"--vocabulary_of={where['abc']}"]) == cli.DONE


def test_training_says_once_that_no_document_ends(arguments, tmp_path):
    run = (*arguments, "--num_steps=1", "--reset_state=document", f"--run_dir={tmp_path / 'run'}")
    assert train.main(["train", *run]) == cli.DONE
    assert (tmp_path / "run" / "log.txt").read_text().count("document_separator=") == 1


def test_all_splits_that_are_too_short_are_refused_at_once_before_there_is_a_run(arguments, tmp_path):
    run = (*arguments, f"--run_dir={tmp_path / 'run'}", "--valid_fraction=0.00015")
    valid = "validation: a split of 1 symbols cannot be scored: it needs at least 2; give more text"
    assert refusal(train.main, *run).startswith(valid)
    both = refusal(train.main, *run, "--window=1000")
    assert both.startswith("training split of 7313 symbols is too short") and valid in both
    assert not (tmp_path / "run").exists()
