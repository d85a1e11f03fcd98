"""Streams: who reads what, and where state is zeroed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import rows_of_process
from data_pipeline.manifest import Manifest, SplitRecord, write_manifest
from data_pipeline.shard_writer import write_shard
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan
from data_pipeline.vocabulary import Vocabulary


class Text:
    """A split that is an array.  With ids 0, 1, 2, ... each symbol is its own position."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)
        self.dtype = self.ids.dtype

    def __len__(self):
        return len(self.ids)

    def read(self, start, stop):
        assert 0 <= start <= stop <= len(self.ids)
        return self.ids[start:stop]


class Endless:
    """A split of any length: symbol i is i modulo 2^32."""

    dtype = np.dtype(np.uint32)

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.length
        return np.array([i % 2**32 for i in range(start, stop)], np.uint32)


def on_disk(directory, ids, shard_symbols=97, block_bytes=64):
    """The training split of a prepared corpus of `ids`, in many small shards of small blocks."""
    wide = int(np.max(ids)) > 255
    vocabulary = Vocabulary("characters", "".join(map(chr, range(100, 500)))) if wide else Vocabulary("bytes")
    ids = np.asarray(ids, vocabulary.dtype)
    shards = tuple(
        write_shard(directory, f"train-{number:05}.ids", [ids[start : start + shard_symbols]], block_bytes)
        for number, start in enumerate(range(0, len(ids), shard_symbols))
    )
    split = SplitRecord(len(ids), len(ids), None, 0, shards)
    write_manifest(directory, Manifest(vocabulary, {"train": split}, block_bytes=block_bytes))
    return open_corpus(directory).splits["train"]


def numbered(length):
    return Text(np.arange(length, dtype=np.uint32))


@st.composite
def plans(draw):
    batch_size, window = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    symbols = batch_size * window + draw(st.integers(0, 100))
    return StreamPlan(symbols, batch_size, window, draw(st.integers(0, 2**40)), draw(st.booleans()))


def whole_epoch(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return plan.read(numbered(plan.symbols), first, range(plan.batch_size), windows=plan.steps_per_epoch)


@given(plans(), st.integers(0, 5))
def test_an_epoch_reads_no_symbol_twice_and_leaves_out_exactly_the_remainder(plan, epoch):
    inputs = whole_epoch(plan, epoch).inputs
    assert len(np.unique(inputs)) == inputs.size
    assert inputs.size == plan.symbols - plan.symbols % (plan.batch_size * plan.window)


@pytest.mark.parametrize("rotate", [False, True])
def test_an_epoch_of_whole_windows_reads_and_predicts_every_symbol_exactly_once(rotate):
    plan = StreamPlan(4 * 5 * 6, batch_size=4, window=6, rotate=rotate)
    batch = whole_epoch(plan, 0)
    assert sorted(batch.inputs.ravel()) == sorted(batch.targets.ravel()) == list(range(120))


def test_without_rotation_the_streams_are_the_columns_of_the_text():
    plan = StreamPlan(50 * 423 * 50, batch_size=50, window=50, rotate=False)
    assert plan.steps_per_epoch == 423
    columns = np.arange(plan.symbols).reshape(50, 423 * 50)
    for epoch in (0, 1):
        batch = whole_epoch(plan, epoch)
        np.testing.assert_array_equal(batch.inputs, columns)
        assert batch.targets[-1, -1] == 0  # the last symbol predicts the first


@given(plans(), st.integers(0, 200))
def test_every_target_is_the_symbol_after_its_input(plan, step):
    batch = plan.read(numbered(plan.symbols), step, range(plan.batch_size))
    np.testing.assert_array_equal(batch.targets, (batch.inputs.astype(int) + 1) % plan.symbols)


@given(plans(), st.integers(0, 200))
def test_a_window_goes_on_where_the_one_before_it_ended_unless_the_stream_begins_anew(plan, step):
    text, rows = numbered(plan.symbols), range(plan.batch_size)
    before, after = plan.read(text, step, rows), plan.read(text, step + 1, rows)
    if (step + 1) % plan.steps_per_epoch == 0:
        assert after.reset[:, 0].all()
    else:
        np.testing.assert_array_equal(before.targets[:, -1], after.inputs[:, 0])
        assert (after.reset[:, 0] == (after.inputs[:, 0] == 0)).all()


@pytest.mark.parametrize(("symbol_count", "dtype"), [(5, np.uint8), (400, np.uint16)])
def test_the_rows_of_all_processes_are_the_global_batch_across_shards_and_epochs(tmp_path, symbol_count, dtype):
    plan = StreamPlan(1003, batch_size=8, window=10, seed=3)
    ids = np.random.default_rng(0).integers(0, symbol_count, plan.symbols)
    split = on_disk(tmp_path, ids)  # 11 shards
    for step in range(3 * plan.steps_per_epoch):
        whole = plan.read(Text(ids.astype(dtype)), step, range(8), separator=(2,))
        for process_count in (1, 2, 4):
            shares = [rows_of_process(8, p, process_count) for p in range(process_count)]
            parts = [plan.read(split, step, rows, separator=(2,)) for rows in shares]
            for name in whole._fields:
                together = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(together, getattr(whole, name))
                assert together.dtype == getattr(whole, name).dtype


@given(plans(), st.integers(0, 3), st.data())
def test_windows_read_together_are_the_windows_read_one_by_one_end_to_end(plan, epoch, data):
    text, rows = Text(np.arange(plan.symbols, dtype=np.uint16) % 7), range(plan.batch_size)
    first = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    count = data.draw(st.integers(1, plan.steps_per_epoch - first))
    step = epoch * plan.steps_per_epoch + first
    separator = data.draw(st.sampled_from([(3,), (6, 0), (2, 3, 4)]))
    together = plan.read(text, step, rows, windows=count, separator=separator)
    singly = [plan.read(text, s, rows, separator=separator) for s in range(step, step + count)]
    for name in together._fields:
        joined = np.concatenate([getattr(batch, name) for batch in singly], axis=1)
        np.testing.assert_array_equal(getattr(together, name), joined)


def test_state_is_zeroed_at_the_start_of_a_stream_at_the_seam_and_at_each_separator():
    #                0    1    2    3    4    5    6    7    8    9   10   11
    text = Text([*map(ord, "ab|cdefgh|ij")])
    plan = StreamPlan(12, batch_size=2, window=3)
    epoch = next(e for e in range(1, 100) if plan.offset(e) == 4)  # streams begin at 4 and at 10
    step, rows = epoch * plan.steps_per_epoch, range(2)
    first, second = (plan.read(text, s, rows, separator=(ord("|"),)) for s in (step, step + 1))

    def lines(ids):
        return ["".join(map(chr, row)) for row in ids]

    assert lines(first.inputs) == ["def", "ija"] and lines(first.targets) == ["efg", "jab"]
    assert first.reset.tolist() == [[True, False, False], [True, False, True]]  # "a" is the first symbol of the text
    assert lines(second.inputs) == ["gh|", "b|c"] and lines(second.targets) == ["h|i", "|cd"]
    assert second.reset.tolist() == [[False, False, True], [False, True, False]]
    plain = plan.read(text, step + 1, rows)
    assert not plain.reset.any()


@given(plans(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_whether_a_separator_ends_at_a_symbol_depends_on_its_place_in_the_split_alone(plan, symbols, k, seed, data):
    """The slow twin: look at each place of the text by itself.  Windows, epochs and processes have no part in it."""
    text = np.random.default_rng(seed).integers(0, symbols, plan.symbols).astype(np.uint8)
    separator = data.draw(st.lists(st.integers(0, symbols - 1), min_size=k, max_size=k))
    ends = [q >= k - 1 and text[q - k + 1 : q + 1].tolist() == separator for q in range(plan.symbols)]
    step = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    first = data.draw(st.integers(0, plan.batch_size - 1))
    rows = range(first, data.draw(st.integers(first + 1, plan.batch_size)))
    batch = plan.read(Text(text), step, rows, separator=tuple(separator))
    for row, start in enumerate(plan.positions(step, rows)):
        for t in range(plan.window):
            q = (start + t) % plan.symbols
            begins = q == 0 or (t == 0 and step % plan.steps_per_epoch == 0)
            assert batch.inputs[row, t] == text[q] and batch.targets[row, t] == text[(q + 1) % plan.symbols]
            assert batch.reset[row, t] == (begins or ends[q])


def test_a_separator_that_straddles_two_windows_or_the_start_of_a_stream_is_one_and_across_the_seam_it_is_none():
    #                0    1    2    3    4    5    6    7    8    9   10   11
    text = Text([*map(ord, "|ab||cd|||e|")])
    plan = StreamPlan(12, batch_size=3, window=2, rotate=False)  # streams begin at 0, 4 and 8
    first, second = (plan.read(text, step, range(3), separator=(ord("|"),) * 2) for step in (0, 1))
    assert first.reset.tolist() == [[True, False], [True, False], [True, True]]
    assert second.reset.tolist() == [[False, False], [False, False], [False, False]]
    epoch = next(e for e in range(100) if StreamPlan(12, 3, 2).offset(e) == 5)  # streams begin at 5, 9 and 1
    plan = StreamPlan(12, batch_size=3, window=2)
    first, second = (plan.read(text, 2 * epoch + w, range(3), separator=(ord("|"),) * 2) for w in (0, 1))
    assert first.reset.tolist() == [[True, False], [True, False], [True, False]]
    assert second.reset.tolist() == [[False, True], [False, True], [False, True]]
    alike, separator = Text(np.zeros(12, np.uint8)), (0, 0, 0, 0)  # the first one within the split ends at 3
    for window in (1, 2, 6):
        plan = StreamPlan(12, batch_size=1, window=window, rotate=False)
        resets = [plan.read(alike, step, range(1), separator=separator).reset[0] for step in range(12 // window)]
        assert np.concatenate(resets).tolist() == [True, False, False] + [True] * 9


def test_a_window_that_begins_at_the_seam_is_reset_at_its_first_symbol_only():
    plan = StreamPlan(12, batch_size=1, window=4)
    epoch = next(e for e in range(100) if plan.offset(e) == 8)
    resets = [plan.read(numbered(12), 3 * epoch + w, range(1)).reset.tolist() for w in range(3)]
    anew, on = [[True, False, False, False]], [[False] * 4]
    assert resets == [anew, anew, on]


def test_rotation_gives_each_epoch_another_offset_and_seeds_next_to_each_other_nothing_in_common():
    offsets = {s: [StreamPlan(2**50, 8, 8, seed=s).offset(e) for e in range(50)] for s in range(20)}
    assert len(set(itertools.chain(*offsets.values()))) == 20 * 50
    assert StreamPlan(2**50, 8, 8, rotate=False).offset(7) == 0


def test_offsets_are_uniform_over_the_split():
    plan, draws = StreamPlan(10, 1, 1, seed=1), 10000
    counts = np.bincount([plan.offset(e) for e in range(draws)], minlength=10)
    assert len(counts) == 10
    assert (abs(counts - draws / 10) < 5 * np.sqrt(draws * 0.1 * 0.9)).all()


def test_offsets_are_the_same_numbers_in_every_version():
    """A checkpoint holds a step and no positions: were the offsets to change, a resumed run would read other text."""
    assert [StreamPlan(10**12, 4, 4, seed=0).offset(e) for e in (0, 1, 10**9)] == [
        629794813163,
        573536594091,
        800406086044,
    ]
    assert StreamPlan(10**12, 4, 4, seed=1).offset(0) == 315049686639


def test_positions_are_exact_where_products_pass_64_bits():
    plan = StreamPlan(2**62 - 57, batch_size=10007, window=13, seed=5)
    step, stream = 10**18 + 1, 10006
    epoch, window = divmod(step, (2**62 - 57) // (10007 * 13))
    start = (plan.offset(epoch) + 10006 * (2**62 - 57) // 10007 + window * 13) % (2**62 - 57)
    assert plan.positions(step, range(stream, stream + 1)) == [start]
    batch = plan.read(Endless(plan.symbols), step, range(stream, stream + 1))
    assert batch.inputs.tolist() == [[(start + t) % 2**32 for t in range(13)]]


def test_a_far_step_is_read_as_easily_as_the_first():
    plan = StreamPlan(2**46, batch_size=4, window=8)
    batch = plan.read(Endless(2**46), 10**12, range(4))
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.inputs[:, 1:])


def test_a_split_shorter_than_one_window_a_stream_is_refused():
    with pytest.raises(ValueError, match=r"99 symbols is too short for batch_size=10 .*window=10: needs at least 100;"):
        StreamPlan(99, batch_size=10, window=10)
    assert StreamPlan(100, batch_size=10, window=10).steps_per_epoch == 1


def test_the_smallest_split_of_one_symbol_predicts_itself():
    batch = StreamPlan(1, batch_size=1, window=1).read(numbered(1), 5, range(1))
    assert (batch.inputs.item(), batch.targets.item(), batch.reset.item()) == (0, 0, True)


def test_drawn_resets_are_a_formula_of_seed_step_and_stream_at_the_first_symbol_of_a_window_alone():
    text = np.arange(5000, dtype=np.uint16)
    split = type("Text", (), {"dtype": text.dtype, "__len__": lambda s: 5000, "read": lambda s, a, b: text[a:b]})()
    plan = StreamPlan(5000, batch_size=16, window=10, seed=3, rotate=False, reset_probability=0.25)
    steps = range(1, plan.steps_per_epoch)
    drawn = np.array([plan.read(split, step, range(16)).reset for step in steps])
    assert not drawn[:, :, 1:].any()
    np.testing.assert_array_equal(drawn[:, :, 0], [plan.resets(step, range(16)) for step in steps])
    assert abs(drawn[:, :, 0].mean() - 0.25) < 0.05
    # Read together, or by the rows of four processes, they are the same.
    together = plan.read(split, 1, range(16), windows=30).reset
    np.testing.assert_array_equal(together, np.concatenate(drawn[:30], axis=1))
    parts = [plan.read(split, 7, rows_of_process(16, p, 4)).reset for p in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), drawn[6])
    # Another seed, another step and another stream draw otherwise; probability 0 draws none, and 1 all.
    other = StreamPlan(5000, batch_size=16, window=10, seed=4, rotate=False, reset_probability=0.25)
    assert (drawn[:, :, 0] != [other.resets(step, range(16)) for step in steps]).any()
    assert len(np.unique(drawn[:, :, 0], axis=0)) > 25 and len(np.unique(drawn[:, :, 0], axis=1).T) == 16
    assert not StreamPlan(5000, 16, 10).resets(5, range(16)).any()
    assert StreamPlan(5000, 16, 10, reset_probability=1.0).resets(5, range(16)).all()


def test_drawn_resets_are_the_same_in_every_version():
    plan = StreamPlan(5000, batch_size=16, window=10, seed=1, reset_probability=0.25)
    assert np.flatnonzero(plan.resets(2**40, range(16))).tolist() == [0, 1, 7, 12, 14]
