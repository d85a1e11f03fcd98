"""A character language model in its smallest form: one plain recurrent layer, one stream of text, NumPy alone.

    python -m charlstm.reference.min_char_rnn --corpus=FILE --num_steps=10000        (without --corpus it reads itself)

    h_t = tanh(w_x[x_t] + h_{t-1} w_h + b_h)          row x_t of w_x is the product of w_x with a one-hot x_t
    p_t = softmax(h_t w_out + b_out)
    loss = - sum_t log p_t[y_t]                       y_t is the symbol after x_t

The gradients come from back-propagation through time (Werbos 1990).  dz_t is the gradient with respect to the input of
the softmax, da_t that with respect to the input of the tanh:

    dz_t = p_t - onehot(y_t)
    da_t = (dz_t w_out^T + da_{t+1} w_h^T) * (1 - h_t^2)

The gradient of each weight is the sum over t of (its input)^T (the gradient of its output).  Windows of T symbols
follow one another; h is carried from one to the next, gradients are not.  The update is Adagrad (Duchi et al. 2011).
It is the algorithm of Karpathy's min-char-rnn (2015).

Letters: T symbols in a window, V symbols in the vocabulary, H hidden width.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

Params = dict[str, np.ndarray]


def initialize(rng: np.random.Generator, V: int, H: int) -> Params:
    """Small random weights, zero biases."""
    shapes = {"w_x": (V, H), "w_h": (H, H), "b_h": (H,), "w_out": (H, V), "b_out": (V,)}
    return {name: 0.01 * rng.normal(size=s) if name[0] == "w" else np.zeros(s) for name, s in shapes.items()}


def forward(params: Params, x_T: np.ndarray, h_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All hidden states, [T + 1, H] with the one before the window first, and the predictions, [T, V]."""
    states = [h_H]
    for x in x_T:
        states.append(np.tanh(params["w_x"][x] + states[-1] @ params["w_h"] + params["b_h"]))
    h_TH = np.array(states)
    z_TV = h_TH[1:] @ params["w_out"] + params["b_out"]
    e_TV = np.exp(z_TV - z_TV.max(axis=1, keepdims=True))  # the largest exponent is 0: no overflow
    return h_TH, e_TV / e_TV.sum(axis=1, keepdims=True)


def loss_and_gradients(
    params: Params, x_T: np.ndarray, y_T: np.ndarray, h_H: np.ndarray
) -> tuple[float, Params, np.ndarray]:
    """The window's loss in nats, its gradients, and the hidden state to carry on with."""
    T = len(x_T)
    h_TH, p_TV = forward(params, x_T, h_H)
    loss = -np.log(p_TV[np.arange(T), y_T]).sum()

    dz_TV = p_TV.copy()
    dz_TV[np.arange(T), y_T] -= 1
    dh_TH = dz_TV @ params["w_out"].T
    da_TH = np.zeros_like(dh_TH)
    back_H = np.zeros_like(h_H)  # what comes back from the next step
    for t in reversed(range(T)):
        da_TH[t] = (dh_TH[t] + back_H) * (1 - h_TH[t + 1] ** 2)
        back_H = da_TH[t] @ params["w_h"].T

    dw_x = np.zeros_like(params["w_x"])
    np.add.at(dw_x, x_T, da_TH)  # a symbol that occurs twice adds up
    gradients = {
        "w_x": dw_x,
        "w_h": h_TH[:-1].T @ da_TH,
        "b_h": da_TH.sum(axis=0),
        "w_out": h_TH[1:].T @ dz_TV,
        "b_out": dz_TV.sum(axis=0),
    }
    return float(loss), gradients, h_TH[-1]


def adagrad(params: Params, gradients: Params, squares: Params, learning_rate: float) -> None:
    """One update in place, each element of the gradient clipped to +-5."""
    for name, gradient in gradients.items():
        gradient = np.clip(gradient, -5, 5)
        squares[name] += gradient**2
        params[name] -= learning_rate * gradient / (np.sqrt(squares[name]) + 1e-8)


def sample(params: Params, rng: np.random.Generator, x: int, length: int) -> list[int]:
    """`length` symbols, each drawn from the prediction after the ones before it; `x` is read first.

    Gumbel-max trick: argmax(log p + standard Gumbel noise) is a draw from p.
    """
    ids, h_H = [x], np.zeros(len(params["b_h"]))
    for _ in range(length):
        h_TH, p_TV = forward(params, np.array(ids[-1:]), h_H)
        ids.append(int(np.argmax(np.log(p_TV[0]) + rng.gumbel(size=p_TV.shape[1]))))
        h_H = h_TH[-1]
    return ids[1:]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Trains a plain recurrent network on the characters of a text.")
    parser.add_argument("--corpus", default=__file__, help="a UTF-8 text; default: this program")
    parser.add_argument("--num_steps", type=int, default=10000, help="updates (%(default)s)")
    parser.add_argument("--hidden_size", type=int, default=100, help="H (%(default)s)")
    parser.add_argument("--window", type=int, default=25, help="T (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=0.05, help="of Adagrad (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run (%(default)s)")
    options = parser.parse_args(argv)
    if min(options.num_steps, options.hidden_size, options.window) < 1 or options.seed < 0:
        parser.error("--num_steps, --hidden_size and --window must be 1 or more, --seed 0 or more")
    try:
        text, T = Path(options.corpus).read_text(encoding="utf-8"), options.window
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.corpus}: {error}")
    if len(text) <= T:
        parser.error(f"{options.corpus} has {len(text)} characters, too few for --window={T}: give a longer text")

    symbols = sorted(set(text))
    id_of = {symbol: x for x, symbol in enumerate(symbols)}
    ids = np.array([id_of[symbol] for symbol in text])
    rng = np.random.default_rng(options.seed)
    params = initialize(rng, V=len(symbols), H=options.hidden_size)
    squares = {name: np.zeros_like(p) for name, p in params.items()}
    start, seen = len(ids), []  # as if at the end of the text: the first window begins it
    for step in range(options.num_steps):
        if start + T >= len(ids):
            start, h_H = 0, np.zeros(options.hidden_size)
        loss, gradients, h_H = loss_and_gradients(params, ids[start : start + T], ids[start + 1 : start + T + 1], h_H)
        adagrad(params, gradients, squares, options.learning_rate)
        start += T
        seen.append(loss / T / np.log(2))
        if (step + 1) % max(1, options.num_steps // 10) == 0:
            print(f"step {step + 1}  {np.mean(seen):.3f} bits per character", flush=True)
            print("".join(symbols[x] for x in sample(params, rng, ids[0], length=200)), flush=True)
            seen = []


if __name__ == "__main__":
    main(sys.argv[1:])
