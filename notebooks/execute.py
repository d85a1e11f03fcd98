"""Executes the notebooks from top to bottom, each in a fresh kernel, and writes them back.

    python -m notebooks.execute [NAME ...]

Their runs are made anew.  With CHARLSTM_SHORT=1 everything is tiny, and what is executed is written to CHARLSTM_RUNS
(runs/notebooks/short by default), not over the notebooks.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(path: Path, to: Path) -> None:
    """Executes the notebook `path` in its own folder and writes it to `to`, without a trace of machine and time.

    Raises CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", record_timing=False, resources={"metadata": {"path": HERE}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, to)


def main() -> None:
    is_short = os.environ.get("CHARLSTM_SHORT") == "1"
    default = HERE.parent / "runs" / "notebooks"
    runs = Path(os.environ.setdefault("CHARLSTM_RUNS", str(default / "short" if is_short else default)))
    for path in sorted(HERE.glob("[0-9]_*.ipynb")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        shutil.rmtree(runs / path.stem, ignore_errors=True)
        runs.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        execute(path, runs / path.name if is_short else path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
