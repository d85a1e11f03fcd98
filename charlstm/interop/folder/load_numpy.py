"""The model in NumPy alone: what it expects, and text that it writes.

python load_numpy.py --prompt="The " --length=500 --temperature=0.8 --top_k=40 --seed=1

model = Model(".")
logits, state = model(model.encode("The "))  # [symbols, V] of the symbol after each; hand `state` to the next call
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def read_safetensors(path):
    """Name -> float32 array: 8 bytes that have the length of a header, the header in JSON, the numbers."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            arrays[name] = np.frombuffer(content[start + begin : start + end], "<f4").reshape(entry["shape"])
    return arrays


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def lstm_from(a, c, w, config):
    """(h, c) of an LSTM, given the sums `a` that its gates are made of, and c before."""
    i, f, g, o = np.split(a, 4)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    c = f * c + (np.minimum(i, 1 - f) if config["cap_input_gate"] else i) * g
    shown = c if "norms.gain_c" not in w else normalized(c, w["norms.gain_c"]) + w["norms.b_c"]
    return o * np.tanh(shown), c


def normalized(v, gain):
    centered = v - v.mean()
    return gain * centered / np.sqrt((centered * centered).mean() + 1e-5)


# A cell: given z = x W_x, h and c before, and its weights w, the new h and c (None for cells that have none).


def lstm(z, h, c, w, config):
    return lstm_from(z + h @ w["w_h"] + w["b_x"] + w["b_h"], c, w, config)


def mlstm(z, h, c, w, config):
    G = len(w["b_h"])  # the gates' columns come first, then those of the factor m, which takes the place of h
    m = z[G:] * (h @ w["w_h"][:, G:])
    return lstm_from(z[:G] + m @ w["w_h"][:, :G] + w["b_x"] + w["b_h"], c, w, config)


def layer_norm_lstm(z, h, c, w, config):
    a = normalized(z, w["norms.gain_x"]) + w["b_x"] + normalized(h @ w["w_h"], w["norms.gain_h"]) + w["b_h"]
    return lstm_from(a, c, w, config)


def gru(z, h, c, w, config):
    x_r, x_u, x_n = np.split(z + w["b_x"], 3)
    h_r, h_u, h_n = np.split(h @ w["w_h"] + w["b_h"], 3)
    r, u = sigmoid(x_r + h_r), sigmoid(x_u + h_u)
    return (1 - u) * np.tanh(x_n + r * h_n) + u * h, None


def rnn(z, h, c, w, config):
    a = z + h @ w["w_h"] + w["b_x"] + w["b_h"]
    return (np.maximum(a, 0) if config["nonlinearity"] == "relu" else np.tanh(a)), None


CELLS = {"lstm": lstm, "mlstm": mlstm, "layer_norm_lstm": layer_norm_lstm, "gru": gru, "rnn": rnn}


class Model:
    """A model of one text at a time.  Its state is a list: of each layer h and c, `[H]`."""

    def __init__(self, folder="."):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        vocabulary = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        self.of_bytes = vocabulary["kind"] == "bytes"
        # Id -> what it stands for, in UTF-8; of characters, id 0 stands for all that are not in the vocabulary.
        characters = ["\N{REPLACEMENT CHARACTER}", *vocabulary.get("characters", "")]
        self.symbols = [bytes([n]) for n in range(256)] if self.of_bytes else [c.encode() for c in characters]
        weights = read_safetensors(folder / "model.safetensors")
        self.embedding = weights.get("embedding.weight")
        self.w_out = weights.get("linear.weight", self.embedding).T
        self.b_out = weights["linear.bias"]
        self.layers = [self.layer(weights, number) for number in range(self.config["num_layers"])]

    def layer(self, weights, number):
        """The weights of a layer, by the names that the cells have for them."""
        if module := self.config["module"]:  # PyTorch's names, and its matrices are `[gates, inputs]`
            ours = {"w_x": "weight_ih", "w_h": "weight_hh", "b_x": "bias_ih", "b_h": "bias_hh"}
            return {name: weights[f"{module}.{theirs}_l{number}"].T for name, theirs in ours.items()}
        prefix = f"layers.{number}."
        return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}

    def encode(self, text):
        """Ids of a text.  Raises ValueError where a symbol is not in the vocabulary."""
        if self.of_bytes:
            return list(text.encode("utf-8", "surrogateescape"))
        ids = {symbol: n for n, symbol in enumerate(self.symbols) if n}
        if unknown := [c for c in text if c.encode("utf-8", "replace") not in ids]:
            raise ValueError(f"{unknown[0]!r} is not in the vocabulary: leave it out")
        return [ids[c.encode()] for c in text]

    def first_state(self):
        """The state before anything was read: zeros, or trained."""
        zeros = [np.zeros(H, np.float32) for H in self.config["hidden_sizes"]]
        return [(w.get("first.h", z), w.get("first.c", z)) for w, z in zip(self.layers, zeros, strict=True)]

    def __call__(self, ids, state=None):
        """(Logits of the symbol after each of `ids`, `[symbols, V]`; the state after the last one)."""
        state, logits = list(state or self.first_state()), []
        for symbol in ids:
            x, outputs = symbol if self.embedding is None else self.embedding[symbol], []
            for number, w in enumerate(self.layers):
                state[number] = self.step(w, x, *state[number])
                x = state[number][0]
                outputs.append(x)
            logits.append((sum(outputs) if self.config["skip"] else x) @ self.w_out + self.b_out)
        return np.array(logits).reshape(-1, len(self.b_out)), state

    def step(self, w, x, h_before, c_before):
        """(h, c) of a layer after it has read x: a vector, or a symbol's id, which is one-hot."""
        h, number = h_before, 0
        while (left := w.get(f"rounds.{number}.left")) is not None:  # the mogrifier: h scales x, x scales h, ...
            a = (x if number % 2 else h) @ left
            if (right := w.get(f"rounds.{number}.right")) is not None:
                a = a @ right
            factor = 2 * sigmoid(a + w[f"rounds.{number}.bias"])
            x, h = (x, factor * h) if number % 2 else (factor * x, h)
            number += 1
        z = w["w_x"][x] if np.ndim(x) == 0 else x @ w["w_x"]
        h, c = CELLS[self.config["cell"]](z, h, c_before, w, self.config)
        if keep := self.config["zoneout"]:  # the mean of what was kept at random in training
            h = keep * h_before + (1 - keep) * h
        if keep := self.config["zoneout_cell"]:
            c = keep * c_before + (1 - keep) * c
        return h, c

    def write(self, prompt="", length=500, temperature=1.0, top_k=0, seed=0):
        """Yields the ids of a prompt and of its continuation, which ends with the document if that can be told.

        What may begin the end of a document comes when it turns out to be text.
        A model with `reverse` reads and writes from right to left: the prompt is the end of the text, and the ids come
        from there.
        """
        random, end, ids = np.random.default_rng(seed), self.config["separator"], self.encode(prompt)
        ids = ids[:: -1 if self.config["reverse"] else 1]
        yield from ids
        ids = end + ids
        if not ids:  # it begins a line, or anyhow
            ids = [self.symbols.index(b"\n") if b"\n" in self.symbols else int(random.integers(1, len(self.symbols)))]
        state, begun = None, len(ids)
        shown = begun  # how many of `ids` the reader has, with what was read before the prompt
        for position in range(begun + length - 1):
            if end and ids[max(0, position + 1 - len(end)) : position + 1] == end:
                state = None  # another document begins
            logits, state = self(ids[position : position + 1], state)
            if position >= begun - 1:
                ids.append(self.choose(logits[0], temperature, top_k, random))
                text = ids[max(len(end), len(ids) - len(end)) :]
                if end and text == end:
                    return
                begins = [n for n in range(1, len(end)) if text[-n:] == end[:n]]
                sure = max(shown, len(ids) - max(begins, default=0))
                yield from ids[shown:sure]
                shown = sure
        yield from ids[shown:]

    def choose(self, logits, temperature, top_k, random):
        """Draws a symbol; at temperature 0 it is the most probable one."""
        logits = logits.astype(np.float64)
        if not self.of_bytes:
            logits[0] = -np.inf  # the unknown symbol
        if temperature == 0:
            return int(logits.argmax())
        if top_k:
            logits[logits < np.sort(logits)[-min(top_k, len(logits))]] = -np.inf
        p = np.exp((logits - logits.max()) / temperature)
        return int(random.choice(len(p), p=p / p.sum()))


def main():
    parser = argparse.ArgumentParser(description="Writes text by the model in this folder.")
    parser.add_argument("--prompt", default="", help="what the text begins with")
    parser.add_argument("--length", type=int, default=500, help="symbols to write after the prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most probable symbol; 1: as it learned")
    parser.add_argument("--top_k", type=int, default=0, help="choose among so many symbols; 0: among all")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    chosen = parser.parse_args()
    if not (chosen.length >= 0 and 0 <= chosen.temperature < np.inf and chosen.top_k >= 0 and chosen.seed >= 0):
        parser.error("length, temperature, top_k and seed must be 0 or more")
    model, out = Model(Path(__file__).parent), sys.stdout.buffer
    try:
        ids = model.write(**vars(chosen))
        for symbol in reversed(list(ids)) if model.config["reverse"] else ids:
            out.write(model.symbols[symbol])
            out.flush()
        out.write(b"\n")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
