"""The models that are timed, and the text they are given."""

import dataclasses
from collections.abc import Iterator
from itertools import cycle

import numpy as np

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A language model and its batch; the letters are those of charlstm.types."""

    V: int
    E: int
    H: int
    L: int
    B: int
    T: int
    cell: str = "lstm"
    dtype: str = "float32"  # of the operands of products

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{getattr(self, letter)}" for letter in "VEHLBT")
        return " ".join([sizes, *(w for w in (self.cell, self.dtype) if w not in ("lstm", "float32"))])

    @property
    def symbols(self) -> int:
        """Of a step."""
        return self.B * self.T

    @property
    def flops(self) -> int:
        """Of the matrix products of a training step: forward, and twice as many in reverse.  The look-up is none."""
        layers = sum(GATES[self.cell] * self.H * (width + self.H) for width in [self.E] + [self.H] * (self.L - 1))
        return 3 * 2 * self.symbols * (layers + self.H * self.V)

    @property
    def parameters(self) -> int:
        gates, widths = GATES[self.cell] * self.H, [self.E] + [self.H] * (self.L - 1)
        return self.V * self.E + sum(gates * (w + self.H + 2) for w in widths) + (self.H + 1) * self.V


SHAPES = (
    Shape(96, 64, 128, 2, 32, 64),
    Shape(256, 128, 512, 2, 64, 128),
    Shape(256, 128, 1024, 3, 64, 100),
    Shape(256, 64, 512, 3, 128, 100),
)
LARGE = Shape(256, 512, 2048, 4, 256, 256)  # for a GPU
QUICK = Shape(32, 16, 32, 2, 8, 16)


def windows(shape: Shape) -> Iterator[np.ndarray]:
    """Random text without end, uint8 [B, T + 1]: inputs, and one symbol on the targets."""
    random = np.random.default_rng(0)
    return cycle([random.integers(0, shape.V, (shape.B, shape.T + 1), dtype=np.uint8) for _ in range(8)])
