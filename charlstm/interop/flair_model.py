"""The file of a `LanguageModel` of flair, which makes contextual string embeddings of words from it.

    lm-forward.pt, or of a run with --reverse lm-backward.pt

Source: Akbik, Blythe and Vollgraf, Contextual String Embeddings for Sequence Labeling, COLING 2018.  The file is
PyTorch's: a zip archive with the bytes of each array, and a pickle that names the functions and classes that put them
together.  It is written here without PyTorch and without flair, whose classes the pickle only names.

Flair's dictionary has its unknown symbol at 0 and single characters after it, as our vocabularies of characters have;
its weights are those of torch.nn.LSTM, with our order of the gates.  Flair reads a text from zero state.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from charlstm.config import Config
from charlstm.interop.exported import Exported
from charlstm.run import run_directory
from charlstm.types import ModelParams
from data_pipeline.vocabulary import Vocabulary

# Settings of the model that flair's has no place for, where they are not as by default.
BEYOND = ("cell", "cap_input_gate", "skip", "zoneout", "zoneout_cell", "mogrifier_rounds", "train_initial_state")
DELIMITER = "\n"  # what flair reads before a text, where documents were not told apart


class Named(NamedTuple):
    """A class that the reader of a pickle looks up; with a state, an object of it."""

    module: str
    name: str
    state: dict[str, Any] | None = None


def write(exported: Exported, folder: Path) -> None:
    """Writes the file into a folder that is there.  Raises ValueError where flair has no place for such a model."""
    refuse_others(exported.config, exported.vocabulary)
    model, backward = exported.config.model, exported.config.streams.reverse
    # As the model has read it: flair puts it before the text that it has turned around.
    separator = run_directory.separator(exported.config, exported.vocabulary)
    content = {
        "state_dict": arrays(exported.params),
        "dictionary": _dictionary(exported.vocabulary),
        "is_forward_lm": not backward,
        "hidden_size": model.widths[0],
        "nlayers": model.num_layers,
        "embedding_size": model.embedding_size or exported.vocabulary.size,
        "nout": None,
        "document_delimiter": exported.vocabulary.decode(np.array(separator, int)) or DELIMITER,
        "dropout": model.output_dropout,
        "recurrent_type": "lstm",
        "has_decoder": True,
    }
    _save(content, folder / f"lm-{'backward' if backward else 'forward'}.pt")


def refuse_others(config: Config, vocabulary: Vocabulary) -> None:
    """Raises ValueError where a model is none of flair's: LSTM layers of one width, on characters."""
    model, why = config.model, "flair's models are plain LSTM layers"
    if vocabulary.kind != "characters":
        raise ValueError(
            "format=flair has no place for vocabulary=bytes, as flair reads characters: train with "
            "--vocabulary=characters"
        )
    others = [name for name in BEYOND if getattr(model, name) != type(model).__dataclass_fields__[name].default]
    if model.num_layers == 1 and "skip" in others:
        others.remove("skip")
    if len(set(model.widths)) > 1:
        others, why = ["last_hidden_size"], "flair's layers have one width"
    if others:
        raise ValueError(
            f"format=flair has no place for {others[0]}={getattr(model, others[0])}: {why}; format=safetensors has one"
        )


def arrays(params: ModelParams) -> dict[str, np.ndarray]:
    """Returns the weights by flair's names, float32; one-hot symbols are an embedding that is the identity."""
    embedding = np.eye(len(params.b_out)) if params.embedding is None else np.asarray(params.embedding)
    found: dict[str, Any] = {"encoder.weight": embedding}
    for number, cell in enumerate(params.cells):
        layer = {"weight_ih": cell.w_x.T, "weight_hh": cell.w_h.T, "bias_ih": cell.b_x, "bias_hh": cell.b_h}
        found |= {f"rnn.{name}_l{number}": array for name, array in layer.items()}
    found |= {"decoder.weight": embedding if params.w_out is None else params.w_out.T, "decoder.bias": params.b_out}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def _dictionary(vocabulary: Vocabulary) -> Named:
    items = [b"<unk>", *(character.encode() for character in vocabulary.characters)]
    ids = {item: number for number, item in enumerate(items)}
    flags = {"add_unk": True, "multi_label": False, "span_labels": False}
    return Named("flair.data", "Dictionary", state={"item2idx": ids, "idx2item": items, **flags})


def _save(content: dict[str, Any], path: Path) -> None:
    """Writes PyTorch's archive; the same content has the same bytes."""
    stored: list[np.ndarray] = []
    pickled = b"\x80\x03" + _pickled(content, stored) + b"."
    records = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    records |= {f"data/{number}": array.astype("<f4").tobytes() for number, array in enumerate(stored)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)


def _pickled(value: Any, stored: list[np.ndarray]) -> bytes:
    """Returns the opcodes that push a value; arrays are added to `stored`, and named by their number there."""
    if isinstance(value, np.ndarray):
        stored.append(value)
        kind = Named("torch", "FloatStorage")
        storage = _pickled(("storage", kind, str(len(stored) - 1), "cpu", value.size), stored) + b"Q"
        strides = tuple(stride // value.itemsize for stride in value.strides)
        rest: tuple[Any, ...] = (0, value.shape, strides, False, OrderedDict())
        return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + _all(rest, stored) + b"tR"
    if isinstance(value, Named):
        found = _global(value.module, value.name)
        return found if value.state is None else found + b")\x81" + _pickled(value.state, stored) + b"b"
    if isinstance(value, tuple):
        return b"(" + _all(value, stored) + b"t"
    if type(value) is dict:
        return b"}(" + _all([part for item in value.items() for part in item], stored) + b"u"
    return pickle.dumps(value, 3)[2:-1]  # without the marks of begin and end


def _all(values: Any, stored: list[np.ndarray]) -> bytes:
    return b"".join(_pickled(value, stored) for value in values)


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
