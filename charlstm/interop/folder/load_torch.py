"""The model in PyTorch (needs torch and safetensors):

model = load(".")
logits, state = model(ids)  # ids [B, T], logits [B, T, V] of the symbol after each; hand `state` to the next call
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


class CappedLSTM(nn.LSTM):
    """One layer of an LSTM whose input gate lets in no more than was forgotten: min(i, 1 - f)."""

    def forward(self, x, state=None):
        h, c = state or [x.new_zeros(1, len(x), self.hidden_size)] * 2
        h, c, outputs = h[0], c[0], []
        for z in functional.linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1):
            i, f, g, o = functional.linear(h, self.weight_hh_l0, self.bias_hh_l0).add(z).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + torch.minimum(i, 1 - f) * g
            h = o * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h[None], c[None])


class LayerNormLSTM(nn.Module):
    """One layer of the layer-normalized LSTM, whose input gate may be capped as well."""

    def __init__(self, inputs, units, capped):
        super().__init__()
        self.w_x, self.w_h = (nn.Parameter(torch.empty(width, 4 * units)) for width in (inputs, units))
        self.b_x, self.b_h = (nn.Parameter(torch.empty(4 * units)) for _ in range(2))
        sizes = {"gain_x": 4 * units, "gain_h": 4 * units, "gain_c": units, "b_c": units}
        self.norms = nn.ParameterDict({name: nn.Parameter(torch.empty(size)) for name, size in sizes.items()})
        self.capped = capped

    def forward(self, x, state=None):
        h, c = state or [x.new_zeros(len(x), len(self.norms["b_c"]))] * 2
        outputs = []
        for z in normalized(x @ self.w_x, self.norms["gain_x"], self.b_x).unbind(1):
            i, f, g, o = normalized(h @ self.w_h, self.norms["gain_h"], self.b_h).add(z).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + (torch.minimum(i, 1 - f) if self.capped else i) * g
            h = o * normalized(c, self.norms["gain_c"], self.norms["b_c"]).tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h, c)


def normalized(v, gain, bias):
    return functional.layer_norm(v, v.shape[-1:], gain, bias, eps=1e-5)


KINDS = {"lstm": nn.LSTM, "capped_lstm": CappedLSTM, "gru": nn.GRU, "rnn": nn.RNN}


def layer_of(config, inputs, units):
    """Returns a layer that computes the model.  Raises ValueError where there is none."""
    options = {"nonlinearity": config["nonlinearity"]} if config["module"] == "rnn" else {}
    if config["module"] in KINDS:
        return KINDS[config["module"]](inputs, units, batch_first=True, **options)
    others = ("mogrifier_rounds", "train_initial_state", "zoneout", "zoneout_cell")
    if config["cell"] != "layer_norm_lstm" or any(config[name] for name in others):
        raise ValueError(f"PyTorch has no layer that computes this model ({config['cell']}): use load_numpy.py")
    return LayerNormLSTM(inputs, units, config["cap_input_gate"])


class CharacterModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        V, E = config["vocabulary_size"], config["embedding_size"]
        self.layers = nn.ModuleList(layer_of(config, D, H) for D, H in pairwise([E or V, *config["hidden_sizes"]]))
        self.linear = nn.Linear(config["hidden_sizes"][-1], V)
        self.embedding = None
        if E:
            self.embedding = nn.Embedding(V, E)
            if config["tie_embeddings"]:
                self.linear.weight = self.embedding.weight
        self.skip = config["skip"]

    def forward(self, ids, state=None):
        if self.embedding is None:
            x = functional.one_hot(ids, self.linear.out_features).to(self.linear.weight.dtype)
        else:
            x = self.embedding(ids)
        outputs, new_state = [], []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, after = layer(x, before)
            outputs.append(x)
            new_state.append(after)
        return self.linear(sum(outputs) if self.skip else x), new_state


def load(folder="."):
    """Returns the model of an exported folder."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    model, weights = CharacterModel(config), load_file(Path(folder) / "model.safetensors")
    # The file names all layers as one nn.LSTM of several does, lstm.weight_ih_l1; here each layer is one by itself.
    for number in range(len(model.layers) if config["module"] else 0):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weights[f"layers.{number}.{name}_l0"] = weights.pop(f"{config['module']}.{name}_l{number}")
    if config["tie_embeddings"]:
        weights["linear.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights)
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(
        "this file is imported: from load_torch import load; load_numpy.py is the program that writes text"
    )
