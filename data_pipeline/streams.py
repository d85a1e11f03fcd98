"""Which symbols each stream reads at each step: a formula of (seed, step, stream) and nothing else.

The split is read as a circle of N symbols.  B reading heads, the streams, stand evenly spaced on it and move on by one
window of T symbols a step; after W = N // (B * T) steps, one epoch, they jump to new places.  So a batch is a pure
function of the step number: resuming takes one integer and the same time at any step of a corpus of any size, and what
stream b reads does not depend on how many processes or devices share the B streams.
"""

import dataclasses
import hashlib
from typing import Protocol

import numpy as np

from data_pipeline.batch import Batch


class Symbols(Protocol):
    """What a plan reads from: a split of a corpus."""

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """The places of B streams in a split of N symbols, at every step.

    With e, w = divmod(step, W), stream b reads inputs [p, p + T) and targets [p + 1, p + T + 1), all modulo N, from
    p = offset(e) + b * N // B + w * T.  As N // B is at least W * T, no input is read twice in an epoch; exactly
    N - B * W * T inputs, fewer than B * T, are left out, and with `rotate` they are others in another epoch.

    Raises:
      ValueError: the split is shorter than one window of every stream.
    """

    symbols: int  # N
    batch_size: int  # B, of all processes together
    window: int  # T
    seed: int = 0
    rotate: bool = True  # every epoch begins at another seeded offset
    reset_probability: float = 0.0  # of zeroing a stream's state before a window

    def __post_init__(self) -> None:
        assert self.batch_size > 0 and self.window > 0, self
        if self.symbols < self.batch_size * self.window:
            raise ValueError(
                f"training split of {self.symbols} symbols is too short for batch_size={self.batch_size} windows of "
                f"window={self.window}: needs at least {self.batch_size * self.window}; lower batch_size or window, or "
                "give more text"
            )

    @property
    def steps_per_epoch(self) -> int:
        """W: windows of a stream in an epoch."""
        return self.symbols // (self.batch_size * self.window)

    def offset(self, epoch: int) -> int:
        """Where stream 0 begins in `epoch`: uniform in [0, N), or 0 without `rotate`.

        Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by a digest: seeds and epochs
        that are neighbours have nothing in common.  Its raw words, unlike numpy's distributions, never change.
        """
        if not self.rotate:
            return 0
        high, low = self._random_words(b"stream offset", epoch, 2).tolist()
        return ((high << 64 | low) * self.symbols) >> 128

    def resets(self, step: int, rows: range) -> np.ndarray:
        """Whether the state of each stream of `rows` is zeroed before the window of `step` for no other reason, bool.

        Melis et al. 2018 (arXiv:1707.05589) do so with probability .01.
        """
        if not self.reset_probability:
            return np.zeros(len(rows), bool)
        words = self._random_words(b"stream reset", step, self.batch_size)[rows.start : rows.stop]
        return words / 2.0**64 < self.reset_probability

    def _random_words(self, purpose: bytes, number: int, count: int) -> np.ndarray:
        """uint64 [count], a pure function of the seed, the purpose and the number."""
        key = hashlib.blake2b(f"{self.seed} {number}".encode(), digest_size=16, person=purpose).digest()
        return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)

    def positions(self, step: int, rows: range) -> list[int]:
        """Where in the split, in [0, N), the window of each stream of `rows` begins at `step`."""
        epoch, window = divmod(step, self.steps_per_epoch)
        first = self.offset(epoch) + window * self.window
        return [(first + b * self.symbols // self.batch_size) % self.symbols for b in rows]

    def read(self, split: Symbols, step: int, rows: range, *, windows: int = 1, separator: int | None = None) -> Batch:
        """The batch of `step`, or `windows` batches from `step` on laid end to end.

        Args:
          split: the N symbols.
          step: training step, from 0 on.
          rows: the streams wanted, R of them.
          windows: K windows of each stream in one reading, all of the same epoch.
          separator: id of the symbol that ends a document, or None.  The separator itself is read with zero state and
            predicts the first symbol of the next document; the document before it has predicted the separator.

        Returns:
          Arrays [R, K * T]; ids in the split's dtype.  `reset` is True at the first symbol of an epoch, at the first
          symbol of the split (what lies before it on the circle is unrelated text), at each separator, and before a
          window that `resets` draws.
        """
        assert len(split) == self.symbols, (len(split), self)
        assert step >= 0 and 0 < windows <= self.steps_per_epoch - step % self.steps_per_epoch, (step, windows)
        length = windows * self.window
        ids = np.empty((len(rows), length + 1), split.dtype)
        reset = np.zeros((len(rows), length), bool)
        for row, start in enumerate(self.positions(step, rows)):
            _read_circle(split, start, ids[row])
            seam = (self.symbols - start) % self.symbols  # how far ahead the circle closes
            reset[row, seam : seam + 1] = True  # an empty slice where that lies beyond this reading
        inputs, targets = ids[:, :-1], ids[:, 1:]
        if step % self.steps_per_epoch == 0:
            reset[:, 0] = True
        for window in range(windows):
            reset[:, window * self.window] |= self.resets(step + window, rows)
        if separator is not None:
            reset |= inputs == separator
        return Batch(inputs, targets, reset)


def _read_circle(split: Symbols, start: int, out: np.ndarray) -> None:
    """Fills `out` with the symbols from `start` on; the first symbol follows the last."""
    filled = 0
    while filled < len(out):
        begin = (start + filled) % len(split)
        piece = split.read(begin, min(len(split), begin + len(out) - filled))
        out[filled : filled + len(piece)] = piece
        filled += len(piece)
