"""Two PyTorch scripts that train for given seconds, on a GPU where there is one.

    python -m benchmarks.peers.equal_time KIND TRAIN VALID FINAL SETTINGS

KIND is lstm (`torch.nn.LSTM` of given sizes, rates and batches) or transformer (nanoGPT's published settings for a CPU:
4 layers, 4 heads, 128 wide, blocks of 64, batch 12, no dropout).  Both print a line of JSON at each of some evaluations
of VALID, at equal distances in time since `began`, and at the end one of FINAL; rates fall as a cosine over the time.
Both compute in float32 (TF32 on a GPU), or as `torch.autocast` does in bfloat16.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BLOCK, WIDTH, HEADS, LAYERS, BATCH = 64, 128, 4, 4, 12
COLUMNS, LEAD = 16, 1024  # of the LSTM's evaluation: columns side by side, each after so many symbols that only warm up
LONG = 256  # symbols of a window there
PARTS = 8  # evaluations
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Lstm(nn.Module):
    """Logits of time-major ids [T, B]; with skip the softmax reads the sum of the layers.  The caller carries state."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        E, H, layers = (settings[name] for name in ("embedding_size", "hidden_size", "num_layers"))
        self.embedding, self.dropout = nn.Embedding(256, E), nn.Dropout(settings["output_dropout"])
        self.between, self.skip = nn.Dropout(settings["layer_dropout"]), settings["skip"]
        self.stack = nn.ModuleList(nn.LSTM(H if layer else E, H) for layer in range(layers))
        self.out = nn.Linear(H, 256)

    def forward(self, ids_TB: Tensor, state):
        x_TBD, outputs, after = self.embedding(ids_TB), [], []
        for layer, lstm in enumerate(self.stack):
            x_TBD, layer_state = lstm(self.between(x_TBD) if layer else x_TBD, state[layer] if state else None)
            outputs.append(x_TBD)
            after.append(layer_state)
        return self.out(self.dropout(sum(outputs[1:], outputs[0]) if self.skip else x_TBD)), after


class Transformer(nn.Module):
    """Logits [B, T, 256] of ids [B, T]: pre-norm blocks with causal attention, learned positions, tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(BLOCK, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        for weight in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(weight, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        T = ids_BT.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        h_BTE = self.symbols(ids_BT) + self.positions.weight[:T]
        return self.blocks(h_BTE, mask=mask, is_causal=True) @ self.symbols.weight.T


def lstm(train: np.ndarray, settings: dict) -> tuple[nn.Module, Callable, Callable, dict]:
    """Returns the model, loss() of its next window, bits(text), and its rates."""
    B, T = settings["batch_size"], settings["window"]
    model = Lstm(settings).to(DEVICE)
    stream = (len(train) - 1) // B
    columns_BN = torch.from_numpy(train[: stream * B].reshape(B, stream).astype(np.int64))
    state, start = None, 0

    def loss() -> Tensor:
        nonlocal state, start
        ids_TB = columns_BN[:, start : start + T + 1].T.to(DEVICE)
        logits, after = model(ids_TB[:-1], state)
        state, start = [tuple(s.detach() for s in layer) for layer in after], (start + T) % (stream - T - 1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids_TB[1:].flatten())

    def bits(valid: np.ndarray) -> float:
        height = (len(valid) - LEAD - 1) // COLUMNS
        rows = [valid[n * height : (n + 1) * height + LEAD + 1] for n in range(COLUMNS)]
        ids_NC, total, carried = torch.from_numpy(np.stack(rows, 1).astype(np.int64)).to(DEVICE), 0.0, None
        for at in range(0, len(ids_NC) - 1, LONG):
            window = ids_NC[at : at + LONG + 1]
            logits, carried = model(window[:-1], carried)
            nats = nn.functional.cross_entropy(logits.flatten(0, 1), window[1:].flatten(), reduction="none")
            total += nats.view(len(window) - 1, COLUMNS)[max(0, LEAD - at) :].sum().item()
        return total / (height * COLUMNS) / math.log(2)

    betas = (settings["beta1"], settings["beta2"])
    rates = {"rate": settings["learning_rate"], "last": settings["final_fraction"], "betas": betas, "decay": 0.0}
    return model, loss, bits, {**rates, "warmup": settings["warmup_steps"], "symbols": B * T}


def transformer(train: np.ndarray, settings: dict) -> tuple[nn.Module, Callable, Callable, dict]:
    """As `lstm`.  A symbol of the validation text is scored after at least half a block."""
    model, random = Transformer().to(DEVICE), np.random.default_rng(settings["seed"])

    def loss() -> Tensor:
        starts = random.integers(0, len(train) - BLOCK, BATCH)
        ids = torch.from_numpy(np.stack([train[s : s + BLOCK + 1] for s in starts]).astype(np.int64)).to(DEVICE)
        return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def bits(valid: np.ndarray) -> float:
        half, total, count = BLOCK // 2, 0.0, 0
        windows = np.lib.stride_tricks.sliding_window_view(valid, BLOCK + 1)[::half].astype(np.int64)
        for at in range(0, len(windows), 256):
            ids = torch.from_numpy(windows[at : at + 256]).to(DEVICE)
            logits = model(ids[:, :-1])[:, half:]
            total += nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, half + 1 :].flatten(), reduction="sum"
            ).item()
            count += ids.shape[0] * half
        return total / count / math.log(2)

    rates = {"rate": 1e-3, "last": 0.1, "betas": (0.9, 0.99), "decay": 0.1}
    return model, loss, bits, {**rates, "warmup": 100, "symbols": BATCH * BLOCK}


def main(kind: str, paths: list[str], settings: dict) -> None:
    torch.manual_seed(settings["seed"])
    if DEVICE == "cuda":  # as ours: TF32 where it is not bfloat16
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    train, valid, final = (np.fromfile(Path(path), np.uint8) for path in paths)
    model, loss, bits, how = (lstm if kind == "lstm" else transformer)(train, settings)
    optimizer = torch.optim.AdamW(model.parameters(), how["rate"], how["betas"], weight_decay=how["decay"])
    bfloat16 = settings["compute_dtype"] == "bfloat16"
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16)
    # On a GPU autocast has an LSTM in float16, whatever it is asked for, where the gradient of a mean would be lost.
    scaler = torch.amp.GradScaler(DEVICE, enabled=bfloat16 and DEVICE == "cuda")
    step, evaluated, seconds = 0, 0, settings["seconds"]
    while evaluated < PARTS:
        done = (time.time() - settings["began"]) / seconds
        step += 1
        fraction = how["last"] + (1 - how["last"]) * (1 + math.cos(math.pi * min(1.0, done))) / 2
        optimizer.param_groups[0]["lr"] = how["rate"] * fraction * min(1.0, step / how["warmup"])
        with half:
            value = loss()
        update(model, optimizer, scaler, value)
        if (time.time() - settings["began"]) / seconds >= (evaluated + 1) / PARTS:
            evaluated = min(PARTS, int((time.time() - settings["began"]) / seconds * PARTS))
            score = scored(model, bits, valid)
            print(json.dumps({"step": step, "seconds": time.time() - settings["began"], "bits": score}), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    last = score if len(final) == len(valid) else scored(model, bits, final)
    print(json.dumps({"final": last, "symbols": step * how["symbols"], "parameters": parameters}))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, value: Tensor) -> None:
    """Makes an update of the loss `value`, whose gradient is clipped."""
    optimizer.zero_grad()
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def scored(model: nn.Module, bits: Callable, text: np.ndarray) -> float:
    """Returns bits per byte of a text, without dropout, in float32."""
    model.eval()
    with torch.inference_mode():
        score = bits(text)
    model.train()
    return score


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:5], json.loads(sys.argv[5]))
