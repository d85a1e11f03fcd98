"""A text read backward: which windows come, where state is reset, and that it is the flipped text everywhere."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import direction, mixture
from data_pipeline.build import corpora
from data_pipeline.direction import Reversed
from data_pipeline.eval_chunks import ChunkPlan, read_chunks
from data_pipeline.loader import open_windows
from data_pipeline.segments import Member, SegmentPlan
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import ArraySplit, open_corpus
from data_pipeline.streams import StreamPlan
from data_pipeline.vocabulary import Vocabulary
from tests.data_pipeline.faulty import serving
from tests.data_pipeline.test_streams import Text, on_disk

BYTES = Vocabulary("bytes")


def backward(text: str) -> Reversed:
    return Reversed(ArraySplit(text, BYTES))


def written(ids) -> list[str]:
    return [bytes(row.tolist()).decode() for row in ids]


def test_the_windows_of_a_small_text_are_these():
    plan = StreamPlan(12, batch_size=2, window=3, rotate=False)
    first, second, third = (plan.read(backward("abcdefghijkl"), step, range(2)) for step in range(3))
    assert (written(first.inputs), written(first.targets)) == (["lkj", "fed"], ["kji", "edc"])
    assert (written(second.inputs), written(second.targets)) == (["ihg", "cba"], ["hgf", "bal"])  # a circle
    assert written(third.inputs) == written(first.inputs)  # the next epoch
    assert first.reset.tolist() == [[True, False, False]] * 2 and not second.reset.any()


def test_a_document_begins_after_the_separator_was_read_from_its_end():
    # Of "ab<>cd<>ef<>" the documents are read as "><fe", "><dc", "><ba": the separator's first symbol, read last, has
    # zero state and predicts the document's last symbol; the document before has predicted all of the separator.
    plan = StreamPlan(12, batch_size=1, window=12, rotate=False)
    separator = tuple(reversed(b"<>"))
    batch = plan.read(backward("ab<>cd<>ef<>"), 0, range(1), separator=separator)
    assert written(batch.inputs) == ["><fe><dc><ba"]
    # The first symbol begins the stream, and three separators end.
    assert np.flatnonzero(batch.reset[0]).tolist() == [0, 1, 5, 9]
    assert [written(batch.targets)[0][place] for place in (1, 5, 9)] == ["f", "d", "b"]


@settings(max_examples=40)
@given(st.data())
def test_every_window_is_that_of_the_flipped_text(tmp_path_factory, data):
    symbols = data.draw(st.integers(60, 300))
    ids = np.random.default_rng(symbols).integers(0, 3, symbols).astype(np.uint8)
    split = Reversed(on_disk(tmp_path_factory.mktemp("corpus"), ids))
    how = {"seed": data.draw(st.integers(0, 99)), "deviation": data.draw(st.integers(0, 1))}
    plan = StreamPlan(symbols, 3, 8, **how)
    if data.draw(st.booleans()):
        plan = SegmentPlan(symbols, 3, 8, **how, members=(Member("it", symbols),), segment=20, shuffle=True)
    step, separator = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([(), (1,), (1, 2), (0, 0)]))
    one, other = (plan.read(text, step, range(3), separator=separator) for text in (split, Text(ids[::-1])))
    for ours, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("separator", [(), (1, 2)])
def test_every_chunk_that_is_scored_is_that_of_the_flipped_text(tmp_path, separator):
    ids = np.random.default_rng(0).integers(0, 3, 501).astype(np.uint8)
    plan = ChunkPlan(501, chunk=50, burn_in=20, batch_size=4, window=16)
    pairs = zip(
        read_chunks(Reversed(on_disk(tmp_path, ids)), plan, range(4), separator),
        read_chunks(Text(ids[::-1]), plan, range(4), separator),
        strict=True,
    )
    scored = 0
    for (batch, counted), (expected, also) in pairs:
        for ours, theirs in zip((*batch, counted), (*expected, also), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        scored += counted.sum()
    assert scored == 500


def test_a_mixture_turns_each_text_around_and_leaves_them_in_their_order(tmp_path):
    texts = {"a": "".join(map(str, range(400))), "b": "the quick brown fox jumps over the lazy dog. " * 30}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    parts = mixture.parse(",".join(f"{tmp_path / name}.txt:1" for name in texts))
    forward = mixture.load(parts, lambda name: corpora.load(CorpusSettings(corpus=name, cache_dir=str(tmp_path / "c"))))
    turned = direction.backward(forward)
    assert turned.fingerprint == forward.fingerprint and turned.members == forward.members
    for name in ("train", "valid", "test"):
        parts = [split.read(0, len(split))[::-1] for split in forward.texts(name).values()]
        whole = turned.splits[name]
        np.testing.assert_array_equal(whole.read(0, len(whole)), np.concatenate(parts))
        assert (whole.bytes, whole.characters) == (forward.splits[name].bytes, forward.splits[name].characters)
        for one, part in zip(turned.texts(name).values(), parts, strict=True):
            np.testing.assert_array_equal(one.read(0, len(one)), part)


def test_from_an_object_store_come_the_windows_of_the_disk(tmp_path):
    pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")
    ids = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8)
    on_disk(tmp_path, ids)
    plan = StreamPlan(3000, 4, 7, seed=5)
    with serving(tmp_path.parent) as server:
        there = direction.backward(open_corpus(f"{server.address}/{tmp_path.name}")).train
        assert there.is_remote and pickle.loads(pickle.dumps(there)).is_remote
        with open_windows(there, plan, rows=range(4), start_step=3) as windows:
            for step in range(3, 9):
                expected = plan.read(Text(ids[::-1]), step, range(4))
                for ours, theirs in zip(next(windows), expected, strict=True):
                    np.testing.assert_array_equal(ours, theirs)


def test_it_can_be_pickled_and_read_from_memory(tmp_path):
    split = Reversed(on_disk(tmp_path, np.arange(200)))
    again = pickle.loads(pickle.dumps(split))
    assert again.read(0, 5).tolist() == [199, 198, 197, 196, 195] and len(again) == again.bytes == 200
    assert bytes(backward("abc").read(1, 3)) == b"ba"
