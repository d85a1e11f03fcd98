"""Mixtures: their weights in whole numbers, as they change, and corpora on disk that are read as one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import mixture
from data_pipeline.build import corpora
from data_pipeline.segments import Change
from data_pipeline.settings import CorpusSettings
from tests.data_pipeline.faulty import serving


def parts_of(*weights):
    return mixture.parse(",".join(f"m{n}:{weight}" for n, weight in enumerate(weights)))


def test_weights_become_the_smallest_whole_numbers_in_their_proportion():
    assert mixture.slots(parts_of(".6", ".25", ".15")) == [12, 5, 3]
    assert mixture.slots(parts_of(3, 3)) == [1, 1]
    assert mixture.slots(parts_of("1/3", "2/3")) == [1, 2]
    assert mixture.slots(parts_of(".9999", ".0001")) == [9999, 1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=8))
def test_weights_of_any_kind_are_met_to_a_slot_of_no_more_than_10000(weights):
    shares = np.array(weights) / sum(weights)
    try:
        found = np.array(mixture.slots(parts_of(*weights)))
    except ValueError as error:
        assert "rounds to 0 of" in str(error) and shares.min() < 1e-4
        return
    assert found.sum() <= 10_000 and found.min() >= 1
    assert np.abs(found / found.sum() - shares).max() < 4e-4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:.5,b", "'b' is not CORPUS:WEIGHT, such as data/web:0.6"),
        ("a:.5,:.5", "':.5' is not CORPUS:WEIGHT"),
        ("a:.5,b:many", "'b:many' is not CORPUS:WEIGHT"),
        ("a:1,b:-1", "the weight of b is -1, and must be 0 or more"),
        ("x/a:.5,y/a:.5", "names a twice, x/a and y/a: leave one out, or tell them apart by a2=y/a:.5"),
    ],
)
def test_a_mixture_that_is_none_is_refused(text, sentence):
    with pytest.raises(ValueError) as caught:
        mixture.parse(text)
    assert sentence in str(caught.value)


def test_changes_of_weights_are_read_as_whole_numbers_and_who_is_not_named_has_none():
    found = mixture.parse_changes("100:web:.2,books:.8; 2000:web:1", ["web", "books"])
    assert found == (Change(100, (1, 4)), Change(2000, (1, 0)))
    assert mixture.parse_changes("", ["web"]) == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:1", "'a:1' is not STEP:NAME:WEIGHT,... with weights of 0 or more"),
        ("-3:a:1", "'-3:a:1' is not STEP:NAME:WEIGHT"),
        ("5:a:1,b", "'5:a:1,b' is not STEP:NAME:WEIGHT"),
        ("5:a:-1", "'5:a:-1' is not STEP:NAME:WEIGHT"),
        ("5:a:1,d:1", "there is no 'd' in the mixture, only a, b; --mixture=d=CORPUS:WEIGHT,... gives a corpus that"),
        ("5:a:.9,b:.1,a:.1", "names a twice from step 5 on"),
        ("0:a:1", "step 0 must be more than 0"),
        ("5:a:1;5:b:1", "step 5 must be more than 0 and than the steps before it"),
        ("5:a:0", "the weights of a, b are all 0"),
        ("5:a:1,b:0.00001", "the weight of b is 1e-05 of the mixture, and rounds to 0 of 9998 slots"),
    ],
)
def test_changes_of_weights_that_are_none_are_refused(text, sentence):
    with pytest.raises(ValueError) as caught:
        mixture.parse_changes(text, ["a", "b"])
    assert sentence in str(caught.value)


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(ValueError, match="the weight of m1 is 1e-05 of the mixture, and rounds to 0 of 9998 slots"):
        mixture.slots(parts_of(1, "0.00001"))


def test_names_are_those_of_the_texts_unless_given():
    parts = mixture.parse("s3://x/data/web:2, n=data/b.txt:1,corpora/code.txt:.5")
    assert [(part.name, part.corpus) for part in parts] == [
        ("web", "s3://x/data/web"), ("n", "data/b.txt"), ("code", "corpora/code.txt")
    ]  # fmt: skip
    assert mixture.parse(",".join(map(str, parts))) == parts


@pytest.fixture
def opened(tmp_path):
    """Opens a mixture of texts, by name."""

    def open_texts(texts, weights, **how):
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text)
        words = ",".join(f"{tmp_path / name}.txt:{weight}" for name, weight in weights.items())
        settings = {"cache_dir": str(tmp_path / "cache"), **how}
        return mixture.load(mixture.parse(words), lambda name: corpora.load(CorpusSettings(corpus=name, **settings)))

    return open_texts


TEXTS = {"a": "abcdefghij" * 40, "b": "ABCDEFGHIJ" * 30, "c": "0123456789" * 50}


def test_a_mixture_reads_the_training_splits_one_after_the_other_and_keeps_its_members(opened):
    mixed = opened(TEXTS, {"a": 0.6, "b": 0.25, "c": 0.15})
    alone = [corpus.train.read(0, len(corpus.train)) for corpus in mixed.corpora.values()]
    whole = np.concatenate(alone)
    train = mixed.train
    assert len(train) == len(whole) == 360 + 270 + 450 == train.bytes == train.characters and not train.unknown
    for start, stop in ((0, len(whole)), (0, 0), (359, 361), (100, 700), (629, 631), (1079, 1080)):
        np.testing.assert_array_equal(train.read(start, stop), whole[start:stop])
    assert mixed.name == "mixture of 60 % a, 25 % b, 15 % c" and mixed.weights == (12, 5, 3)
    assert [(m.name, m.symbols, m.weight) for m in mixed.members] == [("a", 360, 12), ("b", 270, 5), ("c", 450, 3)]
    assert {name: len(split) for name, split in mixed.texts("valid").items()} == {"a": 20, "b": 15, "c": 25}
    again = mixture.load(mixture.parse(mixed.spec), lambda name: corpora.load(CorpusSettings(corpus=name)))
    assert again.fingerprint == mixed.fingerprint and again.spec == mixed.spec


def test_the_fingerprint_is_of_the_texts_and_the_weights(opened):
    of = [
        opened(TEXTS, weights).fingerprint
        for weights in ({"a": 0.6, "b": 0.4}, {"a": 0.5, "b": 0.5}, {"b": 0.4, "a": 0.6}, {"a": 0.6, "c": 0.4})
    ]
    of.append(opened(TEXTS | {"b": "another text" * 30}, {"a": 0.6, "b": 0.4}).fingerprint)
    assert len(set(of)) == 5
    assert opened(TEXTS, {"a": 3, "b": 2}).fingerprint == of[0]


def test_corpora_of_other_vocabularies_are_refused_and_can_share_one(opened, tmp_path):
    characters = {"vocabulary": "characters"}
    with pytest.raises(ValueError) as caught:
        opened(TEXTS, {"a": 1, "b": 1}, **characters)
    assert "a has a vocabulary of 11 characters (" in str(caught.value) and "or b with --vocabulary_of=" in str(
        caught.value
    )
    first = corpora.load(CorpusSettings(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), **characters))
    shared = opened(TEXTS | {"b": "jihgx" * 60}, {"a": 1, "b": 1}, vocabulary_of=str(first.directory), **characters)
    assert shared.vocabulary == first.vocabulary
    of_b = shared.corpora["b"].train
    assert shared.vocabulary.decode(of_b.read(0, 5)) == "jihg\ufffd" and of_b.unknown == len(of_b) // 5


def test_a_vocabulary_of_another_kind_or_of_no_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS["a"])
    how = {"corpus": str(tmp_path / "a.txt"), "cache_dir": str(tmp_path / "cache")}
    of_bytes = corpora.load(CorpusSettings(**how)).directory
    with pytest.raises(ValueError, match="needs --vocabulary=characters"):
        CorpusSettings(**how, vocabulary_of=str(of_bytes))
    with pytest.raises(ValueError, match="is prepared with bytes, not characters"):
        corpora.load(CorpusSettings(**how, vocabulary="characters", vocabulary_of=str(of_bytes)))
    with pytest.raises(ValueError, match="is not a prepared corpus"):
        corpora.load(CorpusSettings(**how, vocabulary="characters", vocabulary_of=str(tmp_path / "none")))


def test_a_vocabulary_is_taken_of_a_corpus_in_a_store(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXTS[name])
    how = {"cache_dir": str(tmp_path / "cache"), "vocabulary": "characters"}
    first = corpora.load(CorpusSettings(str(tmp_path / "a.txt"), **how))
    with serving(first.directory.parent) as server:
        url = f"{server.address}/{first.directory.name}"
        second = corpora.load(CorpusSettings(str(tmp_path / "b.txt"), vocabulary_of=url, **how))
    assert second.vocabulary == first.vocabulary
