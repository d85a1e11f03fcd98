"""What one writes with PyTorch to train such a model: `python -m benchmarks.peers.pytorch_train TEXT RUN_DIR SETTINGS`.

A text in memory as B streams, windows one after the other with the state carried, a line of metrics every few updates,
and a checkpoint of everything with `torch.save`.  Its lines have the names of launch.train's metrics.jsonl.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.pytorch import Trainer
from benchmarks.shapes import Shape


def main(text: str, run_dir: str, shape: dict, num_steps: int, log_every: int, checkpoint_every: int) -> None:
    began, sizes, folder = time.monotonic(), Shape(**shape), Path(run_dir)
    ids = np.fromfile(text, np.uint8)
    stream = len(ids) // sizes.B
    ids_BN = ids[: stream * sizes.B].reshape(sizes.B, stream)
    trainer, losses, saving = Trainer(sizes), list[float](), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, num_steps + 1):
            start = (step - 1) * sizes.T % (stream - sizes.T)
            losses.append(trainer.update(ids_BN[:, start : start + sizes.T + 1]))
            if step % log_every == 0 or step == num_steps:
                fields = {"step": step, "loss": np.mean(losses), "seconds": time.monotonic() - began, "saving": saving}
                print(json.dumps(fields), file=metrics, flush=True)
                losses, saving = [], 0.0
            if checkpoint_every and step % checkpoint_every == 0:
                before = time.monotonic()
                torch.save((trainer.model.state_dict(), trainer.optimizer.state_dict()), folder / "checkpoint.pt")
                saving += time.monotonic() - before


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
