"""Shuffled segments and mixtures of corpora: the text of each stream as a formula of (seed, step, stream).

In a turn, a stream reads a segment of L symbols of one corpus with carried state; each turn starts from zero state.
Turn k of stream b of B has slot n = k B + b.  The corpora take the slots in a fixed cycle, in which corpus c has p_c of
P slots: if n is slot j of corpus c, the turn reads segment j mod S of pass j // S over that corpus, which has S whole
segments, in an order drawn for each pass.  There are no counters: any step is computed from its number alone, in the
same time.  Where the weights change at a step, another cycle begins with the first turn that begins there or later.
"""

import bisect
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.streams import StreamPlan, Stretch

USUAL_SEGMENT = 2**20  # symbols
ROUNDS = 4  # of the Feistel network


class Member(NamedTuple):
    """A corpus of a mixture; all of a mixture's training splits, one after the other, are read as one."""

    name: str
    symbols: int  # N_c: of its training split
    weight: int = 1  # p_c: slots in a cycle


class Change(NamedTuple):
    """Other weights of a mixture, from a step on."""

    step: int
    weights: tuple[int, ...]  # p_c of each member; 0: not read


class Turn(NamedTuple):
    """A piece that one stream reads with carried state: steps `first` to `stop`, from `position` of a member on."""

    first: int
    stop: int
    member: int
    position: int


class Cycle:
    """The order in which C members take slots: each is always less than one slot away from its exact share.

    Tijdeman 1980, "The chairman assignment problem": slot n goes to the member that would fall too far behind
    first, among those that it does not put too far ahead.  No count is ever off by more than 1 - 1 / (2 C - 2), the
    least that can be guaranteed; so after P slots all are exact, and the order repeats.  (Webster's method, simpler,
    lets members of equal small weights come together: with ten of weight 1 beside one of 100, counts are off by 4.5.)
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights, total, slack = tuple(weights), sum(weights), max(1, 2 * len(weights) - 2)
        had, self._slots = [0] * len(weights), list[tuple[int, int]]()
        for number in range(1, total + 1):
            behind = [slack * (p * number - total * count) for p, count in zip(weights, had, strict=True)]
            # Quotients of whole numbers this small are equal as floats where they are equal, and only there.
            left = (
                ((slack - 1) * total - b) / p if b >= total else math.inf for b, p in zip(behind, weights, strict=True)
            )
            member = min(enumerate(left), key=lambda item: item[1])[0]
            self._slots.append((member, had[member]))
            had[member] += 1
        assert had == list(weights)

    def __len__(self) -> int:
        """Returns P, the number of slots in a cycle."""
        return len(self._slots)

    def slot(self, number: int) -> tuple[int, int]:
        """Returns the member that has slot `number`, and how many slots it had before."""
        cycle, place = divmod(number, len(self))
        member, before = self._slots[place]
        return member, cycle * self.weights[member] + before

    def counts(self, number: int) -> list[int]:
        """Returns how many of the first `number` slots each member has."""
        cycle, place = divmod(number, len(self))
        members = [member for member, _ in self._slots[:place]]
        return [cycle * p + members.count(c) for c, p in enumerate(self.weights)]


class Cycles(NamedTuple):
    """The slots from a change of weights on."""

    first: int  # slot
    cycle: Cycle
    before: list[int]  # slots that each member had before


def permuted(index: int, size: int, key: str) -> int:
    """Returns the place of `index` in a permutation of range(size) that is drawn by `key`, without a table.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of 2h bits, at most 4 `size` of them.  It is applied
    until the result is less than `size`: cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for number in range(ROUNDS):
            word = f"{key} {number} {right}".encode()
            digest = hashlib.blake2b(word, digest_size=8, person=b"segment order").digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & (1 << half) - 1
        index = left << half | right
        if index < size:
            return index


def automatic_segment(members: Sequence[Member], batch_size: int, window: int, changes: Sequence[Change] = ()) -> int:
    """Returns the largest power of two <= 2^20 such that each member has a segment for each of its streams."""
    segment, streams = USUAL_SEGMENT, _streams(members, changes, batch_size)
    while segment // 2 >= window and any(m.symbols // segment < n for m, n in zip(members, streams, strict=True)):
        segment //= 2
    return segment


def _streams(members: Sequence[Member], changes: Sequence[Change], batch_size: int) -> list[int]:
    """Returns how many of the streams read each member at a time, rounded up, at the weights that give it most."""
    weightings = [[member.weight for member in members], *(change.weights for change in changes)]
    return [max(-(-batch_size * p[c] // sum(p)) for p in weightings) for c in range(len(members))]


@dataclasses.dataclass(frozen=True)
class SegmentPlan(StreamPlan):
    """The positions of B streams in turns over the segments of one corpus or several, at every step.

    The split is the training splits of the members, one after the other.  All streams share one clock, so all windows
    of a step have equal lengths: g(step) is s(w) of `StreamPlan` with w = step, in an epoch without end.
    A turn has W windows, as many as fit in L symbols at their longest.  Stream b begins its turns at steps
    k W + ceil((b + 1) W / B), so that the states are not all reset at once, except at step 0 (first turns are shorter).

    With `rotate`, each pass cuts a member into segments from a new seeded offset.  What remains of the circle after S
    segments is skipped in that pass.  After a change of weights each member is read on where its last turn ended: its
    slots are counted over all changes.  With segment 0 turns are as long as can be: stream b always reads
    the member that has slot b, whose streams are evenly spaced on it, and begins anew when it has read its part.

    Raises:
      ValueError: a member is too short for the streams that read it, or has none.
    """

    members: tuple[Member, ...] = ()
    segment: int = 0  # L; 0: as long as a member allows
    shuffle: bool = True  # segments come in an order drawn for each pass, not that of the text
    changes: tuple[Change, ...] = ()  # of the weights, by step

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.members and self.symbols == sum(member.symbols for member in self.members), self
        longest = self.window + 2 * self.deviation
        if 0 < self.segment < longest:
            raise ValueError(f"segment={self.segment} is shorter than a window, of up to {longest} symbols: use more")
        if self.changes and not self.segment:
            raise ValueError(
                "mixture_from changes who takes the next segment, and with --segment=0 each corpus has streams of its "
                "own: leave out one of them"
            )
        least = self.segment or longest
        first = _streams(self.members, (), self.batch_size)  # before any change
        for member, streams, fewer in zip(self.members, self.streams, first, strict=True):
            if not streams and self.segment:
                raise ValueError(f"the weight of {member.name} is 0, and no --mixture_from gives it more: leave it out")
            if not streams:
                raise ValueError(
                    f"{member.name} has {member.weight} of {len(self.cycle)} parts of the mixture, less than one of "
                    f"batch_size={self.batch_size} streams, and with --segment=0 each corpus needs one: give it more "
                    "weight, or another --segment"
                )
            most = member.symbols // streams
            if most < least:
                remedy = f"--segment={most}" if most >= longest else "a smaller batch_size or window"
                remedy = f"give {remedy}, or more text"
                fits = member.symbols // least
                if self.changes and fits >= fewer:  # a run that goes on can change no more than these
                    remedy = f"let mixture_from give it at most {fits}/{self.batch_size}; in a new run, {remedy}"
                raise ValueError(
                    f"{member.name} has {member.symbols} training symbols, too few for {least} in each of the "
                    f"{streams} of batch_size={self.batch_size} streams that read it: needs at least "
                    f"{streams * least}; {remedy}"
                )

    @functools.cached_property
    def cycle(self) -> Cycle:
        """The order in which members take slots."""
        return Cycle([member.weight for member in self.members])

    @functools.cached_property
    def _cycles(self) -> list[Cycles]:
        found = [Cycles(0, self.cycle, [0] * len(self.members))]
        for change in self.changes:
            first, last = self.slots_before(change.step), found[-1]
            had = zip(last.before, last.cycle.counts(first - last.first), strict=True)
            found.append(Cycles(first, Cycle(change.weights), [a + b for a, b in had]))
        return found

    def slots_before(self, step: int) -> int:
        """Returns how many turns of all streams have begun before `step`; their slots are the first ones."""
        return step and self.batch_size + (step - 1) * self.batch_size // self.windows[0]

    def slot(self, number: int) -> tuple[int, int]:
        """Returns the member that has slot `number`, and how many slots it had before."""
        at = self._cycles[bisect.bisect_right(self._cycles, number, key=lambda cycles: cycles.first) - 1]
        member, before = at.cycle.slot(number - at.first)
        return member, at.before[member] + before

    @functools.cached_property
    def _circles(self) -> list[range]:
        """The part of the split that each member is."""
        stops = np.cumsum([member.symbols for member in self.members]).tolist()
        return [range(stop - member.symbols, stop) for stop, member in zip(stops, self.members, strict=True)]

    @functools.cached_property
    def _fixed(self) -> list[tuple[int, int]]:
        """With segment 0: the member of each stream, and how many of the streams before it have the same one."""
        return [self.cycle.slot(stream) for stream in range(self.batch_size)]

    @functools.cached_property
    def streams(self) -> list[int]:
        """Returns the most streams that read each member at a time, rounded up; with segment 0, at any time."""
        if self.segment:
            return _streams(self.members, self.changes, self.batch_size)
        return [sum(member == number for member, _ in self._fixed) for number in range(len(self.members))]

    @functools.cached_property
    def windows(self) -> list[int]:
        """W: windows in a turn, of each member; with segments, equal for all."""
        rooms = [self.segment or member.symbols // n for member, n in zip(self.members, self.streams, strict=True)]
        return [self._windows_in(room - 2 * self.deviation) for room in rooms]

    @property
    def period(self) -> int:
        return sys.maxsize  # the streams never begin anew together

    @functools.cached_property
    def _clock_phase(self) -> int:
        return self._phase(0)

    def clock(self, step: int) -> int:
        """g(s): symbols that each stream has read before `step`."""
        return self._border(step, self._clock_phase) + (self._deviation_before(step) if step else 0)

    def length(self, first: int, last: int) -> int:
        return self.clock(last) - self.clock(first)

    def turn(self, step: int, stream: int) -> Turn:
        """Returns the turn that `stream` has at `step`."""
        if not self.segment:
            number, place = self._fixed[stream]
            member, windows = self.members[number], self.windows[number]
            turn = step // windows
            position = self._pass_offset(number, turn) + place * member.symbols // self.streams[number]
            return Turn(turn * windows, (turn + 1) * windows, number, position % member.symbols)
        windows = self.windows[0]
        late = -(-(stream + 1) * windows // self.batch_size)
        turn = (step + windows - late) // windows
        number, ordinal = self.slot(turn * self.batch_size + stream)
        member = self.members[number]
        size = member.symbols // self.segment
        pass_number, segment = divmod(ordinal, size)
        if self.shuffle:
            segment = permuted(segment, size, f"{self.seed} {number} {pass_number}")
        position = (self._pass_offset(number, pass_number) + segment * self.segment) % member.symbols
        return Turn(max(0, (turn - 1) * windows + late), turn * windows + late, number, position)

    def _pass_offset(self, number: int, pass_number: int) -> int:
        """Returns where on member `number` pass `pass_number` begins; of a single member as `StreamPlan.offset`."""
        return self._offset(pass_number * len(self.members) + number, self.members[number].symbols)

    def positions(self, step: int, rows: range) -> list[int]:
        return [stretch.circle.start + stretch.position for stretch in self.stretches(step, rows)]

    def stretches(self, step: int, rows: range, windows: int = 1) -> Iterator[Stretch]:
        for row, stream in enumerate(rows):
            first = step
            while first < step + windows:
                turn = self.turn(first, stream)
                stop, circle = min(turn.stop, step + windows), self._circles[turn.member]
                position = (turn.position + self.length(turn.first, first)) % len(circle)
                column, length = self.length(step, first), self.length(first, stop)
                yield Stretch(row, column, length, circle, position, first == turn.first)
                first = stop

    def passes(self, step: int) -> list[float]:
        """Returns how often each member has been read after `step` updates, with every corpus at its exact share."""
        weights = tuple(member.weight for member in self.members) if self.segment else tuple(self.streams)
        pieces, read = [Change(0, weights), *self.changes], [0.0] * len(self.members)
        for (first, parts), stop in zip(pieces, [*(change.step for change in self.changes), step], strict=True):
            symbols = self.batch_size * max(0, self.clock(min(step, stop)) - self.clock(first))
            read = [had + symbols * part / sum(parts) for had, part in zip(read, parts, strict=True)]
        return [had / member.symbols for had, member in zip(read, self.members, strict=True)]
