"""Reads the folder that `launch.export --format=safetensors` writes: every array with its bits."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from charlstm.config.arguments import of_kind
from charlstm.config.model import ModelConfig
from charlstm.interop import torch_weights
from charlstm.interop.model_folder import FORMAT, PYTORCH, VERSION, module_of
from charlstm.model import language_model
from charlstm.types import CellParams, ModelParams
from data_pipeline.vocabulary import Vocabulary


class Folder(NamedTuple):
    """An exported model."""

    model: ModelConfig
    vocabulary: Vocabulary
    params: ModelParams  # NumPy, float32
    separator: list[int]  # ids that end a document, in the order in which they are read; or []
    reverse: bool  # it reads from the end to the beginning


def is_one(folder: Path) -> bool:
    """True if a directory has a config.json that says so."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def read(folder: Path) -> Folder:
    """Reads a folder for which `is_one`.  Raises ValueError where a file is damaged or does not fit the others."""
    try:
        tree = json.loads((folder / "config.json").read_text("utf-8"))
        if tree.get("version") != VERSION:
            raise ValueError(f"it is of version {tree.get('version')!r}, and this program reads {VERSION}")
        model = _settings(tree)
        vocabulary = Vocabulary.from_json(json.loads((folder / "vocabulary.json").read_text("utf-8")))
        separator = tree.get("separator", [])
        if not isinstance(separator, list) or not all(type(s) is int and 0 <= s < vocabulary.size for s in separator):
            raise ValueError("its separator is no list of ids")
        if not isinstance(reverse := tree.get("reverse", False), bool):
            raise ValueError(f"reverse={reverse!r} is neither true nor false")
    except OSError as error:
        raise ValueError(f"{folder} is not whole: {error.filename} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())}") from None
    path = folder / "model.safetensors"
    params = _params(torch_weights.read(path), model, vocabulary.size, path)
    return Folder(model, vocabulary, params, separator, reverse)


def _settings(tree: dict[str, Any]) -> ModelConfig:
    kinds = {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
    settings = {name: tree[name] for name in kinds if name in tree}
    for name, value in settings.items():
        of_kind(name, value, kinds[name])
    return ModelConfig(**settings)


def _params(tensors: torch_weights.Tensors, model: ModelConfig, size: int, path: Path) -> ModelParams:
    shapes = jax.eval_shape(partial(language_model.init, model, size), jax.random.key(0))
    module, rest = module_of(model), dict(tensors)

    def take(name: str, shape: tuple[int, ...], transposed: bool = False) -> torch_weights.Array:
        if name not in rest:
            raise ValueError(f"{path} has no {name}: it is not of the config.json beside it")
        array = torch_weights.numbers(rest.pop(name), name, path)
        if array.shape != (shape[::-1] if transposed else shape):
            raise ValueError(f"{path}: {name} has the shape {list(array.shape)}, which config.json has otherwise")
        return array.T if transposed else array

    cells = []
    for number, cell in enumerate(shapes.cells):
        if module:
            named = {o: (f"{module}.{n}_l{number}", getattr(cell, o).shape) for o, n in PYTORCH.items()}
            cells.append(CellParams(**{ours: take(name, shape, True) for ours, (name, shape) in named.items()}))
        else:
            leaves, tree = tree_flatten_with_path(cell)
            names = [f"layers.{number}.{keystr(place, simple=True, separator='.')}" for place, _ in leaves]
            cells.append(
                jax.tree.unflatten(
                    tree, [take(name, leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)]
                )
            )
    params = ModelParams(
        embedding=None if shapes.embedding is None else take("embedding.weight", shapes.embedding.shape),
        cells=tuple(cells),
        w_out=None if shapes.w_out is None else take("linear.weight", shapes.w_out.shape, True),
        b_out=take("linear.bias", shapes.b_out.shape),
    )
    if rest:
        raise ValueError(f"{path} has {min(rest)}, which a model of the config.json beside it has not")
    return params
