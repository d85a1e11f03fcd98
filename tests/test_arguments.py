"""What the library is given: mistakes are refused at once, in a sentence that names the argument and the remedy."""

import pytest

import charlstm as cl
from tests.inspect.conftest import drawn


@pytest.fixture(scope="module")
def model() -> cl.Model:
    return drawn()


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ("", ValueError, "^source is empty: give a text, its file or directory, or the name of a corpus$"),
        (None, TypeError, "^source is of type NoneType: give a text, .* as a str or pathlib.Path$"),
        (5, TypeError, "^source is of type int"),
        (["a.txt"], TypeError, "^source is of type list"),
        (b"", ValueError, "^the text given is empty, or white space alone"),
        ("\n", ValueError, "^the text given is empty, or white space alone"),
        ("hello world", ValueError, "^hello world does not exist: .*; bytes, or a string of several lines, are"),
        ("pyton", ValueError, r"\(or did you mean the corpus named python\?\); bytes"),
    ],
    ids=repr,
)
def test_a_source_that_is_no_text_is_refused_and_nothing_is_prepared(given, kind, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=sentence):
        cl.load_corpus(given, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.txt"))


def test_a_setting_of_a_corpus_that_there_is_not_is_refused_with_the_one_that_is_meant(tmp_path):
    with pytest.raises(TypeError, match=r"^unknown setting vocab; did you mean vocabulary\?$"):
        cl.load_corpus("a\nb", vocab="characters")
    with pytest.raises(ValueError, match=r"^/nowhere does not exist: name a text file, a directory or a quoted glob$"):
        cl.load_corpus("", train="/nowhere", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("run_dir", lambda model, corpus, given: cl.train(cl.Config(), corpus, given)),
        ("run_dir", lambda model, corpus, given: cl.load(given)),
        ("output", lambda model, corpus, given: model.export(given)),
        ("path", lambda model, corpus, given: cl.Config.from_flagfile(given)),
    ],
    ids=["train", "load", "export", "from_flagfile"],
)
def test_a_path_that_has_no_name_is_refused_before_anything_is_compiled_or_written(
    model, name, call, tmp_path, monkeypatch
):
    corpus = cl.load_corpus("line\n" * 500, cache_dir=tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cl.api, "start", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(ValueError, match=f"^{name} is empty: give "):
        call(model, corpus, "")
    for given, kind in ((None, "NoneType"), (3, "int"), (b"runs/a", "bytes")):
        with pytest.raises(TypeError, match=f"^{name} is of type {kind}: give .*, as a str or pathlib.Path$"):
            call(model, corpus, given)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
