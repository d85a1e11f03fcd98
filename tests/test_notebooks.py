"""The notebooks as they are committed: executed from top to bottom, without errors or a trace of a machine."""

import json
import re

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells_and_texts(path):
    """The code cells of a notebook, and all that its outputs show as text."""
    notebook = json.loads(path.read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    shown = [output.get("data", {"text/plain": output.get("text", "")}) for output in outputs]
    return notebook, cells, ["".join(data[kind]) for data in shown for kind in data if kind.startswith("text/")]


def test_there_are_four():
    names = ["1_rnn_vs_lstm", "2_lstm_tuning", "3_large_corpus", "4_looking_inside"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_in_order_and_without_errors(path):
    _, cells, _ = cells_and_texts(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]]
    assert not [kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"]
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_no_trace_of_a_machine_and_is_small(path):
    notebook, _, texts = cells_and_texts(path)
    assert set(notebook["metadata"]) <= {"kernelspec"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    paths = r"(?<![\w.<])/(home|root|tmp|work|usr|opt|var|Users|mnt)\b|[A-Z]:\\"
    assert not [text for text in texts if re.search(paths, text)]
    assert path.stat().st_size < 1_000_000
