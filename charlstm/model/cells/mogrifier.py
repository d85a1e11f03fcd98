"""The mogrifier: before a cell reads a symbol, its input and its state scale each other a few times.

Source: Melis, Kočiský and Blunsom, Mogrifier LSTM, ICLR 2020 (arXiv:1909.01792), equations 1 and 2.  In round 1, 3, ...
and in round 2, 4, ..., σ the logistic function, products of vectors elementwise,

    x <- 2 σ(h A + b) x              A of its own in each round, H to D, and b [D]
    h <- 2 σ(x A + b) h              H and D change places, b [H]

A is a full matrix, or with a rank the product A = L R of two that meet in as many dimensions.
"""

from functools import partial

import jax

from charlstm import rng
from charlstm.model import initializers
from charlstm.types import MogrifierRound


def init(
    key: jax.Array, input_width: int, hidden_size: int, rounds: int, rank: int, initializer: str, scale: float
) -> tuple[MogrifierRound, ...]:
    """Parameters of all rounds, float32; `rank` 0 for full matrices, `initializer` and `scale` as in `initializers`."""
    weights = partial(initializers.weights, initializer, scale=scale, hidden_size=hidden_size)
    made = []
    for number in range(rounds):
        fan_in, fan_out = (input_width, hidden_size) if number % 2 else (hidden_size, input_width)
        left, right, bias = (rng.named(key, f"mogrifier {number} {part}") for part in ("left", "right", "bias"))
        made.append(
            MogrifierRound(
                left=weights(left, (fan_in, rank or fan_out)),
                right=weights(right, (rank, fan_out)) if rank else None,
                bias=initializers.biases(initializer, bias, fan_out, scale=scale, hidden_size=hidden_size),
            )
        )
    return tuple(made)


def gate(rounds: tuple[MogrifierRound, ...], x_BD: jax.Array, h_BH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x and h after all rounds."""
    for number, r in enumerate(rounds):
        a = (x_BD if number % 2 else h_BH) @ r.left
        factor = 2 * jax.nn.sigmoid((a if r.right is None else a @ r.right) + r.bias[None])
        x_BD, h_BH = (x_BD, factor * h_BH) if number % 2 else (factor * x_BD, h_BH)
    return x_BD, h_BH
