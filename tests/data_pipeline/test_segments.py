"""Segments in turns and random order: exact shares, each once a pass, and text that is a formula of the step."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.batch import rows_of_process
from data_pipeline.loader import WindowSource, open_windows
from data_pipeline.segments import Change, Cycle, Member, SegmentPlan, automatic_segment, permuted
from data_pipeline.streams import StreamPlan


class Text:
    """A text in memory."""

    def __init__(self, ids):
        self._ids = np.asarray(ids)
        self.dtype = self._ids.dtype

    def __len__(self):
        return len(self._ids)

    def read(self, start, stop):
        assert 0 <= start <= stop <= len(self)
        return self._ids[start:stop].copy()


def make(members, batch_size=4, window=5, segment=20, **how):
    members = tuple(Member(f"m{n}", size, weight) for n, (size, weight) in enumerate(members))
    return SegmentPlan(
        sum(member.symbols for member in members), batch_size, window, members=members, segment=segment, **how
    )


@st.composite
def plans(draw):
    batch_size, window = draw(st.integers(1, 6)), draw(st.integers(6, 12))
    how = draw(st.sampled_from([{}, {"deviation": 1}, {"short_probability": 0.3}, {"reset_probability": 0.2}]))
    segment = draw(st.sampled_from([0, window + 2, 3 * window, 40]))
    weights = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    if not segment:
        batch_size = max(batch_size, sum(weights))
    sizes = [batch_size * max(segment, window + 2) + draw(st.integers(0, 90)) for _ in weights]
    seed, rotate, shuffle = draw(st.integers(0, 2**40)), draw(st.booleans()), draw(st.booleans())
    if segment and draw(st.booleans()):
        others = st.lists(st.integers(0, 4), min_size=len(weights), max_size=len(weights)).filter(any)
        changes = draw(st.dictionaries(st.integers(1, 30), others.map(tuple), max_size=3))
        how |= {"changes": tuple(Change(*item) for item in sorted(changes.items()))}
    members = list(zip(sizes, weights, strict=True))
    return make(members, batch_size, window, segment, seed=seed, rotate=rotate, shuffle=shuffle, **how)


def slots_one_by_one(weights):
    """Tijdeman's algorithm, as he wrote it, which knows of no cycle."""
    had, share = [0] * len(weights), [Fraction(p, sum(weights)) for p in weights]
    least = Fraction(1, max(1, 2 * len(weights) - 2))
    for n in itertools.count(1):
        behind = [share[c] * n - had[c] for c in range(len(weights))]
        member = min(
            (c for c in range(len(weights)) if behind[c] >= least),
            key=lambda c: ((1 - least - behind[c]) / share[c], c),
        )
        yield member, had[member]
        had[member] += 1


def read_one_by_one(plan, steps):
    """The slow twin: the streams read on symbol by symbol, nothing is computed from a step's number.

    Yields the window of each step: for each stream (member, places in it, whether it begins anew).
    """
    weights = [member.weight for member in plan.members]
    slots, W, B = slots_one_by_one(weights), plan.windows, plan.batch_size
    fixed = [next(slots) for _ in range(B)] if not plan.segment else None
    late = [math.ceil(Fraction((b + 1) * W[0], B)) % W[0] for b in range(B)]
    reading, turns, changes = [None] * B, [0] * B, dict(plan.changes)
    had = [0] * len(weights)
    for step in range(steps):
        row = []
        if step in changes:
            slots = slots_one_by_one(changes[step])
        for b in range(B):
            if plan.segment:
                begins = step == 0 or step % W[0] == late[b]
            else:
                begins = step % W[fixed[b][0]] == 0
            if begins:
                member, ordinal = next(slots) if plan.segment else fixed[b]
                if plan.segment:  # however often the weights have changed
                    ordinal, had[member] = had[member], had[member] + 1
                size = plan.members[member].symbols
                if plan.segment:
                    times, number = divmod(ordinal, size // plan.segment)
                    count = size // plan.segment
                    order = [permuted(i, count, f"{plan.seed} {member} {times}") for i in range(count)]
                    start = (order[number] if plan.shuffle else number) * plan.segment
                else:
                    times, start = turns[b], ordinal * size // sum(m == member for m, _ in fixed)
                turns[b] += 1
                reading[b] = member, (plan._pass_offset(member, times) + start) % size
            member, place = reading[b]
            size, length = plan.members[member].symbols, plan.length(step, step + 1)
            row.append((member, [(place + t) % size for t in range(length + 1)], begins))
            reading[b] = member, (place + length) % size
        yield row


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(1, 2), st.data())
def test_any_window_of_any_stream_is_that_of_a_reader_that_reads_on_symbol_by_symbol(plan, k, data):
    steps = 3 * max(plan.windows) + 2
    texts = [
        np.random.default_rng(n).integers(0, 3, m.symbols).astype(np.uint8) + 3 * n for n, m in enumerate(plan.members)
    ]
    separator = tuple(data.draw(st.lists(st.integers(0, 2), min_size=k, max_size=k)))
    split, rows = Text(np.concatenate(texts)), range(plan.batch_size)
    step = data.draw(st.integers(0, steps - 1))
    expected = list(read_one_by_one(plan, steps))[step]
    batch = plan.read(split, step, rows, separator=separator)
    drawn = plan.resets(step, rows)
    for b, (member, places, begins) in enumerate(expected):
        text = texts[member]
        assert batch.inputs[b].tolist() == text[places[:-1]].tolist()
        assert batch.targets[b].tolist() == text[places[1:]].tolist()
        ends = [q >= k - 1 and tuple(text[q - k + 1 : q + 1].tolist()) == separator for q in places[:-1]]
        first = [t == 0 and (begins or drawn[b]) for t in range(len(ends))]
        assert batch.reset[b].tolist() == [a or e or q == 0 for a, e, q in zip(first, ends, places, strict=False)]


@settings(max_examples=20, deadline=None)
@given(plans(), st.integers(0, 300), st.integers(1, 40))
def test_windows_read_together_are_the_windows_read_one_by_one_and_rows_do_not_depend_on_processes(plan, step, count):
    split, rows = Text(np.arange(plan.symbols, dtype=np.uint32)), range(plan.batch_size)
    together = plan.read(split, step, rows, windows=count, separator=(7,))
    singly = [plan.read(split, s, rows, separator=(7,)) for s in range(step, step + count)]
    alone = [plan.read(split, step, range(b, b + 1), windows=count, separator=(7,)) for b in rows]
    for name in together._fields:
        joined = np.concatenate([getattr(batch, name) for batch in singly], axis=1)
        np.testing.assert_array_equal(getattr(together, name), joined)
        np.testing.assert_array_equal(np.concatenate([getattr(row, name) for row in alone]), joined)


def test_the_rows_of_four_processes_are_the_global_batch_read_ahead_from_any_step():
    plan = make([(700, 3), (500, 2), (900, 1)], batch_size=8, window=6, segment=50, seed=5, reset_probability=0.1)
    split = Text(np.random.default_rng(0).integers(0, 5, plan.symbols).astype(np.uint8))
    steps = 40
    expected = [plan.read(split, step, range(8), separator=(2, 1)) for step in range(steps)]
    for count, start in ((1, 0), (4, 13)):
        shares = [rows_of_process(8, process, count) for process in range(count)]
        opened = [open_windows(split, plan, rows=rows, start_step=start, separator=(2, 1)) for rows in shares]
        for step in range(start, steps):
            parts = [next(windows) for windows in opened]
            for name in parts[0]._fields:
                whole = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(whole, getattr(expected[step], name))
        for windows in opened:
            windows.close()


def test_runs_of_the_loader_begin_where_no_stream_does():
    plan = make([(40_000, 1), (60_000, 2)], batch_size=4, window=16, segment=2_000)
    split = Text(np.arange(plan.symbols, dtype=np.uint32))
    source = WindowSource(split, plan, range(1, 3))
    for step in (0, 1, 999, 1023, 1024, 5_000):
        for found, expected in zip(source[step], plan.read(split, step, range(1, 3)), strict=True):
            np.testing.assert_array_equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
@example([1, 1, 1, 7])
@example([1] * 10 + [100])
def test_at_no_moment_is_a_corpus_a_slot_from_its_share_and_over_a_cycle_none_is_off(weights):
    cycle = Cycle(weights)
    members = [cycle.slot(n)[0] for n in range(2 * len(cycle) + 1)]
    had = np.cumsum([[member == c for c in range(len(weights))] for member in members], axis=0)
    exact = np.arange(1, len(members) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(had - exact).max() <= 1 - 1 / max(2, 2 * len(weights) - 2) + 1e-9
    assert had[len(cycle) - 1].tolist() == weights and had[2 * len(cycle) - 1].tolist() == [2 * p for p in weights]
    reference = list(itertools.islice(slots_one_by_one(weights), len(members)))
    assert [cycle.slot(n) for n in range(len(members))] == reference


@settings(max_examples=20, deadline=None)
@given(plans().filter(lambda plan: plan.segment and not plan.changes))
def test_the_turns_that_have_begun_are_within_a_slot_of_the_weights_at_any_step(plan):
    weights = np.array([member.weight for member in plan.members])
    had, begun = np.zeros(len(weights)), 0
    for row in read_one_by_one(plan, 4 * plan.windows[0]):
        for b, (_, _, begins) in enumerate(row):
            if begins:
                had[row[b][0]] += 1
                begun += 1
        assert np.abs(had - begun * weights / weights.sum()).max() < 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**64))
def test_the_order_of_segments_is_a_permutation(size, seed):
    assert sorted(permuted(i, size, str(seed)) for i in range(size)) == list(range(size))


def test_the_order_of_segments_is_like_a_drawn_one_and_another_for_each_key():
    size = 1000
    orders = [[permuted(i, size, f"{seed} 0 {times}") for i in range(size)] for seed in (0, 1) for times in (0, 1)]
    for one, other in itertools.combinations([range(size), *orders], 2):
        assert np.mean(np.equal(one, other)) < 0.01
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    assert permuted(123_456_789_012, 10**15, "7 1 2") < 10**15


def test_the_order_of_segments_and_the_turns_are_the_same_in_every_version():
    """A checkpoint holds a step alone: were these to change, a resumed run would read other text."""
    assert [permuted(i, 10**9, "0 0 0") for i in range(3)] == PERMUTED
    plan = make([(10**9, 3), (10**8, 2)], batch_size=4, window=128, segment=2**16, seed=1)
    assert [plan.positions(step, range(4)) for step in (0, 10**7)] == POSITIONS
    assert [plan.length(0, 10), make([(10**6, 1)], 2, 20, 100, deviation=2).length(0, 11)] == [1280, LENGTH]


def test_other_weights_hold_for_the_turns_that_begin_at_their_step_or_later_and_for_no_other():
    change = Change(57, (0, 3, 2))
    plain = make([(900, 2), (700, 1), (800, 1)], batch_size=8, window=5, segment=100, seed=3)
    changed = make([(900, 2), (700, 1), (800, 1)], batch_size=8, window=5, segment=100, seed=3, changes=(change,))
    had = np.zeros(3)
    for step in range(400):
        for b in range(8):
            before, now = plain.turn(step, b), changed.turn(step, b)
            assert (before.first, before.stop) == (now.first, now.stop)
            if now.first < change.step:
                assert before == now
            elif now.first == step:
                had[now.member] += 1
                assert np.abs(had - had.sum() * np.array(change.weights) / 5).max() < 1
    assert had[0] == 0 and had.sum() > 100
    read = np.zeros(3)
    for step in range(400):
        for b in range(8):
            read[changed.turn(step, b).member] += 5
    assert np.abs(changed.passes(400) - read / [900, 700, 800]).max() < 1


PERMUTED = [587233931, 187751117, 694509378]
POSITIONS = [[410470102, 1060294281, 673203926, 1078972041], [1085490366, 380511078, 1081132222, 82762086]]
LENGTH = 220


@settings(max_examples=25, deadline=None)
@given(plans().filter(lambda plan: plan.segment and not plan.deviation and not plan.short_probability))
def test_each_pass_over_a_corpus_reads_every_segment_once(plan):
    found = [{} for _ in plan.members]
    W, B = plan.windows[0], plan.batch_size
    for turn in range(12):
        for b in range(B):
            at = plan.turn(max(0, (turn - 1) * W + -(-(b + 1) * W // B)), b)
            number, ordinal = plan.slot(turn * B + b)
            assert number == at.member
            found[number][ordinal] = at.position
    for number, member in enumerate(plan.members):
        size = member.symbols // plan.segment
        ordinals = sorted(found[number])
        assert ordinals == list(range(len(ordinals)))
        for times in range(len(ordinals) // size):
            first = plan._pass_offset(number, times)
            places = [(found[number][j] - first) % member.symbols for j in range(times * size, (times + 1) * size)]
            assert sorted(places) == [n * plan.segment for n in range(size)]
            assert plan.shuffle or places == sorted(places)


@settings(max_examples=25, deadline=None)
@given(plans(), st.integers(0, 10**12), st.integers(0, 5))
def test_a_turn_never_reads_beyond_its_segment_and_leaves_about_a_window_of_it_at_most(plan, step, stream):
    for _ in range(30):
        turn = plan.turn(step, stream % plan.batch_size)
        assert turn.first <= step < turn.stop
        member = plan.members[turn.member]
        room, read = plan.segment or member.symbols // plan.streams[turn.member], plan.length(turn.first, turn.stop)
        assert read <= room
        if turn.first and not plan.short_probability:  # the first ones are cut short
            assert read > room - plan.window - 4 * plan.deviation
        step = turn.stop


def test_streams_begin_anew_one_after_the_other_so_that_never_all_states_are_zero():
    plan = make([(4_000, 1), (4_000, 1)], batch_size=8, window=5, segment=100)
    split = Text(np.ones(plan.symbols, np.uint8))
    begins = np.array([[s.begins for s in plan.stretches(step, range(8))] for step in range(200)])
    assert begins[0].all() and begins[1:].sum(1).max() == 1
    zeroed = np.array([plan.read(split, step, range(8)).reset[:, 0] for step in range(200)])
    assert (zeroed >= begins).all()


def test_one_corpus_in_fixed_streams_is_the_plan_of_that_corpus():
    plain = StreamPlan(1234, 6, 7, seed=3, reset_probability=0.1)
    fixed = make([(1234, 1)], 6, 7, 0, seed=3, reset_probability=0.1)
    split = Text(np.arange(1234, dtype=np.uint16))
    for step in range(3 * plain.steps_per_epoch):
        for a, b in zip(plain.read(split, step, range(6)), fixed.read(split, step, range(6)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_fixed_streams_keep_to_their_corpus_and_shuffled_ones_of_a_text_in_order_follow_each_other():
    plan = make([(1000, 3), (500, 1)], batch_size=8, window=10, segment=0)
    members = {step: [plan.turn(step, b).member for b in range(8)] for step in (0, 17, 10**6)}
    assert plan.streams == [6, 2] and members[0] == members[17] == members[10**6] and sum(members[0]) == 2
    plan = make([(1000, 1)], batch_size=2, window=10, segment=100, shuffle=False, rotate=False)
    assert [plan.turn(10 * k + 9, 1).position for k in range(5)] == [100, 300, 500, 700, 900]


def test_a_far_step_is_read_as_easily_as_the_first():
    class Endless:
        dtype = np.dtype(np.uint32)

        def __len__(self):
            return 2**46

        def read(self, start, stop):
            return (np.arange(start, stop, dtype=np.uint64) % 2**32).astype(np.uint32)

    plan = make([(2**45, 2), (2**45, 1)], batch_size=4, window=8, segment=2**20, deviation=1)
    batch = plan.read(Endless(), 10**15, range(4))
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.inputs[:, 1:])


@pytest.mark.parametrize(
    ("members", "how", "sentence"),
    [
        ([(1000, 1)], {"segment": 4}, "segment=4 is shorter than a window, of up to 5 symbols"),
        (
            [(1000, 1), (199, 1)],
            {"segment": 100},
            "m1 has 199 training symbols, too few for 100 in each of the 2 of batch_size=4 streams that read it: needs "
            "at least 200; give --segment=99, or more text",
        ),
        ([(1000, 9), (1000, 1)], {"segment": 0}, "m1 has 1 of 10 parts of the mixture, less than one of batch_size=4"),
        ([(1000, 1), (1000, 0)], {}, "the weight of m1 is 0, and no --mixture_from gives it more: leave it out"),
        ([(1000, 1)], {"segment": 0, "changes": (Change(9, (1,)),)}, "mixture_from changes who takes the next segment"),
        (
            [(1000, 1), (30, 1)],
            {"changes": (Change(9, (1, 9)),), "segment": 10},
            "m1 has 30 training symbols, too few for 10 in each of the 4 of batch_size=4 streams that read it: needs "
            "at least 40; let mixture_from give it at most 3/4; in a new run, give --segment=7, or more text",
        ),
        ([(1000, 1), (9, 1)], {"segment": 0}, "m1 has 9 training symbols, too few for 5 in each of the 2 of"),
    ],
)
def test_a_corpus_too_short_for_its_streams_is_refused_with_both_numbers(members, how, sentence):
    with pytest.raises(ValueError, match="^" + sentence.replace("(", r"\(")):
        make(members, **how)


def test_the_automatic_segment_is_the_largest_that_every_corpus_has_one_of_for_each_stream():
    big, small = Member("big", 2**40, 3), Member("small", 16 * 70_000, 1)
    assert automatic_segment([big], 64, 128) == 2**20
    assert automatic_segment([big, small], 64, 128) == 2**16
    assert automatic_segment([big, small], 64, 128, [Change(5, (0, 1))]) == 2**14
    SegmentPlan(big.symbols + small.symbols, 64, 128, members=(big, small), segment=2**16)
    assert automatic_segment([Member("tiny", 10, 1)], 64, 128) == 128  # which the plan refuses
