"""ONNX: one graph of the standard's own recurrent operators, with the state as inputs and outputs.

    ids [B, T], h_1 [B, H], c_1, h_2, ...  ->  logits [B, T, V], next_h_1 [B, H], next_c_1, next_h_2, ...

B and T may be any.  What the operators do not know is refused: they have no multiplicative, layer-normalized or capped
LSTM, no mogrifier, and do not mix a new state with the old one as zoneout's mean does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.interop.exported import Exported
from charlstm.run import run_directory
from charlstm.types import CellParams

OPSET, IR = 17, 8  # what runtimes read since 2022
LARGEST_FILE = 2**31 - 2**20  # bytes: a protocol buffer holds 2 GB; larger weights lie in a file beside it
OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
# Where our gates lie: the LSTM's i f g o become i o f c, and the GRU's r u n become z r h, which are u r n.
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def write(exported: Exported, folder: Path) -> None:
    """Writes model.onnx, computed in float32, whose metadata_props have the settings and the vocabulary.

    Raises:
      ValueError: the model has a part for which ONNX has no operator, or the package onnx is not installed.
    """
    if beyond := unsupported(exported.config.model):
        raise ValueError(
            f"format=onnx: ONNX has no operator for {beyond}: train without it, or use format=html, a page that "
            "writes, or safetensors, whose load_numpy.py computes every model"
        )
    try:
        import onnx
    except ModuleNotFoundError:
        raise ValueError("format=onnx needs the package onnx: pip install 'charlstm[export]'") from None
    graph = _Graph(onnx, exported)
    model = onnx.helper.make_model(
        graph.made(),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="charlstm",
        doc_string=__doc__ or "",
    )
    onnx.helper.set_model_props(model, properties(exported))
    path = folder / "model.onnx"
    outside = graph.bytes > LARGEST_FILE
    onnx.save_model(model, path, save_as_external_data=outside, location="model.onnx.data")
    onnx.checker.check_model(path, full_check=True)


def unsupported(config: ModelConfig) -> str:
    """Returns the first setting for which ONNX has no operator, as name=value; "" if there is none."""
    if config.cell not in OPERATORS:
        return f"cell={config.cell}"
    names = ("cap_input_gate", "mogrifier_rounds", "zoneout", "zoneout_cell")
    return next((f"{name}={getattr(config, name)}" for name in names if getattr(config, name)), "")


def properties(exported: Exported) -> dict[str, str]:
    """Returns the metadata: values are JSON.

    vocabulary: {"kind": "bytes"}, whose ids are the values of bytes, or {"kind": "characters", "characters": ...},
    where id k is the k-th of them, from 1 on, and id 0 an unknown one.  separator: the ids that end a document; the
    last one is read from the first state.  first_state: of each state input, [H] values; zeros where it is not learned.
    config: the settings of the model, and `reverse`.
    """
    separator = run_directory.separator(exported.config, exported.vocabulary)
    first: dict[str, list[float]] = {}
    for number, cell in enumerate(exported.params.cells, 1):
        if cell.first is not None:
            first |= {
                f"{name}_{number}": np.asarray(array).tolist()
                for name, array in cell.first._asdict().items()
                if array is not None
            }
    return {
        "vocabulary": json.dumps(exported.vocabulary.to_json()),
        "separator": json.dumps(separator),
        "first_state": json.dumps(first),
        "step": json.dumps(exported.step),
        "config": json.dumps(exported.settings),
    }


class _Graph:
    """The nodes and weights of a model, as they are added."""

    def __init__(self, onnx: Any, exported: Exported) -> None:
        self._onnx, self._exported = onnx, exported
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._states: list[tuple[str, int]] = []
        self.bytes = 0

    def made(self) -> Any:
        """Returns the whole graph."""
        helper, INT64, FLOAT = self._onnx.helper, self._onnx.TensorProto.INT64, self._onnx.TensorProto.FLOAT
        model, params = self._exported.config.model, self._exported.params
        self._node("Transpose", ["ids"], "ids_TB", perm=[1, 0])
        x = self._input(params.embedding)
        outputs = []
        for number, cell in enumerate(params.cells, 1):
            x = self._layer(number, cell, x)
            outputs.append(x)
        if model.skip and len(outputs) > 1:
            x = self._node("Sum", outputs, "features")
        if params.w_out is None:
            w_out = self._node("Transpose", ["embedding"], "embedding_transposed", perm=[1, 0])
        else:
            w_out = self._weight("w_out", params.w_out)
        x = self._node("MatMul", [x, w_out], "products")
        x = self._node("Add", [x, self._weight("b_out", params.b_out)], "logits_TBV")
        self._node("Transpose", [x], "logits", perm=[1, 0, 2])
        V = len(params.b_out)
        inputs = [helper.make_tensor_value_info("ids", INT64, ["B", "T"])]
        made = [helper.make_tensor_value_info("logits", FLOAT, ["B", "T", V])]
        for name, H in self._states:
            inputs.append(helper.make_tensor_value_info(name, FLOAT, ["B", H]))
            made.append(helper.make_tensor_value_info(f"next_{name}", FLOAT, ["B", H]))
        return helper.make_graph(self._nodes, "charlstm", inputs, made, self._weights)

    def _input(self, embedding: Any) -> str:
        if embedding is not None:
            return self._node("Gather", [self._weight("embedding", embedding), "ids_TB"], "embedded")
        # The operators multiply their input by its weights themselves, so rows of these cannot be gathered for them.
        V = np.array(self._exported.vocabulary.size, np.int64)
        depth, values = self._weight("V", V), self._weight("off_on", np.array([0, 1], np.float32))
        return self._node("OneHot", ["ids_TB", depth, values], "one_hot", axis=-1)

    def _layer(self, number: int, cell: CellParams, x: str) -> str:
        """Adds a layer; returns the name of its output `[T, B, H]`."""
        model = self._exported.config.model
        H, kind = len(cell.w_h), model.cell

        def gates(array: Any) -> np.ndarray:
            """`[..., G]` in ONNX's order, as `[1, G, ...]`."""
            parts = np.split(np.asarray(array), len(ORDER[kind]), axis=-1)
            return np.concatenate([parts[gate] for gate in ORDER[kind]], axis=-1).T[None]

        first = self._weight("first_axis", np.array([0], np.int64))
        inputs = [
            x,
            self._weight(f"W_{number}", gates(cell.w_x)),
            self._weight(f"R_{number}", gates(cell.w_h)),
            self._weight(f"B_{number}", np.concatenate([gates(cell.b_x), gates(cell.b_h)], axis=1)),
            "",  # all texts have T symbols
        ]
        names = [f"h_{number}"] + ([f"c_{number}"] if kind == "lstm" else [])
        for name in names:
            self._states.append((name, H))
            inputs.append(self._node("Unsqueeze", [name, first], f"{name}_1BH"))
        how: dict[str, Any] = {"hidden_size": H}
        if kind == "gru":
            how["linear_before_reset"] = 1
        elif kind == "rnn":
            how["activations"] = [model.nonlinearity.capitalize()]
        made = [f"Y_{number}", *(f"next_{name}_1BH" for name in names)]
        self._nodes.append(self._onnx.helper.make_node(OPERATORS[kind], inputs, made, name=f"layer_{number}", **how))
        for name in names:
            self._node("Squeeze", [f"next_{name}_1BH", first], f"next_{name}")
        directions = self._weight("second_axis", np.array([1], np.int64))
        return self._node("Squeeze", [made[0], directions], f"output_{number}")

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def _weight(self, name: str, array: Any) -> str:
        """Adds a constant, once."""
        if all(weight.name != name for weight in self._weights):
            array = np.ascontiguousarray(array)
            self.bytes += array.nbytes
            self._weights.append(self._onnx.numpy_helper.from_array(array, name))
        return name
