"""What the library is given: mistakes are refused at once, in a sentence that names the argument and the remedy."""

import jax.numpy as jnp
import numpy as np
import pytest

import charlstm as cl
from charlstm.config import arguments
from tests.inspect.conftest import drawn

WHOLE = "must be a whole number from"


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


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"length": "10"}, f"^length='10' {WHOLE} 0 to 2147483647$"),
        ({"length": 10.5}, f"^length=10.5 {WHOLE} 0"),
        ({"length": -1}, f"^length=-1 {WHOLE} 0"),
        ({"num_samples": 0}, f"^num_samples=0 {WHOLE} 1"),
        ({"seed": -1}, f"^seed=-1 {WHOLE} 0 to 4294967295$"),
        ({"seed": "x"}, f"^seed='x' {WHOLE}"),
        ({"top_k": 2.5}, "^top_k=2.5 is not an int$"),
        ({"temperature": "hot"}, "^temperature='hot' is not a float$"),
        ({"temperature": None}, "^temperature=None is not a float$"),
        ({"clamp": {"1:5": "x"}}, "^1.c:5 cannot be held at 'x': give a finite number$"),
    ],
    ids=repr,
)
def test_a_number_of_sampling_that_is_none_or_out_of_its_range_is_refused_by_its_name(model, how, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.sample("a", **how)


def test_what_sampling_does_not_take_is_refused_by_names_that_users_know(model):
    with pytest.raises(TypeError, match=r"Model\.sample\(\) got an unexpected keyword argument 'max_new_tokens'"):
        model.sample("a", max_new_tokens=5)
    with pytest.raises(TypeError, match=r"Model\.stream\(\) got an unexpected keyword argument 'num_samples'"):
        model.stream("a", num_samples=2)
    with pytest.raises(TypeError, match=r"^clamp='1:5' is no dict: give units with their values, such as \{'1:0"):
        model.sample("a", clamp="1:5")


def test_numbers_of_numpy_and_jax_are_those_of_python(model):
    how = {"length": 5, "num_samples": 2, "seed": 3, "top_k": 4, "temperature": 0.5, "clamp": {"1:5": 1.0}}
    same = {"length": np.int64(5), "num_samples": np.uint8(2), "seed": jnp.uint32(3), "top_k": np.int32(4)}
    same |= {"temperature": np.float32(0.5), "clamp": {"1:5": np.float32(1)}}
    assert model.sample("a", **how) == model.sample("a", **same)
    assert [arguments.whole("n", given, 0) for given in (np.uint8(2), np.array(2), jnp.int32(2))] == [2, 2, 2]
    for wrong in (True, np.True_, np.float64(2), None, [2]):
        with pytest.raises(ValueError, match=f"^n=.* {WHOLE} 0 to 3$"):
            arguments.whole("n", wrong, 0, 3)


@pytest.mark.parametrize(
    ("ids", "dtype"), [([1.5, 2.0], "float64"), ("abc", "<U3"), ([True], "bool"), ([None], "object")], ids=repr
)
def test_ids_that_are_no_whole_numbers_are_refused(model, ids, dtype):
    with pytest.raises(ValueError, match=f"^ids are of dtype {dtype}: give whole numbers"):
        model(ids)


def test_a_state_that_is_not_one_of_the_model_is_refused_and_that_of_the_call_before_is_taken(model):
    _, of_one = model([1])
    _, of_two = model([[1], [2]])
    assert model([1, 2], of_one)[0].shape == (2, 19) and model([[1], [2]], of_two)[0].shape == (2, 1, 19)
    for wrong in ("x", (), of_two, of_one[:1], drawn(cell="gru")([1])[1]):
        with pytest.raises(ValueError, match=r"^state is none that this model has after 1 text: hand on"):
            model([1, 2], wrong)


def test_the_name_of_one_array_is_as_good_as_a_list_of_it(model):
    (one,) = model.trace("abc", "1.c").values()
    np.testing.assert_array_equal(one, model.trace("abc", ["1.c"])["1.c"])
    with pytest.raises(ValueError, match=r"^there is no array '1\.x': use logits, 1\.c"):
        model.trace("abc", "1.x")
