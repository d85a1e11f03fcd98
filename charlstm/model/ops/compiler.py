"""Compiles with the options under which a result on a CPU has the same bits on any number of cores.

XLA divides what it can among threads, as many as it sees cores: operations on the elements of a large array, which then
may round otherwise than where they are whole; sums, whose parts are added up at the end (docs/decisions.md).  Its
options have it divide products alone, which are not cut within a sum.  They go with each program, not in the
environment, so that a notebook has the bits of `launch.train`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# Measured in docs/decisions.md.
OPTIONS = {
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",  # operations on elements are not divided
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",  # the one that divides has no sums
    "xla_cpu_prefer_vector_width": "512",  # bits, where the processor has them; by itself XLA takes 256
}


def options() -> dict[str, str]:
    """Those of OPTIONS that hold here: on a CPU, known to this jaxlib, and not set by the user in XLA_FLAGS."""
    if jax.default_backend() != "cpu":
        return {}
    own = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in known().items() if name not in own}


def jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`jax.jit(function, **settings)` with `options()`, which are asked for at the first call: this starts no backend.

    Within another program `function` is a part of that, whose options hold.
    """

    @functools.cache
    def compiled() -> Any:
        return jax.jit(function, compiler_options=options(), **settings)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call


@functools.cache
def known() -> dict[str, str]:
    """Those of OPTIONS that this jaxlib takes.  One that it does not know would fail every compilation."""
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
