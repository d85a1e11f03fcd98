"""A character language model of one LSTM layer, trained by hand-derived back-propagation, in NumPy alone.

    python -m charlstm.reference.numpy_lstm --corpus=FILE --num_steps=1000        (without --corpus it reads itself)
    python -m charlstm.reference.numpy_lstm --check                  gradients against finite differences

What `charlstm` does with many layers on many devices, this does with one on one core.  (Matrices this small want one
thread: on a busy machine, set OPENBLAS_NUM_THREADS=1.)  The equations of the layer (Hochreiter & Schmidhuber 1997, with
the forget gate of Gers et al. 2000; gates side by side along G = 4H in the order i f g o):

    a_t = w_x[x_t] + h_{t-1} w_h + b                  row x_t of w_x is the product of w_x with a one-hot x_t
    i, f, o = sigmoid(a^i, a^f, a^o)      g = tanh(a^g)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)
    p_t = softmax(h_t w_out + b_out)
    loss = - mean_t log p_t[y_t]                      y_t is the symbol after x_t

Backwards, with dz_t, dh_t and dc_t for the gradients that reach the softmax, h_t and c_t:

    dz_t  = (p_t - onehot(y_t)) / (number of symbols)
    dh_t  = dz_t w_out^T + da_{t+1} w_h^T
    dc_t  = dh_t * o * (1 - tanh(c_t)^2) + dc_{t+1} * f_{t+1}
    da_t  = [dc g i(1-i),  dc c_{t-1} f(1-f),  dc i (1-g^2),  dh tanh(c_t) o(1-o)]
    dw_x[x_t] += da_t      dw_h = sum_t h_{t-1}^T da_t      db = sum_t da_t

The sum for w_h is one matrix product after the loop.  The text is cut into B streams that are read side by side, T
symbols at a time; each stream's h and c are carried from window to window, gradients are not.

Letters: B streams, T symbols in a window, W windows of a stream, V symbols in the vocabulary, H hidden width, G = 4H.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

State = tuple[np.ndarray, np.ndarray]  # h and c, [B, H] each


class Lstm:
    """The model: its weights, and what is done with them.

    Attributes:
      weights: w_x [V, G], w_h [H, G], b [G], w_out [H, V], b_out [V].
    """

    def __init__(self, rng: np.random.Generator, V: int, H: int) -> None:
        """Uniform weights within +-1/sqrt(H); zero biases, but 1 for the forget gate."""
        shapes = {"w_x": (V, 4 * H), "w_h": (H, 4 * H), "w_out": (H, V)}
        self.weights = {name: rng.uniform(-(H**-0.5), H**-0.5, shape) for name, shape in shapes.items()}
        self.weights |= {"b": np.repeat([0.0, 1.0, 0.0, 0.0], H), "b_out": np.zeros(V)}
        self._means, self._squares = ({k: np.zeros_like(w) for k, w in self.weights.items()} for _ in range(2))
        self._updates = 0

    def zero_state(self, B: int) -> State:
        H = len(self.weights["w_h"])
        return np.zeros((B, H)), np.zeros((B, H))

    def forward(self, x_TB: np.ndarray, state: State) -> tuple[np.ndarray, State, Any]:
        """The predictions [T, B, V], the state to carry on with, and what `backward` needs."""
        w, H = self.weights, state[0].shape[1]
        hs, cs, gates = [state[0]], [state[1]], []
        for x_B in x_TB:
            a = w["w_x"][x_B] + hs[-1] @ w["w_h"] + w["b"]
            i, f, o = sigmoid(a[:, :H]), sigmoid(a[:, H : 2 * H]), sigmoid(a[:, 3 * H :])
            g = np.tanh(a[:, 2 * H : 3 * H])
            cs.append(f * cs[-1] + i * g)
            hs.append(o * np.tanh(cs[-1]))
            gates.append((i, f, g, o))
        h_TBH = np.array(hs)
        z_TBV = h_TBH[1:] @ w["w_out"] + w["b_out"]
        e_TBV = np.exp(z_TBV - z_TBV.max(axis=-1, keepdims=True))  # the largest exponent is 0: no overflow
        p_TBV = e_TBV / e_TBV.sum(axis=-1, keepdims=True)
        return p_TBV, (hs[-1], cs[-1]), (x_TB, h_TBH, cs, gates, p_TBV)

    def backward(self, y_TB: np.ndarray, tape: Any) -> dict[str, np.ndarray]:
        """The gradient of the mean loss with respect to each weight; `tape` is what `forward` returned last."""
        w, (x_TB, h_TBH, cs, gates, p_TBV) = self.weights, tape
        dz_TBV = p_TBV.copy()
        dz_TBV[(*np.indices(y_TB.shape), y_TB)] -= 1
        dz_TBV /= y_TB.size
        dh_TBH = dz_TBV @ w["w_out"].T
        T, B, H = dh_TBH.shape
        da_TBG = np.zeros((T, B, 4 * H))
        dh_back = dc_back = np.zeros((B, H))  # what comes back from the next step
        for t in reversed(range(T)):
            i, f, g, o = gates[t]
            tanh_c = np.tanh(cs[t + 1])
            dh = dh_TBH[t] + dh_back
            dc = dh * o * (1 - tanh_c**2) + dc_back
            da_i, da_f = dc * g * i * (1 - i), dc * cs[t] * f * (1 - f)
            da_g, da_o = dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)
            da_TBG[t] = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
            dh_back, dc_back = da_TBG[t] @ w["w_h"].T, dc * f
        dw_x = np.zeros_like(w["w_x"])
        np.add.at(dw_x, x_TB, da_TBG)  # a symbol that occurs twice adds up
        return {
            "w_x": dw_x,
            "w_h": np.tensordot(h_TBH[:-1], da_TBG, axes=([0, 1], [0, 1])),
            "b": da_TBG.sum(axis=(0, 1)),
            "w_out": np.tensordot(h_TBH[1:], dz_TBV, axes=([0, 1], [0, 1])),
            "b_out": dz_TBV.sum(axis=(0, 1)),
        }

    def update(self, gradients: dict[str, np.ndarray], learning_rate: float) -> None:
        """One step of Adam (Kingma & Ba 2015, algorithm 1), in place."""
        self._updates += 1
        for name, g in gradients.items():
            self._means[name] = 0.9 * self._means[name] + 0.1 * g
            self._squares[name] = 0.999 * self._squares[name] + 0.001 * g**2
            mean = self._means[name] / (1 - 0.9**self._updates)
            square = self._squares[name] / (1 - 0.999**self._updates)
            self.weights[name] -= learning_rate * mean / (np.sqrt(square) + 1e-8)

    def sample(self, rng: np.random.Generator, x: int, length: int) -> list[int]:
        """`length` symbols, each drawn from the prediction after the ones before it; `x` is read first.

        With standard Gumbel noise added to its logarithms, the largest of the probabilities is a draw from them.
        """
        ids, state = [x], self.zero_state(1)
        for _ in range(length):
            p_TBV, state, _ = self.forward(np.array([ids[-1:]]), state)
            ids.append(int(np.argmax(np.log(p_TBV[0, 0]) + rng.gumbel(size=p_TBV.shape[2]))))
        return ids[1:]


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * a)  # never overflows


def mean_loss(p_TBV: np.ndarray, y_TB: np.ndarray) -> float:
    """Nats per symbol."""
    return float(-np.log(p_TBV[(*np.indices(y_TB.shape), y_TB)]).mean())


def worst_gradient_error(seed: int) -> float:
    """The largest |hand-derived - central difference| over all weights of a small model, over the largest gradient."""
    rng = np.random.default_rng(seed)
    V, H, B, T, step = 5, 4, 3, 6, 1e-5
    model = Lstm(rng, V, H)
    x_TB, y_TB = rng.integers(V, size=(2, T, B))
    state = rng.normal(size=(B, H)), rng.normal(size=(B, H))
    gradients = model.backward(y_TB, model.forward(x_TB, state)[2])
    worst = 0.0
    for name, weight in model.weights.items():
        for index in np.ndindex(weight.shape):
            kept = weight[index]
            weight[index] = kept + step
            above = mean_loss(model.forward(x_TB, state)[0], y_TB)
            weight[index] = kept - step
            below = mean_loss(model.forward(x_TB, state)[0], y_TB)
            weight[index] = kept
            worst = max(worst, abs((above - below) / (2 * step) - float(gradients[name][index])))
    return worst / max(float(np.abs(g).max()) for g in gradients.values())


def windows(ids: np.ndarray, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [W, T, B]: stream b reads the b-th of B equal parts of the text, T symbols a window."""
    W = (len(ids) - 1) // (B * T)
    x, y = ids[: B * W * T], ids[1 : B * W * T + 1]
    return x.reshape(B, W, T).transpose(1, 2, 0), y.reshape(B, W, T).transpose(1, 2, 0)


def train(ids: np.ndarray, V: int, options: argparse.Namespace) -> Lstm:
    """Reads the text as B streams side by side, again and again, and prints the loss ten times."""
    x_WTB, y_WTB = windows(ids, options.batch_size, options.window)
    model = Lstm(np.random.default_rng(options.seed), V, options.hidden_size)
    seen = []
    for step in range(options.num_steps):
        window = step % len(x_WTB)
        if window == 0:
            state = model.zero_state(options.batch_size)
        p_TBV, state, tape = model.forward(x_WTB[window], state)
        model.update(model.backward(y_WTB[window], tape), options.learning_rate)
        seen.append(mean_loss(p_TBV, y_WTB[window]) / np.log(2))
        if (step + 1) % max(1, options.num_steps // 10) == 0:
            print(f"step {step + 1}  {np.mean(seen):.3f} bits per character", flush=True)
            seen = []
    return model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Trains an LSTM on the characters of a text.")
    parser.add_argument("--corpus", default=__file__, help="a UTF-8 text; default: this program")
    parser.add_argument("--num_steps", type=int, default=1000, help="updates (%(default)s)")
    parser.add_argument("--hidden_size", type=int, default=100, help="H (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="B (%(default)s)")
    parser.add_argument("--window", type=int, default=25, help="T (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=0.01, help="of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run (%(default)s)")
    parser.add_argument("--check", action="store_true", help="compare gradients with finite differences, and exit")
    options = parser.parse_args(argv)
    if min(options.num_steps, options.hidden_size, options.batch_size, options.window) < 1 or options.seed < 0:
        parser.error("--num_steps, --hidden_size, --batch_size and --window must be 1 or more, --seed 0 or more")
    if options.check:
        error = worst_gradient_error(options.seed)
        print(f"worst error of a gradient: {error:.1e} of the largest gradient (allowed: 1e-7)")
        return 0 if error < 1e-7 else 1
    try:
        text = Path(options.corpus).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.corpus}: {error}")
    needed = options.batch_size * options.window + 1
    if len(text) < needed:
        parser.error(f"{options.corpus} has {len(text)} characters, fewer than the {needed} of one window a stream")

    symbols = sorted(set(text))
    id_of = {symbol: x for x, symbol in enumerate(symbols)}
    ids = np.array([id_of[symbol] for symbol in text])
    model = train(ids, len(symbols), options)
    print("".join(symbols[x] for x in model.sample(np.random.default_rng(options.seed), ids[0], length=300)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
