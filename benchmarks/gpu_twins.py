"""The LSTM's backends beside float64: values and gradients of a window, as `benchmarks.gpu` asks for them.

    JAX_ENABLE_X64=1 JAX_PLATFORMS=cpu python -m benchmarks.gpu_twins reference FILE.npz
    python -m benchmarks.gpu_twins compare FILE.npz
    python -m benchmarks.gpu_twins machine      # where JAX runs, and which backends there are there

The reference is the textbook step, symbol by symbol, under autodiff.  An error is the norm of the difference over the
norm of the reference; of gradients by gate (W_h, b and z), the largest over the gates.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.distributed import describe, has_mosaic, make
from charlstm.model.cells import lstm
from charlstm.model.ops import lstm_pallas, scan
from charlstm.types import CellParams, CellState

T, B, H = 48, 32, 256
CASES = [("plain", False), ("plain", True), ("capped", True)]  # variant, with a mask
FORGET_BIASES = (1, 5, 7)
PRECISIONS = {"float32": ("float32", "highest"), "TF32": ("float32", "default"), "bfloat16": ("bfloat16", "default")}
# Of a value, and of a gradient.  Near the cap either gradient is right, and rounding chooses: there none is asked.
# In float32 a gradient's is that of a forget gate near 1, of bias 7: what is left to 1 is 9e-4, of which an ulp of the
# gate is 7e-5, and a GPU's tanh is a quotient that is 2 ulp off (div.full.f32).
LIMITS = {"float32": (2e-6, 2e-4), "TF32": (2e-3, 1e-2), "bfloat16": (1e-2, 3e-2)}


def given(masked: bool, forget_bias: int) -> dict[str, Any]:
    """Everything that a window is computed from, in float64; all numbers are bfloat16's, so none is rounded before."""
    random = np.random.default_rng(forget_bias)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(jnp.bfloat16).astype(np.float64)

    bias = draw(4 * H) / 4
    bias[H : 2 * H] += forget_bias
    arrays = {"w_h": draw(H, 4 * H) / 16, "b": bias, "h": draw(B, H) / 4, "c": draw(B, H), "z": draw(T, B, 4 * H)}
    arrays |= {"reset": random.random((T, B)) < 0.02, "by_h": draw(T, B, H), "by_c": draw(B, H)}
    return arrays | ({"mask": random.integers(0, 2, (B, H)) * 2.0} if masked else {})


def values_and_gradients(window: Any, dtype: Any, z_dtype: Any) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    """Returns a function of the arrays, which is compiled once.

    It gives h of every symbol, and the gradients by W_h, b, the state and z of a sum that all of it enters.
    """

    def loss(w_h: jax.Array, b: jax.Array, state: CellState, z: jax.Array, kept: Any) -> tuple[jax.Array, jax.Array]:
        final, h = window(w_h, b, state, z, kept["reset"], kept.get("mask"))
        h = h.astype(dtype)
        return (h * kept["by_h"]).sum() + (final.h**3).sum() + (final.c * kept["by_c"]).sum(), h

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))

    def run(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
        kept = {name: jnp.asarray(array, bool if name == "reset" else dtype) for name, array in arrays.items()}
        w_h, b, h, c, z = (kept.pop(name) for name in ("w_h", "b", "h", "c", "z"))
        (_, h), (w_h, b, state, z) = program(w_h, b, CellState(h, c), z.astype(z_dtype), kept)
        named = {"value": h, "w_h": w_h, "b": b, "h": state.h, "c": state.c, "z": z}
        return {name: np.asarray(array, np.float64) for name, array in named.items()}

    return run


def textbook_window(variant: str) -> Any:
    def window(w_h, b, state, z, reset, mask):
        def read(state: CellState, symbol: tuple[jax.Array, jax.Array]) -> tuple[CellState, jax.Array]:
            z_BG, reset_B = symbol
            state = jax.tree.map(lambda s: jnp.where(reset_B[:, None], 0, s), state)
            state, _ = lstm.step_projected(params, state, z_BG, variant, mask)
            return state, state.h

        params = CellParams(w_x=z[0, :0], w_h=w_h, b_x=b, b_h=jnp.zeros_like(b))
        return jax.lax.scan(read, state, (z, reset))

    return window


def reference(path: str) -> None:
    found: dict[str, Any] = {}
    for variant, masked in CASES:
        run = values_and_gradients(textbook_window(variant), jnp.float64, jnp.float64)
        for bias in FORGET_BIASES:
            found |= {f"{variant} {masked} {bias} {name}": a for name, a in run(given(masked, bias)).items()}
    np.savez(path, **found)


def compare(path: str) -> None:
    expected = np.load(path)
    for (backend, recurrence), precision, case in itertools.product(backends().items(), PRECISIONS, CASES):
        (compute, products), (variant, masked) = PRECISIONS[precision], case

        def window(*args, recurrence=recurrence, compute=compute, variant=variant):
            *arrays, mask = args
            return recurrence(*arrays, jnp.dtype(compute), variant, mask)

        run = values_and_gradients(window, jnp.float32, compute)
        for bias in FORGET_BIASES:
            with jax.default_matmul_precision(products) if products != "default" else contextlib.nullcontext():
                got = run(given(masked, bias))
            errors = {name: error(name, got[name], expected[f"{variant} {masked} {bias} {name}"]) for name in got}
            value, gradient = errors.pop("value"), max(errors.values())
            most = LIMITS[precision]
            exempt = variant == "capped" and precision != "float32"
            row = {"backend": backend, "precision": precision, "variant": variant, "masked": masked}
            row |= {"forget_bias": bias, "value_error": value, "gradient_error": gradient}
            row |= {"worst": max(errors, key=lambda name: errors[name])}
            print(json.dumps(row | {"ok": bool(value <= most[0] and (exempt or gradient <= most[1]))}), flush=True)


def error(name: str, got: np.ndarray, expected: np.ndarray) -> float:
    pairs = zip(*(np.split(a, 4, -1) if name in ("w_h", "b", "z") else [a] for a in (got, expected)), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def backends() -> dict[str, Any]:
    return {"scan": partial(scan.recurrence, lstm)} | ({"fused": lstm_pallas.recurrence} if has_mosaic(make()) else {})


def machine() -> None:
    mesh = make()
    print(json.dumps({
        "platform": mesh.devices.flat[0].platform, "device": describe(mesh), "jax": jax.__version__,
        "backends": ", ".join(backends()),
    }))  # fmt: skip


if __name__ == "__main__":
    commands: dict[str, Any] = {"reference": reference, "compare": compare, "machine": machine}
    commands[sys.argv[1]](*sys.argv[2:])
