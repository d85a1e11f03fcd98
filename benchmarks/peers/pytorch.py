"""PyTorch's own layers (oneDNN on a CPU, cuDNN on a GPU) with its Adam.

On a GPU its autocast has an LSTM in float16, also where it is asked for bfloat16.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.peers.recipe import CLIP, LEARNING_RATE
from benchmarks.shapes import Shape, windows
from benchmarks.worker import Contestant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_float32_matmul_precision("high")  # TF32 on a GPU that has it, as ours trains


class LanguageModel(torch.nn.Module):
    """Embedding, stack, logits; the layers are PyTorch's fastest."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[shape.cell]
        self.embedding = torch.nn.Embedding(shape.V, shape.E)
        self.stack = layer(shape.E, shape.H, num_layers=shape.L)
        self.out = torch.nn.Linear(shape.H, shape.V)

    def forward(self, ids_TB, state):
        h_TBH, state = self.stack(self.embedding(ids_TB), state)
        return self.out(h_TBH), state


class Trainer:
    """A model, its optimizer, and the recurrent state carried from window to window."""

    def __init__(self, shape: Shape) -> None:
        self.model = LanguageModel(shape).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
        self._state: Any = None
        self._bfloat16 = shape.dtype == "bfloat16"

    def update(self, ids: np.ndarray) -> float:
        """An update from a window [B, T + 1]; its loss."""
        ids_TB = torch.from_numpy(ids.T.astype(np.int64)).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._bfloat16):
            logits_TBV, state = self.model(ids_TB[:-1], self._state)
        loss = torch.nn.functional.cross_entropy(logits_TBV.float().flatten(0, 1), ids_TB[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self._state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return loss.item()


def training(shape: dict) -> Contestant:
    """An update, from a batch in the host's memory."""
    sizes = Shape(**shape)
    trainer, text = Trainer(sizes), windows(sizes)
    return Contestant(lambda: trainer.update(next(text)), _device_memory(), _device())


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"


def _device_memory():
    return torch.cuda.max_memory_allocated if DEVICE.type == "cuda" else None


def matrix_product(size: int, dtype: str) -> Contestant:
    """As ours: the better of the two is the machine's rate."""
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=DEVICE) for _ in range(2))

    def multiply() -> None:
        a @ b
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return Contestant(multiply)


def sampling(shape: dict, samples: int, length: int) -> Contestant:
    """`length` symbols of each of `samples` texts, at temperature 1, by the loop that one writes."""
    torch.set_float32_matmul_precision("highest")  # as ours samples: without TF32
    torch.backends.cudnn.allow_tf32 = False
    model = LanguageModel(Shape(**shape)).to(DEVICE).eval()

    @torch.inference_mode()
    def write() -> torch.Tensor:
        ids_1B, state, made = torch.zeros(1, samples, dtype=torch.int64, device=DEVICE), None, []
        for _ in range(length):
            logits_1BV, state = model(ids_1B, state)
            ids_1B = torch.multinomial(logits_1BV[0].softmax(1), 1).T
            made.append(ids_1B)
        return torch.cat(made).cpu()

    return Contestant(write, device=_device())


def reading(shape: dict, length: int) -> Contestant:
    """Reading all the weights once, `length` times: what one symbol after the other cannot do without."""
    model = LanguageModel(Shape(**shape)).to(DEVICE)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    def read() -> None:
        for _ in range(length):
            total = weights.sum()
        total.item()

    return Contestant(read, device=_device())
