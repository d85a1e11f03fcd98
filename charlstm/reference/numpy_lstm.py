"""A deep LSTM character language model, trained by hand-derived back-propagation, in NumPy alone.

    python charlstm/reference/numpy_lstm.py [FILE]        (without FILE it reads itself)
    python charlstm/reference/numpy_lstm.py --check       gradients against finite differences

What `charlstm` does on many devices, this does on one core.  (Matrices this small want one thread: on a busy machine,
set OPENBLAS_NUM_THREADS=1.)  The equations of a layer (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et
al. 2000; gates side by side along G = 4H in the order i f g o):

    a_t = x_t w_x + h_{t-1} w_h + b
    i, f, o = sigmoid(a^i, a^f, a^o)      g = tanh(a^g)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)

Layer l + 1 reads the h_t of layer l, layer 0 a one-hot symbol, the soft-max that of the last layer.  Backwards, with
dh_t and dc_t for the gradients that reach h_t and c_t:

    dh_t  = (gradient from above) + da_{t+1} w_h^T
    dc_t  = dh_t * o * (1 - tanh(c_t)^2) + dc_{t+1} * f_{t+1}
    da_t  = [dc g i(1-i),  dc c_{t-1} f(1-f),  dc i (1-g^2),  dh tanh(c_t) o(1-o)]
    dw_x  = sum_t x_t^T da_t      dw_h = sum_t h_{t-1}^T da_t      db = sum_t da_t      dx_t = da_t w_x^T

The sums over t are single matrix products after the loop.  The text is cut into B streams that are read side by side,
T symbols at a time; h and c are carried from window to window, gradients are not.

Letters: B streams, T symbols in a window, V symbols in the vocabulary, D layer input width, H hidden width, G = 4H.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

Params = dict[str, np.ndarray]  # w_x0 [V, G], w_h0 [H, G], b0 [G], w_x1 [H, G], ..., w_out [H, V], b_out [V]
State = list[tuple[np.ndarray, np.ndarray]]  # (h [B, H], c [B, H]) of each layer


def initialize(rng: np.random.Generator, V: int, H: int, layers: int) -> Params:
    """Uniform weights within +-1/sqrt(H); zero biases, but 1 for the forget gates."""
    shapes = {"w_out": (H, V)}
    for layer in range(layers):
        shapes |= {f"w_x{layer}": (H if layer else V, 4 * H), f"w_h{layer}": (H, 4 * H)}
    params = {name: rng.uniform(-(H**-0.5), H**-0.5, shape) for name, shape in shapes.items()}
    forget = np.repeat([0.0, 1.0, 0.0, 0.0], H)
    return params | {f"b{layer}": forget.copy() for layer in range(layers)} | {"b_out": np.zeros(V)}


def zero_state(B: int, H: int, layers: int) -> State:
    return [(np.zeros((B, H)), np.zeros((B, H))) for _ in range(layers)]


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * a)  # never overflows


def layer_forward(params: Params, layer: int, x_TBD: np.ndarray, h: np.ndarray, c: np.ndarray):
    """The layer's outputs [T, B, H], its last (h, c), and what its reverse pass needs."""
    w_h, H = params[f"w_h{layer}"], h.shape[1]
    x_TBG = x_TBD @ params[f"w_x{layer}"] + params[f"b{layer}"]
    hs, cs, gates = [h], [c], []
    for x_BG in x_TBG:
        a = x_BG + hs[-1] @ w_h
        i, f, o = sigmoid(a[:, :H]), sigmoid(a[:, H : 2 * H]), sigmoid(a[:, 3 * H :])
        g = np.tanh(a[:, 2 * H : 3 * H])
        cs.append(f * cs[-1] + i * g)
        hs.append(o * np.tanh(cs[-1]))
        gates.append((i, f, g, o))
    h_TBH = np.array(hs)
    return h_TBH[1:], (hs[-1], cs[-1]), (x_TBD, h_TBH[:-1], cs, gates)


def layer_backward(params: Params, layer: int, dh_TBH: np.ndarray, tape) -> tuple[np.ndarray, Params]:
    """The gradients of the layer's input, [T, B, D], and of its parameters."""
    x_TBD, h_before_TBH, cs, gates = tape
    w_x, w_h = params[f"w_x{layer}"], params[f"w_h{layer}"]
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
        dh_back, dc_back = da_TBG[t] @ w_h.T, dc * f
    gradients = {
        f"w_x{layer}": np.tensordot(x_TBD, da_TBG, axes=([0, 1], [0, 1])),
        f"w_h{layer}": np.tensordot(h_before_TBH, da_TBG, axes=([0, 1], [0, 1])),
        f"b{layer}": da_TBG.sum(axis=(0, 1)),
    }
    return da_TBG @ w_x.T, gradients


def forward(params: Params, x_TB: np.ndarray, state: State):
    """The predictions [T, B, V], the next state, the last layer's outputs [T, B, H], and each layer's tape."""
    x_TBD, next_state, tapes = np.eye(len(params["b_out"]))[x_TB], [], []
    for layer, (h, c) in enumerate(state):
        x_TBD, last, tape = layer_forward(params, layer, x_TBD, h, c)
        next_state.append(last)
        tapes.append(tape)
    z_TBV = x_TBD @ params["w_out"] + params["b_out"]
    e_TBV = np.exp(z_TBV - z_TBV.max(axis=-1, keepdims=True))
    return e_TBV / e_TBV.sum(axis=-1, keepdims=True), next_state, x_TBD, tapes


def loss_and_gradients(params: Params, x_TB: np.ndarray, y_TB: np.ndarray, state: State) -> tuple[float, Params, State]:
    """The loss in nats per symbol, its gradients, and the state to carry on with."""
    p_TBV, next_state, h_TBH, tapes = forward(params, x_TB, state)
    at_y = (*np.indices(y_TB.shape), y_TB)
    loss = -np.log(p_TBV[at_y]).mean()
    dz_TBV = p_TBV.copy()
    dz_TBV[at_y] -= 1
    dz_TBV /= y_TB.size
    gradients = {"w_out": np.tensordot(h_TBH, dz_TBV, axes=([0, 1], [0, 1])), "b_out": dz_TBV.sum(axis=(0, 1))}
    dh_TBH = dz_TBV @ params["w_out"].T
    for layer in reversed(range(len(state))):
        dh_TBH, of_layer = layer_backward(params, layer, dh_TBH, tapes[layer])
        gradients |= of_layer
    return float(loss), gradients, next_state


def adam(params: Params, gradients: Params, means: Params, squares: Params, n: int, learning_rate: float) -> None:
    """The n-th update (n = 1 is the first), in place: Kingma & Ba 2015, algorithm 1."""
    for name, g in gradients.items():
        means[name] = 0.9 * means[name] + 0.1 * g
        squares[name] = 0.999 * squares[name] + 0.001 * g**2
        mean, square = means[name] / (1 - 0.9**n), squares[name] / (1 - 0.999**n)
        params[name] -= learning_rate * mean / (np.sqrt(square) + 1e-8)


def worst_gradient_error(seed: int) -> float:
    """The largest |by hand - by central differences| over all parameters of a small model, relative to the largest."""
    rng = np.random.default_rng(seed)
    V, H, B, T, layers, step = 5, 4, 3, 6, 2, 1e-5
    params = initialize(rng, V, H, layers)
    x_TB, y_TB = rng.integers(V, size=(2, T, B))
    state = [(rng.normal(size=(B, H)), rng.normal(size=(B, H))) for _ in range(layers)]
    _, gradients, _ = loss_and_gradients(params, x_TB, y_TB, state)
    worst = 0.0
    for name, p in params.items():
        for index in np.ndindex(p.shape):
            kept = p[index]
            p[index] = kept + step
            above, _, _ = loss_and_gradients(params, x_TB, y_TB, state)
            p[index] = kept - step
            below, _, _ = loss_and_gradients(params, x_TB, y_TB, state)
            p[index] = kept
            worst = max(worst, abs(float((above - below) / (2 * step) - gradients[name][index])))
    return worst / max(float(np.abs(g).max()) for g in gradients.values())


def sample(params: Params, rng: np.random.Generator, x: int, length: int, H: int, layers: int) -> list[int]:
    """`length` symbols, each drawn from the prediction after the ones before it; `x` is read first."""
    ids, state = [x], zero_state(1, H, layers)
    for _ in range(length):
        p_TBV, state, _, _ = forward(params, np.array([ids[-1:]]), state)
        ids.append(int(rng.choice(p_TBV.shape[2], p=p_TBV[0, 0])))
    return ids[1:]


def train(ids: np.ndarray, V: int, options: argparse.Namespace) -> Params:
    """Reads the text as B streams side by side, again and again, and prints the loss ten times."""
    B, T, H, layers = options.batch_size, options.window, options.hidden_size, options.layers
    windows = (len(ids) - 1) // B // T
    length = windows * T  # of a stream
    x_WTB = ids[: B * length].reshape(B, windows, T).transpose(1, 2, 0)
    y_WTB = ids[1 : B * length + 1].reshape(B, windows, T).transpose(1, 2, 0)
    params = initialize(np.random.default_rng(options.seed), V, H, layers)
    means, squares = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    seen = []
    for step in range(options.steps):
        if step % windows == 0:
            state = zero_state(B, H, layers)
        loss, gradients, state = loss_and_gradients(params, x_WTB[step % windows], y_WTB[step % windows], state)
        adam(params, gradients, means, squares, step + 1, options.learning_rate)
        seen.append(loss / np.log(2))
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}  {np.mean(seen):.3f} bits per character", flush=True)
            seen = []
    return params


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Trains a deep LSTM on the characters of a text.")
    parser.add_argument("file", nargs="?", default=__file__, help="UTF-8 text; default: this program")
    parser.add_argument("--steps", type=int, default=1000, help="updates (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="LSTM layers (%(default)s)")
    parser.add_argument("--hidden_size", type=int, default=64, help="H (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="B (%(default)s)")
    parser.add_argument("--window", type=int, default=25, help="T (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=0.01, help="of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run (%(default)s)")
    parser.add_argument("--check", action="store_true", help="compare gradients with finite differences, and exit")
    options = parser.parse_args(argv)
    sizes = (options.steps, options.layers, options.hidden_size, options.batch_size, options.window)
    if min(sizes) < 1 or options.seed < 0:
        parser.error("--steps, --layers, --hidden_size, --batch_size and --window must be 1 or more, --seed 0 or more")
    if options.check:
        error = worst_gradient_error(options.seed)
        print(f"worst error of a gradient: {error:.1e} of the largest gradient (allowed: 1e-7)")
        return 0 if error < 1e-7 else 1
    try:
        text = Path(options.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.file}: {error}")
    needed = options.batch_size * options.window + 1
    if len(text) < needed:
        parser.error(f"{options.file} has {len(text)} characters, fewer than the {needed} of one window a stream")

    symbols = sorted(set(text))
    id_of = {symbol: x for x, symbol in enumerate(symbols)}
    ids = np.array([id_of[symbol] for symbol in text])
    params = train(ids, len(symbols), options)
    rng = np.random.default_rng(options.seed)
    drawn = sample(params, rng, ids[0], length=300, H=options.hidden_size, layers=options.layers)
    print("".join(symbols[x] for x in drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
