"""Writes a trained model in a format of others."""

import importlib
import os
from pathlib import Path

from charlstm.interop.exported import Exported
from data_pipeline import new_directory
from data_pipeline.atomic_files import expand_user

# format -> (the module whose `write(exported, folder)` makes its files, what it is)
FORMATS = {
    "safetensors": ("model_folder", "weights by PyTorch's names, with loaders for PyTorch and for NumPy alone"),
    "onnx": ("onnx_model", "one file for ONNX runtimes, with the state as inputs and outputs"),
    "html": ("sampling_page", "a page that writes, with the weights inside, for any browser"),
    "flair": ("flair_model", "a language model for flair's embeddings of words, lm-forward.pt or lm-backward.pt"),
}


def new_folder(output: str | os.PathLike[str]) -> Path:
    """Returns the path of a folder that can be made.  Raises ValueError if `output` is there and cannot be replaced."""
    return new_directory.replaceable("output", expand_user(os.fspath(output)))


def export(exported: Exported, output: str | os.PathLike[str], format: str) -> Path:
    """Writes a folder that appears whole or not at all, and returns its path.

    A page (format html) is a file of its own if `output` ends with .html.

    Raises:
      ValueError: there is no such format, the format has no place for such a model, a package that it needs is not
        installed, or `output` is there and cannot be replaced.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} must be one of {', '.join(FORMATS)}")
    folder = new_folder(output)
    with new_directory.hidden_beside("output", folder) as staging:
        importlib.import_module(f"charlstm.interop.{FORMATS[format][0]}").write(exported, staging)
        page = staging / "index.html"
        is_file = page.exists() and folder.suffix == ".html" and not folder.is_dir()
        os.replace(page if is_file else staging, folder)  # or an empty directory
    return folder
