"""A page that writes: one file of HTML with the weights inside, which needs neither a server nor the network.

`render_remote` makes the same page without weights: there, the server that sent it writes.

The weights of a page are rounded: matrices to float16, or in larger models to int8 with a scale for the weights of each
unit.  Where a held-out text is at hand, the page says what the rounded model makes of it.
"""

import base64
import dataclasses
import gzip
import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import jax
import numpy as np

from charlstm import distributed
from charlstm.config import Config
from charlstm.inference.evaluate import Split, make_evaluator
from charlstm.inference.score import mixed
from charlstm.interop.exported import Exported
from charlstm.interop.model_card import texts_of
from charlstm.run import run_directory
from charlstm.types import ModelParams
from data_pipeline.progress import say_on_stderr
from data_pipeline.shards import Corpus

MOST_PARAMETERS = 8_000_000  # a page of 10 MB, which writes some 60 symbols a second
MOST_FLOAT16 = 1_000_000  # parameters: above, a page of float16 takes more than 2.7 MB
MOST_SCORED = 200_000  # symbols of held-out text, in evenly spaced chunks: a minute for the largest models
NAMES = {
    "lstm": "An LSTM",
    "gru": "A GRU",
    "rnn": "A plain recurrent network",
    "mlstm": "A multiplicative LSTM",
    "layer_norm_lstm": "A layer-normalized LSTM",
}


def write(exported: Exported, folder: Path) -> None:
    """Writes index.html, and says on stderr what rounding has done to the score.

    Raises:
      ValueError: the model is too large for a page, or reads backward.
    """
    model, vocabulary = exported.config.model, exported.vocabulary
    size = count(exported.params)
    if exported.config.streams.reverse:
        raise ValueError("format=html writes from left to right, and this model reads backward: use launch.sample")
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"format=html puts at most {MOST_PARAMETERS:,} parameters into a page, and this model has {size:,}: use "
            "format=safetensors or onnx"
        )
    format = "float16" if size <= MOST_FLOAT16 else "int8"
    arrays, packed, rounded = pack(exported.params, format)
    about = [described(exported.config, exported.params), scored(exported, rounded, format)]
    about.append("It runs in this page: nothing you type leaves it.")
    head = {
        "format": format,
        "arrays": arrays,
        "characters": vocabulary.characters if vocabulary.kind == "characters" else None,
        "separator": run_directory.separator(exported.config, vocabulary),
        "widths": model.widths,
        "variant": model.variant,
    } | {name: getattr(model, name) for name in ("cell", "skip", "zoneout", "zoneout_cell")}
    texts = " and ".join(texts_of(exported.config))
    name = f"{model.cell}{f' of {texts}' if texts else ''}"
    if exported.run_dir:
        name = run_directory.name_of(exported.run_dir)
    page = _page(name, " ".join(filter(None, about)), head, "sampling_model.js", packed)
    (folder / "index.html").write_text(page, "utf-8")


def render_remote(name: str, about: str, address: str = "v1/completions") -> str:
    """Returns the page of a model that is served: completions come from `address` beside the page, behind a proxy too.

    Args:
      name: of the model, as the server knows it.
      about: sentences for people, such as `described` returns.
    """
    return _page(name, about, {"name": name, "address": address}, "sampling_remote.js")


def count(params: ModelParams) -> int:
    """Returns the number of parameters."""
    return sum(np.size(array) for array in jax.tree.leaves(params))


def described(config: Config, params: ModelParams) -> str:
    """Returns what a model is and, if that is known, has read."""
    widths = config.model.widths
    same = len(set(widths)) == 1
    layers = f"{len(widths)} \N{MULTIPLICATION SIGN} {widths[0]}" if same else " + ".join(map(str, widths))
    more = f", mogrified in {config.model.mogrifier_rounds} rounds" if config.model.mogrifier_rounds else ""
    texts = " and ".join(texts_of(config))
    learned = f" It has learned from {texts}, one symbol at a time." if texts else ""
    return f"{NAMES[config.model.cell]} of {layers} units{more}: {count(params):,} parameters.{learned}"


def pack(params: ModelParams, format: str) -> tuple[list[list[Any]], bytes, ModelParams]:
    """Returns names and shapes of the arrays, their bytes, and the parameters as they are after rounding.

    A matrix lies as it is read: the weights of a unit together, but for the rows of the embedding, or of the first
    layer where its input is one-hot, which are those of a symbol.
    """
    rows_of_symbols = ("embedding", *(() if params.embedding is not None else ("cells.0.w_x",)))
    arrays: list[list[Any]] = []
    parts: list[bytes] = []

    def one(path: Any, array: np.ndarray) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if array.ndim == 1:
            arrays.append([name, len(array)])
            parts.append(array.astype("<f4").tobytes())
            return array
        matrix = array if name in rows_of_symbols else array.T
        arrays.append([name, *matrix.shape])
        if format == "float16":
            values = matrix.astype("<f2")
            parts.append(values.tobytes())
            rounded = values.astype(np.float32)
        else:
            scales = np.maximum(np.abs(matrix).max(1, keepdims=True), 1e-30).astype(np.float32) / np.float32(127)
            levels = np.round(matrix / scales).astype(np.int8)
            parts.append(scales.astype("<f4").tobytes() + levels.tobytes())
            rounded = levels.astype(np.float32) * scales
        return rounded if name in rows_of_symbols else rounded.T

    rounded = jax.tree_util.tree_map_with_path(one, params)
    return arrays, b"".join(parts), rounded


def scored(exported: Exported, rounded: ModelParams, format: str) -> str:
    """Returns a sentence on the score of the rounded model; says it on stderr, beside that of the model itself.

    The texts of a mixture have their shares in the score, as where a run is validated.
    """
    config, held_out = exported.config, exported.held_out
    found: Mapping[str, Split]
    if isinstance(held_out, Corpus):
        found, percent = held_out.texts("valid"), held_out.percent
    else:
        found, percent = {"": held_out} if held_out else {}, {"": 100.0}
    texts = {name: text for name, text in found.items() if len(text) > 1}
    if not texts:
        say_on_stderr("index.html: the score of the rounded model was not measured, as no held-out text is at hand")
        return ""
    model = dataclasses.replace(config.model, compute_dtype="float32")  # as the page computes
    mesh, separator = distributed.make(), run_directory.separator(config, exported.vocabulary)
    as_page = dataclasses.replace(config, model=model)
    size, most = exported.vocabulary.size, -(-MOST_SCORED // len(texts))
    evaluate = {name: make_evaluator(as_page, size, text, mesh, separator, most=most) for name, text in texts.items()}
    placed = (distributed.put(mesh, distributed.REPLICATED, params) for params in (exported.params, rounded))
    exact, page = (mixed({name: one(params) for name, one in evaluate.items()}, percent) for params in placed)
    kind = exported.vocabulary.kind
    say_on_stderr(
        f"index.html: {page.in_words(kind)} with weights of {format}, {exact.bits_per_symbol:.4f} as trained, on "
        f"{page.symbols:,} symbols of held-out text"
    )
    return (
        f"It needs {page.bits_per_symbol:.3f} bits for a {kind[:-1]} of text that it did not learn from, "
        f"{exact.bits_per_symbol:.3f} before its weights were rounded to {format}."
    )


def _page(name: str, about: str, head: dict[str, Any], engine: str, weights: bytes = b"") -> str:
    script = "\n".join(_resource(file) for file in (engine, "sampling_page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    if "address" in head:
        policy += "; connect-src 'self'"
    return Template(_resource("sampling_page.html")).substitute(
        name=html.escape(name),
        about=html.escape(about),
        policy=policy,
        style=_resource("sampling_page.css"),
        head=json.dumps(head).replace("<", "\\u003c"),
        weights=base64.b64encode(gzip.compress(weights, mtime=0)).decode(),
        script=script,
    )


def _resource(name: str) -> str:
    return resources.files("charlstm.interop").joinpath(name).read_text("utf-8")
