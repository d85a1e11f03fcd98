"""Models that others trained -> run directories, from which one samples, evaluates, looks inside and trains on.

The run has a checkpoint of step 0, which holds the parameters alone, and no corpus.
"""

import dataclasses
import errno
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.config.model import ModelConfig
from charlstm.interop import own_folder, sentiment_neuron, symbol_table, torch_weights
from charlstm.interop.torch_weights import Roles
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.run_directory import Identity
from charlstm.types import ModelParams, TrainState
from data_pipeline import new_directory
from data_pipeline.atomic_files import expand_user
from data_pipeline.settings import CorpusSettings
from data_pipeline.vocabulary import Vocabulary

TORCH = (".safetensors", ".pt", ".pth", ".bin")


class Imported(NamedTuple):
    """A model of others as this project has it."""

    config: Config
    vocabulary: Vocabulary
    params: ModelParams  # NumPy, float32
    remarks: list[str]


def import_model(
    source: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    vocabulary_file: str = "",
    roles: Roles = Roles(),  # noqa: B008 (it is frozen)
) -> Imported:
    """Reads a model that another program wrote, and makes a run directory of it, which appears whole or not at all.

    Args:
      source: a state dict of PyTorch (.safetensors; .pt, .pth and .bin where PyTorch is installed), a folder that
        `launch.export` wrote, or the folder of the sentiment neuron's .npy files.
      vocabulary_file: the symbols of a state dict, see `symbol_table.read`.
      roles: which tensor of a state dict is what, where it does not say so itself.

    Raises:
      ValueError: the model cannot be read, or is none that this project has, or `run_dir` is there already.
    """
    path = expand_user(os.fspath(source)).absolute()
    folder = new_directory.replaceable("run_dir", run_directory.named("run_dir", os.fspath(run_dir)))
    imported = read(path, vocabulary_file, roles)
    _write(imported, path, folder)
    return imported


def read(path: Path, vocabulary_file: str, roles: Roles) -> Imported:
    """Reads a model; arguments and errors as of `import_model`."""
    if not path.exists():
        raise ValueError(f"from={path} is not there")
    if path.is_dir() and own_folder.is_one(path):
        _refuse_given(path, vocabulary_file, roles)
        own = own_folder.read(path)
        config = _config(own.model, own.vocabulary, own.separator, own.reverse)
        return Imported(config, own.vocabulary, own.params, [])
    if path.is_dir():
        if not sentiment_neuron.is_one(path):
            raise ValueError(
                f"from={path} is a directory, and neither one that launch.export wrote with --format=safetensors nor "
                "one with 0.npy to 14.npy of the sentiment neuron: name the file of the weights"
            )
        _refuse_given(path, vocabulary_file, roles)
        weights, vocabulary_file = sentiment_neuron.read(path), symbol_table.BYTES
    elif path.suffix in TORCH:
        weights = torch_weights.model_of(torch_weights.read(path), roles, path)
    else:
        raise ValueError(
            f"from={path} is none of {', '.join(TORCH)}: write a state dict where its own program runs, as in "
            "docs/interop.md"
        )
    table = symbol_table.read(vocabulary_file, len(weights.params.b_out))
    params, model = symbol_table.rearranged(weights.params, table), ModelConfig(**weights.settings)
    return Imported(_config(model, table.vocabulary), table.vocabulary, params, [weights.roles, *table.remarks])


def _refuse_given(path: Path, vocabulary_file: str, roles: Roles) -> None:
    """Raises ValueError where something is given that only a state dict leaves open."""
    usual = {"vocabulary_file": ""} | dataclasses.asdict(Roles())
    given = {"vocabulary_file": vocabulary_file} | dataclasses.asdict(roles)
    if others := [f"{name}={value}" for name, value in given.items() if value != usual[name]]:
        raise ValueError(f"from={path} says itself what it is, and needs no {' or '.join(others)}: leave that out")


def _config(
    model: ModelConfig, vocabulary: Vocabulary, separator: list[int] | None = None, reverse: bool = False
) -> Config:
    """The settings of a run that has no corpus."""
    config = Config(model=model, corpus=CorpusSettings(corpus="", vocabulary=vocabulary.kind))
    config = config_lib.replace(config, reverse=reverse)
    if separator:
        separator = separator[::-1] if reverse else separator
        escape = r"\x{:02x}" if vocabulary.kind == "bytes" else r"\U{:08x}"
        ids = separator if vocabulary.kind == "bytes" else [ord(vocabulary.characters[i - 1]) for i in separator]
        text = "".join(map(escape.format, ids))
        config = config_lib.replace(config, reset_state="document", document_separator=text)
    return config


def _write(imported: Imported, source: Path, folder: Path) -> None:
    config, identity = imported.config, Identity(imported.vocabulary, corpus_fingerprint="")
    mesh = distributed.make(list(distributed.make().devices.flat[:1]))
    step, params = distributed.put(mesh, distributed.REPLICATED, (np.int32(0), imported.params))
    nothing: Any = ()  # there was no training here
    state = TrainState(step, params, nothing, nothing, nothing, nothing, nothing)
    with new_directory.hidden_beside("run_dir", folder) as staging:
        note = f"# imported from {os.fspath(source)!a}{_digest(source)}"
        flags = [flag for flag in config_lib.to_flags(config) if not flag.startswith(("--corpus=", "--vocabulary="))]
        run_directory.create(staging, config, identity, [note, f"--vocabulary={config.corpus.vocabulary}", *flags])
        with Checkpoints(staging / "checkpoints", log=lambda line: None) as checkpoints:
            checkpoints.save(state, run_directory.checkpoint_identity(config, identity), None)
        if checkpoints.last_failure:
            raise OSError(errno.EIO, str(checkpoints.last_failure))
        os.replace(staging, folder)  # replaces an empty directory


def _digest(source: Path) -> str:
    """The digest of a single file, for the note of where a run comes from."""
    if not source.is_file():
        return ""
    with source.open("rb") as file:
        return f", sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def in_words(imported: Imported) -> str:
    """Describes a model that was read, in one line."""
    model, count = imported.config.model, sum(array.size for array in jax.tree.leaves(imported.params))
    end = f"embedding {model.embedding_size}" if model.embedding_size else "one-hot input"
    layers = " + ".join(map(str, model.widths))
    return (
        f"{model.cell}, {layers} units, {end}{', tied' if model.tie_embeddings else ''}, {imported.vocabulary.size} "
        f"{imported.vocabulary.kind}, {count:,} parameters"
    )
