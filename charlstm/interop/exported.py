"""A model on its way out, for every format: settings, symbols, and the weights as they are evaluated."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from charlstm.config import Config
from charlstm.inference.evaluate import Split
from charlstm.model import layer
from charlstm.model.ops import compiler
from charlstm.types import ModelParams
from data_pipeline.shards import Corpus
from data_pipeline.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Exported:
    """A trained model on its way out."""

    config: Config
    vocabulary: Vocabulary
    params: ModelParams  # NumPy, float32; weight norm is folded into w_h
    step: int  # updates after which the parameters were saved
    run_dir: Path | None = None  # where its measurements are
    held_out: Split | Corpus | None = None  # text that it was not trained on, or a corpus or mixture with such splits

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that its logits are computed with, and `reverse`; nothing of the machine or its training texts."""
        model = dataclasses.replace(self.config.model, weight_norm=False)  # it is folded
        return {"reverse": self.config.streams.reverse, **dataclasses.asdict(model)}


def folded(params: ModelParams) -> ModelParams:
    """Returns the parameters as NumPy arrays, float32, each w_h with its weight norm applied and no gain."""

    recurrent_weights = compiler.jit(layer.recurrent_weights)

    def of_layer(cell: Any) -> Any:
        return cell._replace(w_h=recurrent_weights(cell), gain=None)

    params = params._replace(cells=tuple(of_layer(cell) for cell in params.cells))
    return jax.tree.map(lambda array: np.asarray(array, np.float32), params)
