"""A folder of weights that other programs read, laid out as model hubs expect it.

    model.safetensors           the weights that are evaluated, float32: PyTorch's names, or our own
    config.json                 what they compute: `describe`
    vocabulary.json             the symbols, as `Vocabulary.to_json`
    README.md                   a model card (model_card.py)
    load_torch.py load_numpy.py  two programs that read the folder and need nothing of this project (folder/)

Where PyTorch has the layer, the arrays of layer k are {module}.weight_ih_l{k}, weight_hh_l{k}, bias_ih_l{k} and
bias_hh_l{k}, with the rows of the gates in PyTorch's order, which is ours: i f g o, or r z n.  Elsewhere they are
layers.{k}.w_x, w_h, b_x, b_h, as `CellParams` has them, and norms.gain_x, first.h, rounds.0.left and so on.  In both,
embedding.weight is `[V, E]`, linear.weight `[V, H]` and linear.bias `[V]`.  A one-hot model has no embedding, a tied
one no linear.weight; weight norm is folded into the weights.
"""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from charlstm.config.model import ModelConfig
from charlstm.interop import model_card
from charlstm.interop.exported import Exported
from charlstm.run import run_directory
from charlstm.types import ModelParams

FORMAT, VERSION = "charlstm", 1  # of config.json
PROGRAMS = ("load_torch.py", "load_numpy.py")
MISSING = "a folder of weights needs safetensors, which is not installed: pip install 'charlstm[export]'"
PYTORCH = {"w_x": "weight_ih", "w_h": "weight_hh", "b_x": "bias_ih", "b_h": "bias_hh"}
# Of layers: what PyTorch's have no place for.
BEYOND_PYTORCH = ("mogrifier_rounds", "train_initial_state", "zoneout", "zoneout_cell")


def write(exported: Exported, folder: Path) -> None:
    """Writes the files into a folder that is there.  Raises ValueError where safetensors is not installed."""
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError:
        raise ValueError(MISSING) from None
    config = describe(exported)
    weights = arrays(exported.params, config["module"])
    packed = save(weights, metadata={"format": "pt" if config["module"] else "np"})
    (folder / "model.safetensors").write_bytes(packed)  # by ourselves, for errors of the disk that are an OSError
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "vocabulary.json").write_text(json.dumps(exported.vocabulary.to_json(), indent=2) + "\n", "utf-8")
    count = sum(array.size for array in weights.values())
    (folder / "README.md").write_text(model_card.card(exported, count, in_load_torch(exported.config.model)), "utf-8")
    for name in PROGRAMS:
        program = importlib.resources.files("charlstm.interop.folder") / name
        (folder / name).write_bytes(program.read_bytes())


def describe(exported: Exported) -> dict[str, Any]:
    """The content of config.json: what is needed to compute the logits, all settings of the model, and `reverse`.

    module: the layers that have these arrays (lstm, gru, rnn, or capped_lstm, which load_torch.py defines); None for
    our own names.  separator: ids that end a document, after which the model was trained to start anew; or [].
    """
    model = exported.config.model
    return {
        "format": FORMAT,
        "version": VERSION,
        "module": module_of(model),
        "vocabulary_size": exported.vocabulary.size,
        "hidden_sizes": list(model.widths),
        "separator": list(run_directory.separator(exported.config, exported.vocabulary)),
        "step": exported.step,
        **exported.settings,
    }


def module_of(config: ModelConfig) -> str | None:
    """The layer under whose names the weights are written; None where PyTorch's layers compute something else."""
    if config.cell not in ("lstm", "gru", "rnn") or any(getattr(config, name) for name in BEYOND_PYTORCH):
        return None
    return "capped_lstm" if config.cap_input_gate else config.cell


def in_load_torch(config: ModelConfig) -> bool:
    """True if load_torch.py computes the model."""
    own = config.cell == "layer_norm_lstm" and not any(getattr(config, name) for name in BEYOND_PYTORCH)
    return own or module_of(config) is not None


def arrays(params: ModelParams, module: str | None) -> dict[str, np.ndarray]:
    """Name -> float32 array, of parameters as `Exported` has them."""
    found = {"linear.bias": params.b_out}
    if params.embedding is not None:
        found["embedding.weight"] = params.embedding
    if params.w_out is not None:
        found["linear.weight"] = params.w_out.T
    for number, cell in enumerate(params.cells):
        if module:
            found |= {f"{module}.{name}_l{number}": getattr(cell, ours).T for ours, name in PYTORCH.items()}
        else:
            leaves = jax.tree_util.tree_leaves_with_path(cell)
            found |= {f"layers.{number}.{keystr(path, simple=True, separator='.')}": leaf for path, leaf in leaves}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}
