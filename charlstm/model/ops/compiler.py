"""Compiles with the options under which a result on a CPU has the same bits on any number of cores.

XLA divides work among as many threads as it sees cores: elementwise operations on a large array, which may then round
differently; sums, whose parts are added up at the end (docs/decisions.md).  With these options it divides only matmuls,
and not within a sum.  They go with each program, not in the environment: a notebook has the bits of `launch.train`.

A GPU has matrix units that round float32 operands to TF32, and JAX lets them.  `jit` does not: what is scored, sampled
or looked into is of the precision that it says.  The training step chooses for itself (--tf32).
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# Measured in docs/decisions.md.
OPTIONS = {
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",  # elementwise operations are not divided
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",  # the one that divides has no sums
    "xla_cpu_prefer_vector_width": "512",  # bits, if the processor has them; XLA's default is 256
}


def options() -> dict[str, str]:
    """Returns the OPTIONS in force: on a CPU, known to this jaxlib, and not set by the user in XLA_FLAGS."""
    if jax.default_backend() != "cpu":
        return {}
    own = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in known().items() if name not in own}


def jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Returns `jax.jit(function, **settings)` with full float32 products and `options()`.

    These are read at the first call: this starts no backend.  Inside another jitted function it is traced into that
    one, whose options and precision apply.
    """

    @functools.cache
    def compiled() -> Any:
        return jax.jit(in_full_precision(function), compiler_options=options(), **settings)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with full float32 products, also on a device that has TF32, where it is traced."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return call


@functools.cache
def known() -> dict[str, str]:
    """Returns the OPTIONS that this jaxlib accepts.  An unknown one would fail every compilation."""
    if _is_taken(OPTIONS):
        return OPTIONS
    return {name: value for name, value in OPTIONS.items() if _is_taken({name: value})}


def _is_taken(some: dict[str, str]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=some).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True
