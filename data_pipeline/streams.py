"""The symbols that each stream reads at each step: a pure function of (seed, step, stream).

The split is read as a circle of N symbols.  B reading heads, the streams, are evenly spaced on it and advance by one
window of about T symbols a step; after W steps, one epoch, they jump to new positions.  So a batch is a pure function
of the step number: resuming takes one integer, and constant time at any step of a corpus of any size, and the text of
stream b does not depend on the number of processes or devices that share the B streams.
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.batch import Batch, Separator, ends_separator, looks_back
from data_pipeline.symbols import Symbols, read_places


class Stretch(NamedTuple):
    """Contiguous text in a row of a batch."""

    row: int
    column: int  # of its first input in the row
    length: int  # inputs
    circle: range  # of the split: the symbols among which it is read; after the last comes the first
    position: int  # of its first input on the circle
    begins: bool  # the stream begins anew here


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """The positions of B streams in a split of N symbols, at every step.

    With e, w = divmod(step, W) and p = offset(e) + b * N // B, stream b reads inputs [p + s(w), p + s(w + 1)) and the
    targets that follow them one by one, all modulo N, where

        s(w) = w T - (T - T // 2) floor(w q + u) + k D,        q = short_probability, D = deviation

    u is drawn from [0, 1) once per epoch, so half-length windows come at equal distances, with frequency q.  k is drawn
    at each border between windows: -1, 0 or 1 with probabilities 1/4, 1/2, 1/4 (0 at the ends of an epoch).  A window's
    length is thus T or T // 2, plus D times the difference of the k at its two borders, a centered binomial of variance
    1.  This approximates the normal lengths of Merity et al. 2018 (arXiv:1708.02182, section 4.1).  The lengths are few
    enough to compile a program for each, and no border requires a sum over the windows before it.

    W is the largest number of windows that fits whatever u is: s(W) <= N // B, so no input is read twice in an epoch.
    Some inputs are left out (fewer than B T if all windows are equal); with `rotate`, other ones in each epoch.

    Raises:
      ValueError: the split is shorter than one window of every stream.
    """

    symbols: int  # N
    batch_size: int  # B, of all processes together
    window: int  # T
    seed: int = 0
    rotate: bool = True  # every epoch begins at another seeded offset
    reset_probability: float = 0.0  # of resetting a stream's state before a window
    deviation: int = 0  # D: standard deviation of a window's length, symbols
    short_probability: float = 0.0  # q: fraction of windows with half the length

    def __post_init__(self) -> None:
        assert self.batch_size > 0 and self.window > 0, self
        assert 2 * self.deviation < (self.window // 2 if self.short_probability else self.window), self
        if self.symbols < self.batch_size * self.window:
            raise ValueError(
                f"training split of {self.symbols} symbols is too short for batch_size={self.batch_size} windows of "
                f"window={self.window}: needs at least {self.batch_size * self.window}; lower batch_size or window, or "
                "give more text"
            )

    @property
    def steps_per_epoch(self) -> int:
        """W: number of windows of a stream in an epoch."""
        return self._windows_in(self.symbols // self.batch_size)

    def _windows_in(self, symbols: int) -> int:
        """Returns the number of windows that fit in `symbols` for every u, the deviation not counted."""
        most = symbols // (self.window // 2 if self.short_probability else self.window)
        return bisect.bisect_right(range(most + 1), symbols, key=lambda window: self._border(window, 0)) - 1

    def _border(self, window: int, phase: int) -> int:
        """w T - (T - T // 2) floor(w q + u), with q and u = `phase` in units of 2^-32: exact at any step."""
        short = window * round(self.short_probability * 2**32) + phase >> 32
        return window * self.window - (self.window - self.window // 2) * short

    def start(self, epoch: int, window: int) -> int:
        """s(w): symbols that each stream has read in `epoch` before window w, of 0 to W."""
        border = self._border(window, self._phase(epoch))
        if 0 < window < self.steps_per_epoch:
            border += self._deviation_before(epoch * self.steps_per_epoch + window)
        return border

    def _phase(self, epoch: int) -> int:
        """u of `epoch`, in units of 2^-32."""
        return int(self._random_words(b"short windows", epoch, 1)[0]) >> 32 if self.short_probability else 0

    def _deviation_before(self, step: int) -> int:
        """k D: symbols by which the border before `step` is shifted."""
        if not self.deviation:
            return 0
        coins = int(self._random_words(b"window length", step, 1)[0]) & 3
        return self.deviation * (coins.bit_count() - 1)

    def offset(self, epoch: int) -> int:
        """Returns the position of stream 0 at the start of `epoch`: uniform in [0, N), or 0 without `rotate`."""
        return self._offset(epoch, self.symbols)

    def _offset(self, number: int, symbols: int) -> int:
        """Returns offset `number` on a circle of `symbols`.

        Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by a digest: seeds and epochs
        that are neighbors are uncorrelated.  Its raw words, unlike NumPy's distributions, never change.
        """
        if not self.rotate:
            return 0
        high, low = self._random_words(b"stream offset", number, 2).tolist()
        return ((high << 64 | low) * symbols) >> 128

    def resets(self, step: int, rows: range) -> np.ndarray:
        """Draws random state resets, bool [rows]: true with `reset_probability`, before the window of `step`.

        Melis et al. 2018 (arXiv:1707.05589) use a probability of .01.
        """
        if not self.reset_probability:
            return np.zeros(len(rows), bool)
        words = self._random_words(b"stream reset", step, self.batch_size)[rows.start : rows.stop]
        return words / 2.0**64 < self.reset_probability

    def _random_words(self, purpose: bytes, number: int, count: int) -> np.ndarray:
        """Returns uint64 [count], a pure function of the seed, the purpose and the number."""
        key = hashlib.blake2b(f"{self.seed} {number}".encode(), digest_size=16, person=purpose).digest()
        return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)

    @property
    def period(self) -> int:
        """Steps between two steps at which all streams begin anew; a joined read must not cross such a step."""
        return self.steps_per_epoch

    def length(self, first: int, last: int) -> int:
        """Returns the symbols that each stream reads from step `first` up to step `last` of the same period."""
        epoch, window = divmod(first, self.steps_per_epoch)
        return self.start(epoch, window + last - first) - self.start(epoch, window)

    def positions(self, step: int, rows: range) -> list[int]:
        """Returns the position in the split, in [0, N), of the first input of each stream of `rows` at `step`."""
        epoch, window = divmod(step, self.steps_per_epoch)
        first = self.offset(epoch) + self.start(epoch, window)
        return [(first + b * self.symbols // self.batch_size) % self.symbols for b in rows]

    def stretches(self, step: int, rows: range, windows: int = 1) -> Iterator[Stretch]:
        """Yields the stretches of contiguous text that make up `windows` joined windows of each stream of `rows`."""
        length, begins = self.length(step, step + windows), step % self.steps_per_epoch == 0
        for row, position in enumerate(self.positions(step, rows)):
            yield Stretch(row, 0, length, range(self.symbols), position, begins)

    def read(self, split: Symbols, step: int, rows: range, *, windows: int = 1, separator: Separator = ()) -> Batch:
        """Reads the batch of `step`, or `windows` consecutive batches from `step` on, joined.

        Args:
          split: the N symbols.
          step: training step, from 0 on.
          rows: R streams.
          windows: number of windows of each stream, all of the same period.
          separator: ids of the symbols that end a document.  The last of them is read with zero state and predicts the
            first symbol of the next document; the document before has predicted all of the separator.

        Returns:
          Arrays [R, symbols of the windows]; ids in the split's dtype.  `reset` is True where a stream begins anew, at
          the first symbol of the split (what lies before it on the circle is unrelated text), at the last symbol of
          each separator that lies within the split (also one that began before this batch), and at the first symbol of
          a window for which `resets` is true.
        """
        assert len(split) == self.symbols, (len(split), self)
        assert step >= 0 and 0 < windows <= self.period - step % self.period, (step, windows)
        starts = [self.length(step, step + window) for window in range(windows + 1)]
        shape = len(rows), starts[-1]
        batch = Batch(np.empty(shape, split.dtype), np.empty(shape, split.dtype), np.empty(shape, bool))
        back = looks_back(separator)
        texts = [
            (stretch, np.empty(back + stretch.length + 1, split.dtype))
            for stretch in self.stretches(step, rows, windows)
        ]
        read_places(split, [place for stretch, ids in texts for place in _places(stretch, back, ids)])
        for stretch, ids in texts:
            _fill(batch, stretch, ids, separator)
        for window in range(windows):
            batch.reset[:, starts[window]] |= self.resets(step + window, rows)
        return batch


def _places(stretch: Stretch, back: int, out: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the places that fill `out`, from `back` symbols before the stretch on: after the last comes the first."""
    symbols, filled = len(stretch.circle), 0
    while filled < len(out):
        begin = (stretch.position - back + filled) % symbols
        part = out[filled : filled + symbols - begin]
        yield stretch.circle.start + begin, part
        filled += len(part)


def _fill(batch: Batch, stretch: Stretch, ids: np.ndarray, separator: Separator) -> None:
    """Fills the part of `batch` that is `stretch`, from `ids` that begin `looks_back(separator)` symbols before it."""
    back = looks_back(separator)
    reset = ends_separator(ids[:-1], separator)
    seam = -stretch.position % len(stretch.circle)  # distance to the end of the circle
    # Slices beyond this stretch are empty.  A separator does not extend over the seam.
    reset[: max(0, back - stretch.position)] = reset[seam : seam + back] = False
    reset[seam : seam + 1] = True
    if stretch.begins:
        reset[0] = True
    part = stretch.row, slice(stretch.column, stretch.column + stretch.length)
    batch.inputs[part], batch.targets[part], batch.reset[part] = ids[back:-1], ids[back + 1 :], reset
