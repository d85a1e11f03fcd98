"""Chunks of a held-out split: every symbol is scored once, after what really stands before it."""

import numpy as np
import pytest

from data_pipeline.eval_chunks import ChunkPlan, read_chunks


class Text:
    dtype = np.dtype(np.uint16)

    def __init__(self, symbols: int):
        self.ids = np.random.default_rng(symbols).integers(0, 500, symbols).astype(np.uint16)

    def __len__(self):
        return len(self.ids)

    def read(self, start, stop):
        assert 0 <= start <= stop <= len(self.ids)
        return self.ids[start:stop]


def follow(text: Text, plan: ChunkPlan, separator=()):
    """Every scored target as (position, symbols read since the reset before it), by plain bookkeeping."""
    context = [[] for _ in range(plan.batch_size)]
    for batch, scored in read_chunks(text, plan, range(plan.batch_size), separator):
        for row in range(plan.batch_size):
            for t in range(plan.window):
                if batch.reset[row, t]:
                    context[row] = []
                context[row].append(int(batch.inputs[row, t]))
                if scored[row, t]:
                    yield int(batch.targets[row, t]), context[row].copy()


CASES = [
    # symbols, chunk, burn_in, batch_size, window
    (100, 10, 5, 4, 7),
    (101, 10, 0, 3, 10),
    (97, 1000, 50, 2, 13),
    (64, 16, 40, 8, 5),
    (2, 1, 3, 2, 4),
]


@pytest.mark.parametrize("case", CASES)
def test_every_symbol_but_the_first_is_scored_exactly_once_after_its_own_context(case):
    text, plan = Text(case[0]), ChunkPlan(*case)
    seen = list(follow(text, plan))
    assert len(seen) == len(text) - 1
    expected = []
    for position in range(1, len(text)):
        begin = max(position // plan.chunk * plan.chunk - plan.warm_up - 1, 0)
        expected.append((int(text.ids[position]), text.ids[begin:position].tolist()))
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(
    ("most", "chunks"),
    [
        (0, range(10)),
        (97, range(10)),
        (1000, range(10)),
        (96, range(9)),
        (50, range(0, 10, 2)),
        (35, (0, 3, 6)),
        (3, (0,)),
    ],
)
def test_of_a_longer_split_whole_chunks_evenly_spaced_are_scored_each_after_its_own_context(most, chunks):
    text, plan = Text(97), ChunkPlan(97, 10, 5, 4, 7, most)
    expected = [
        (int(text.ids[t]), text.ids[max(10 * chunk - 6, 0) : t].tolist())
        for chunk in chunks
        for t in range(max(10 * chunk, 1), min(10 * chunk + 10, 97))
    ]
    assert sorted(follow(text, plan)) == sorted(expected)
    assert plan.scored == len(expected) + 1 and plan.chunks == len(chunks)


def test_the_context_of_a_symbol_does_not_depend_on_batch_size_or_window():
    text = Text(333)
    one = sorted(follow(text, ChunkPlan(333, 20, 15, 1, 9)))
    assert one == sorted(follow(text, ChunkPlan(333, 20, 15, 8, 64)))


def test_rows_of_several_processes_together_are_the_global_batch():
    text, plan = Text(200), ChunkPlan(200, 11, 4, 8, 6)
    whole = list(read_chunks(text, plan, range(8)))
    parts = [list(read_chunks(text, plan, range(p * 2, p * 2 + 2))) for p in range(4)]
    for step, (batch, scored) in enumerate(whole):
        for field, array in enumerate(batch):
            np.testing.assert_array_equal(array, np.concatenate([part[step][0][field] for part in parts]))
        np.testing.assert_array_equal(scored, np.concatenate([part[step][1] for part in parts]))


def test_state_is_reset_at_a_document_separator():
    text = Text(90)
    text.ids[[30, 55]] = 501
    for _, context in follow(text, ChunkPlan(90, 90, 0, 1, 8), separator=(501,)):
        assert 501 not in context[1:]


@pytest.mark.parametrize("separator", [(1,), (0, 0), (1, 0, 1), (0, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_separator_ends_where_it_ends_in_the_split_whatever_pieces_and_windows_it_is_read_in(case, separator):
    text, plan, k = Text(case[0]), ChunkPlan(*case), len(separator)
    text.ids %= 2
    text.ids[:2] = 0, 1  # nothing precedes it, and no zeros
    for group, (batch, _) in enumerate(read_chunks(text, plan, range(plan.batch_size), separator)):
        group, index = divmod(group, plan.windows)
        for row in range(plan.batch_size):
            begin = max((group * plan.batch_size + row) * plan.chunk - plan.warm_up - 1, 0)  # the first that is read
            for t in range(plan.window):
                q = (group * plan.batch_size + row) * plan.chunk - plan.warm_up + index * plan.window + t - 1
                if begin <= q < len(text):
                    assert batch.inputs[row, t] == text.ids[q]
                    ends = q >= k - 1 and tuple(text.ids[q - k + 1 : q + 1]) == separator
                    assert batch.reset[row, t] == (q == begin or ends)


def test_a_split_of_one_symbol_is_refused():
    with pytest.raises(ValueError, match="1 symbols cannot be scored"):
        ChunkPlan(1, 10, 0, 1, 5)
