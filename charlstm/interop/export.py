"""Writes a trained model in a format of others."""

import importlib
import os
import shutil
import tempfile
from pathlib import Path

from charlstm.interop.exported import Exported
from data_pipeline.atomic_files import expand_user

# format -> (the module whose `write(exported, folder)` makes its files, what it is)
FORMATS = {
    "safetensors": ("model_folder", "weights by PyTorch's names, with loaders for PyTorch and for NumPy alone"),
    "onnx": ("onnx_model", "one file for ONNX runtimes, with the state as inputs and outputs"),
    "html": ("sampling_page", "a page that writes, with the weights inside, for any browser"),
    "flair": ("flair_model", "a language model for flair's embeddings of words, lm-forward.pt or lm-backward.pt"),
}


def new_folder(output: str | os.PathLike[str]) -> Path:
    """Returns the path of a folder that can be made.  Raises ValueError if `output` has files already."""
    folder = expand_user(os.fspath(output))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"output={folder} is there already: name a new directory, or remove it")
    return folder


def export(exported: Exported, output: str | os.PathLike[str], format: str) -> Path:
    """Writes a folder that appears whole or not at all, and returns its path.

    A page (format html) is a file of its own if `output` ends with .html.

    Raises:
      ValueError: there is no such format, the format has no place for such a model, or `output` has files already.
      ModuleNotFoundError: a package that the format needs is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} must be one of {', '.join(FORMATS)}")
    folder = new_folder(output)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"output={folder} cannot be written: {error.strerror}") from None
    try:
        importlib.import_module(f"charlstm.interop.{FORMATS[format][0]}").write(exported, staging)
        staging.chmod(0o755)
        page = staging / "index.html"
        os.replace(page if page.exists() and folder.suffix == ".html" else staging, folder)  # or an empty directory
    except OSError as error:  # the disk is full, say
        raise OSError(error.errno, f"{error.strerror}: output={folder} was not written") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
