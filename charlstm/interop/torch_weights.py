"""Weights by PyTorch's names and layouts: a state dict -> the settings and parameters of a model.

Recurrent layers are known by their names, weight_ih_l0 [gH, D], weight_hh_l0 [gH, H] and so on, and the cell by g: 4
gates are an LSTM's, 3 a GRU's, 1 a plain RNN's.  PyTorch's gates have the order of ours, so matrices are transposed and
that is all.  The embedding [V, E] and the output layer [V, H] are known by their shapes; where these leave a choice, by
the bias and then the names that they have.  Nothing is ever unpickled here: PyTorch reads its own files, tensors alone.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from charlstm.types import CellParams, ModelParams
from data_pipeline.settings import check_choices, setting

Array = Any  # of NumPy; parameters are declared as arrays of JAX
Tensors = dict[str, Array]

CELLS = {4: "lstm", 3: "gru", 1: "rnn"}  # by the number of gates
ONE_HOT = "one-hot"
_RECURRENT = re.compile(r"(.*?)(weight_ih|weight_hh|bias_ih|bias_hh)(?:_l(\d+))?", re.S)
_INPUT_NAMES = re.compile(r"emb|enc|wte|lookup", re.I)
_OUTPUT_NAMES = re.compile(r"dec|lin|fc|head|out|proj|dense|logit|lm_", re.I)
_NESTED = ("state_dict", "model_state_dict", "model", "state")  # where checkpoints keep the weights


@dataclasses.dataclass(frozen=True)
class Roles:
    """Names of tensors, given where their names and shapes leave a choice."""

    recurrent: str = setting("", "PyTorch: the recurrent module, such as rnn, if there are several.")
    embedding: str = setting(
        "", "PyTorch: the embedding, such as encoder (the output layer's own name: they are tied), or one-hot."
    )
    output_layer: str = setting("", "PyTorch: the layer that gives the logits, such as decoder.")
    nonlinearity: str = setting(
        "tanh", "PyTorch: of nn.RNN, tanh or relu: its weights do not say it.", choices=("tanh", "relu")
    )

    def __post_init__(self) -> None:
        check_choices(self)


class Weights(NamedTuple):
    """A model of others: its symbols are still numbered as theirs."""

    settings: dict[str, Any]  # of the model, by the names of ModelConfig
    params: ModelParams  # NumPy, float32
    roles: str  # which tensor was taken for what


def read(path: Path) -> Tensors:
    """Reads the tensors of a .safetensors, or of a .pt, .pth or .bin where PyTorch is installed.

    Raises:
      ValueError: the file is damaged, or has more than tensors.
    """
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_in_one_line(error)}") from None


def _read_safetensors(path: Path) -> Tensors:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs safetensors: pip install 'charlstm[export]'") from None
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {_in_one_line(error)}") from None
    except (AttributeError, TypeError, MemoryError) as error:  # types that NumPy has not
        raise ValueError(f"{path} has a tensor that NumPy cannot hold: {_in_one_line(error)}") from None


def _read_torch(path: Path) -> Tensors:
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs PyTorch, to be read safely: pip install torch, or save it as .safetensors where it is "
            "installed (docs/interop.md)"
        ) from None
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file of others may raise: it is not run, so it can do no harm
        raise ValueError(
            f"{path} is not a file of tensors alone ({_in_one_line(error)[:100]}): save the model's state_dict() where "
            "its own program runs (docs/interop.md)"
        ) from None
    while isinstance(tree, dict) and (inner := next((tree[n] for n in _NESTED if isinstance(tree.get(n), dict)), None)):
        tree = inner
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a state_dict: save the model's state_dict()")
    tensors = {str(name): t for name, t in tree.items() if isinstance(t, torch.Tensor)}
    floats = {name: t.detach().float() if t.is_floating_point() else t for name, t in tensors.items()}
    return {name: t.numpy() for name, t in floats.items()}


def model_of(tensors: Tensors, roles: Roles, source: Path) -> Weights:
    """Returns the model that a state dict is of.

    Raises:
      ValueError: it is none that this project has, or it is ambiguous; says what was found, and which flag tells.
    """
    rest = dict(tensors)
    cell, cells = _recurrent(rest, roles, source)
    if cell != "rnn" and roles.nonlinearity != "tanh":
        raise ValueError(f"nonlinearity={roles.nonlinearity} is of nn.RNN, and {source} has a {cell}: leave it out")
    widths = [p.w_h.shape[0] for p in cells]
    if set(widths[:-1]) - {widths[0]}:
        raise ValueError(f"{source} has layers of {', '.join(map(str, widths))} units: only the last may differ here")
    E, H = cells[0].w_x.shape[0], widths[-1]
    embedding, output = _ends(rest, E, H, roles, source)
    one_hot, is_tied = embedding == ONE_HOT, embedding == output
    table = None if one_hot else numbers(rest[embedding], embedding, source)
    w_out = numbers(rest[output], output, source).T
    b_out = _output_bias(rest, output, source)
    rest = {name: a for name, a in rest.items() if name not in (embedding, output) and _is_float(a)}
    if rest:
        name = min(rest)
        raise ValueError(
            f"{source}: {_shown(name, rest[name])} has no place in a model of an embedding, recurrent layers and an "
            "output layer: take it out of the file if the logits do not depend on it"
        )
    settings = {
        "cell": cell,
        "num_layers": len(cells),
        "hidden_size": widths[0],
        "last_hidden_size": 0 if widths[0] == H else H,
        "embedding_size": 0 if one_hot else E,
        "tie_embeddings": is_tied,
        "nonlinearity": roles.nonlinearity,
    }
    params = ModelParams(table, tuple(cells), None if is_tied else w_out, b_out)
    return Weights(settings, params, f"embedding {embedding}, output layer {output}")


def _recurrent(rest: Tensors, roles: Roles, source: Path) -> tuple[str, list[CellParams]]:
    """Takes the recurrent layers out of `rest`, first to last."""
    for name in rest:
        if found := re.search(r"weight_(ih|hh)_l\d+_reverse$|weight_hr_l\d+$", name):
            what = "projections" if "hr" in found[0] else "a layer that reads backward"
            raise ValueError(f"{source} has {what} ({_shown(name, rest[name])}): there are none here")
    modules: dict[str, dict[int, dict[str, str]]] = {}
    for name in rest:
        if found := _RECURRENT.fullmatch(name):
            module, kind, layer = found.groups()
            modules.setdefault(module, {}).setdefault(int((layer or "0")[:6]), {})[kind] = name
    chosen = roles.recurrent.rstrip(".")
    if chosen:
        modules = {m: layers for m, layers in modules.items() if m.rstrip(".") == chosen or m.startswith(f"{chosen}.")}
    if not modules:
        what = f"module {chosen} with a weight_ih_l0" if chosen else "recurrent layer (no tensor is a weight_ih_l0)"
        raise ValueError(f"{source} has no {what}: it has {_list(rest)}")
    named = [layers[number] for layers in _in_order(modules, source) for number in sorted(layers)]
    cells = [_layer(rest, kinds, source) for kinds in named]
    gates = {p.w_h.shape[1] // p.w_h.shape[0] for p in cells}
    for below, above in itertools.pairwise(cells):
        if above.w_x.shape[0] != below.w_h.shape[0]:
            raise ValueError(
                f"{source}: a layer of {below.w_h.shape[0]} units is followed by one that reads {above.w_x.shape[0]}"
            )
    if len(gates) > 1:
        raise ValueError(f"{source} has layers of {' and '.join(CELLS[g] for g in sorted(gates))}: one cell is for all")
    for kinds in named:
        for name in kinds.values():
            del rest[name]
    return CELLS[gates.pop()], cells


def _in_order(modules: dict[str, dict[int, dict[str, str]]], source: Path) -> list[dict[int, dict[str, str]]]:
    """The modules from first to last: one of any depth, or a list of modules of one layer each."""
    alike = {re.sub(r"\d+", "#", module) for module in modules}
    if len(modules) > 1 and (len(alike) > 1 or any(set(layers) != {0} for layers in modules.values())):
        names = ", ".join(module.rstrip(".") for module in sorted(modules))
        raise ValueError(f"{source} has several recurrent modules, {names}: say which with --recurrent")
    in_order = [modules[m] for m in sorted(modules, key=lambda m: [int(n[:9]) for n in re.findall(r"\d+", m)])]
    for layers in in_order:
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(f"{source} has recurrent layers {', '.join(map(str, sorted(layers)))}: some are missing")
    return in_order


def _layer(rest: Tensors, kinds: dict[str, str], source: Path) -> CellParams:
    if missing := [kind for kind in ("weight_ih", "weight_hh") if kind not in kinds]:
        raise ValueError(f"{source} has {', '.join(sorted(kinds.values()))} and no {missing[0]} beside them")
    arrays = {kind: numbers(rest[name], name, source) for kind, name in kinds.items()}
    w_ih, w_hh = arrays["weight_ih"], arrays["weight_hh"]
    fits = w_ih.ndim == w_hh.ndim == 2 and w_hh.shape[0] in [g * w_hh.shape[1] for g in CELLS]
    biases = [array.shape for kind, array in arrays.items() if kind.startswith("bias")]
    if not fits or len(w_ih) != len(w_hh) or any(shape != w_hh.shape[:1] for shape in biases):
        found = ", ".join(_shown(name, rest[name]) for name in kinds.values())
        raise ValueError(f"{source}: {found} are not the shapes of one layer, [gH, D] and [gH, H] with g 4, 3 or 1")
    zero = np.zeros(w_hh.shape[0], np.float32)
    return CellParams(
        w_x=w_ih.T,
        w_h=w_hh.T,
        b_x=arrays.get("bias_ih", zero),
        b_h=arrays.get("bias_hh", zero),
    )


def _ends(rest: Tensors, E: int, H: int, roles: Roles, source: Path) -> tuple[str, str]:
    """The names of the embedding (the output layer's where they are tied, or one-hot) and of the output layer."""
    matrices = [name for name, array in rest.items() if array.ndim == 2 and _is_float(array)]
    pairs = []
    for output in (name for name in matrices if rest[name].shape[1] == H):
        V = rest[output].shape[0]
        pairs += [(name, output) for name in matrices if rest[name].shape == (V, E)]
        pairs += [(ONE_HOT, output)] if V == E else []
    for flag, place in (("embedding", 0), ("output_layer", 1)):
        if wanted := getattr(roles, flag):
            pairs = [pair for pair in pairs if pair[place] in (wanted, f"{wanted}.weight")]
    whole = [pair for pair in pairs if set(matrices) <= set(pair)]
    for first, second in whole:  # the same weights twice: tied
        if first in rest and E == H and first != second and np.array_equal(rest[first], rest[second]):
            del rest[first]
            return second, second
    for better in (_by_bias, _by_name):
        whole = better(whole, rest) or whole
    if len(whole) == 1:
        return whole[0]
    found = _list({name: rest[name] for name in matrices})
    if not whole:
        raise ValueError(
            f"{source} has {found} beside its recurrent layers, which are not an embedding [V, {E}] and an output "
            f"layer [V, {H}] and nothing else: say which with --embedding and --output_layer, or take the others out"
        )
    raise ValueError(f"{source} has {found}, and which is which is not clear: give --embedding and --output_layer")


def _by_bias(pairs: list[tuple[str, str]], rest: Tensors) -> list[tuple[str, str]]:
    """Returns the pairs whose output layer has a bias, and whose embedding has none."""
    return [(e, o) for e, o in pairs if _bias_name(o) in rest and (e == o or _bias_name(e) not in rest)]


def _by_name(pairs: list[tuple[str, str]], rest: Tensors) -> list[tuple[str, str]]:
    return [(e, o) for e, o in pairs if e != o and _INPUT_NAMES.search(e) and _OUTPUT_NAMES.search(o)]


def _output_bias(rest: Tensors, output: str, source: Path) -> Array:
    """Takes the bias of the output layer out of `rest`: by its name, or the one vector of that length; or zeros."""
    V = rest[output].shape[0]
    vectors = [name for name, array in rest.items() if array.shape == (V,) and _is_float(array)]
    name = _bias_name(output) if _bias_name(output) in vectors else vectors[0] if len(vectors) == 1 else ""
    return numbers(rest.pop(name), name, source) if name else np.zeros(V, np.float32)


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def numbers(array: Array, name: str, source: Path) -> Array:
    """The tensor as float32.  Raises ValueError where it has no numbers, or some that are not finite."""
    if not _is_float(array):
        raise ValueError(
            f"{source}: {_shown(name, array)} is of type {array.dtype}: float16, bfloat16, 32 or 64 are read"
        )
    if not array.size:
        raise ValueError(f"{source}: {_shown(name, array)} is empty")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{source}: {_shown(name, array)} has numbers that are not finite")
    return array


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _shown(name: str, array: Array) -> str:
    return f"{name if name.isprintable() and len(name) < 100 else ascii(name)[:100]} {list(array.shape)}"


def _list(tensors: Tensors) -> str:
    shown = [_shown(name, array) for name, array in sorted(tensors.items())]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "no tensors"


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
