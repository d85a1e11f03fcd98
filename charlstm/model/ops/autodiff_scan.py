"""The autodiff path: the loop over a window for steps without a hand-derived backward pass.

Autodiff of a loop over time adds to the gradient of a matrix W at every symbol: all its H times G sums are read and
written again.  Here autodiff runs through everything but the matrices.  The operand of each matmul with W comes out of
the loop, and so does the gradient of its result; the gradient of W is then one matmul after the loop,

    dW = Σ aᵀ dp                     p = a W, the sum over all symbols of all streams

as in the hand-derived backward passes.  Gradients of vectors (biases, gains) are summed in the loop: they are small.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from charlstm.model.ops.matmul import weight_gradient
from charlstm.types import CellState, Gates

# (parameters, constants of the window, the state before, the symbol's inputs) -> (the state after, its gates)
Step = Callable[[Any, Any, CellState, Any], tuple[CellState, Gates]]
Columns = tuple[int, int, int]  # the number of a matrix, its first column, the one after the last


def recurrence(
    step: Step, params: Any, constants: Any, state: CellState, inputs: Any, compute_dtype: jax.typing.DTypeLike
) -> tuple[CellState, jax.Array]:
    """Runs a window of every stream: the values and all gradients of `jax.lax.scan` of `step`.

    Args:
      step: uses a matrix of `params` only in `a @ matrix` or `a @ matrix[:, columns]`.
      params: a tree; all its arrays of two dimensions are matrices to `step`.
      constants: arrays that get no gradient.
      state: before the window; its dtype is that of the arithmetic and of the matmuls' sums.
      inputs: a tree of arrays `[T, ...]`.
      compute_dtype: of the matmuls' operands, and of the outputs.

    Returns:
      The state after the window, and h_TBH.
    """
    leaves, tree = jax.tree.flatten(params)
    which = [leaf.ndim == 2 for leaf in leaves]
    matrices = [leaf for leaf, is_matrix in zip(leaves, which, strict=True) if is_matrix]
    vectors = [leaf for leaf, is_matrix in zip(leaves, which, strict=True) if not is_matrix]

    def with_matmuls(matrices, vectors, constants, state, inputs):
        left, right = iter(matrices), iter(vectors)
        joined = jax.tree.unflatten(tree, [next(left if is_matrix else right) for is_matrix in which])
        return step(joined, constants, state, inputs)

    return _recurrence(with_matmuls, compute_dtype, matrices, vectors, constants, state, inputs)


def trace(
    step: Step, params: Any, state: CellState, inputs: Any, compute_dtype: jax.typing.DTypeLike
) -> tuple[CellState, tuple[CellState, Gates]]:
    """Runs a window with all that a step computes: (the state after it, (states, gates) `[T, B, H]`).

    Arguments as of `recurrence`, whose values it has; its gradients are those of plain autodiff.
    """
    leaves, tree = jax.tree.flatten(params)

    def forward(state: CellState, symbol: Any) -> tuple[CellState, tuple[CellState, Gates]]:
        matrices = iter(_Matmuls([leaf for leaf in leaves if leaf.ndim == 2], compute_dtype, {}).matrices)
        seen = [next(matrices) if leaf.ndim == 2 else leaf for leaf in leaves]
        state, gates = step(jax.tree.unflatten(tree, seen), None, state, symbol)
        return state, (state, gates)

    return jax.lax.scan(forward, state, inputs)


class _Matrix:
    """A matrix, or some of its columns, as the step sees it: its matmuls are recorded."""

    def __init__(self, matmuls: "_Matmuls", number: int, columns: slice) -> None:
        self.matmuls, self.number, self.columns = matmuls, number, columns

    def __getitem__(self, index: tuple[slice, slice]) -> "_Matrix":
        rows, columns = index
        assert rows == slice(None) and self.columns == slice(None), "columns of the whole matrix only"
        return _Matrix(self.matmuls, self.number, columns)

    def __rmatmul__(self, a_BK: jax.Array) -> jax.Array:
        return self.matmuls.matmul(a_BK, self.number, self.columns)


class _Matmuls:
    """Records the matmuls of one symbol, operands by columns, and adds to each result its entry of `zeros`.

    The gradient of a result is that of the zeros added to it.
    """

    def __init__(self, matrices: list[jax.Array], dtype: jax.typing.DTypeLike, zeros: dict[Columns, jax.Array]) -> None:
        self.weights, self.dtype, self.zeros = matrices, dtype, zeros
        self.matrices = [_Matrix(self, number, slice(None)) for number in range(len(matrices))]
        self.operands: dict[Columns, jax.Array] = {}

    def matmul(self, a_BK: jax.Array, number: int, columns: slice) -> jax.Array:
        w_KN = self.weights[number]
        start, stop, _ = columns.indices(w_KN.shape[1])
        place = number, start, stop
        assert place not in self.operands, "a matrix multiplies once a symbol"
        self.operands[place] = a_BK.astype(self.dtype)
        operand_KN = w_KN[:, columns].astype(self.dtype)
        p_BN = jnp.dot(self.operands[place], operand_KN, preferred_element_type=w_KN.dtype)
        return p_BN + self.zeros[place] if self.zeros else p_BN


def _scan(step, dtype, matrices, vectors, constants, state, inputs, zeros):
    """Returns ((the state after the window, h_TBH), the operands of all matmuls)."""

    def forward(state, symbol):
        inputs, zeros = symbol
        matmuls = _Matmuls(matrices, dtype, zeros)
        state, _ = step(matmuls.matrices, vectors, constants, state, inputs)
        return state, (state.h.astype(dtype), matmuls.operands)

    final, (h_TBH, operands) = jax.lax.scan(forward, state, (inputs, zeros))
    return (final, h_TBH), operands


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(step, dtype, matrices, vectors, constants, state, inputs):
    return _scan(step, dtype, matrices, vectors, constants, state, inputs, {})[0]


def _forward(step, dtype, matrices, vectors, constants, state, inputs):
    operands = jax.eval_shape(partial(_scan, step, dtype), matrices, vectors, constants, state, inputs, {})[1]
    zeros = {
        (number, start, stop): jnp.zeros((*a_TBK.shape[:2], stop - start), matrices[number].dtype)
        for (number, start, stop), a_TBK in operands.items()
    }

    def window(vectors, state, inputs, zeros):
        return _scan(step, dtype, matrices, vectors, constants, state, inputs, zeros)

    outputs, pull, operands = jax.vjp(window, vectors, state, inputs, zeros, has_aux=True)
    return outputs, (pull, operands, matrices)


def _backward(step, dtype, residuals, cotangents):
    pull, operands, matrices = residuals
    dvectors, dstate, dinputs, dresults = pull(cotangents)
    dmatrices = [jnp.zeros_like(w) for w in matrices]
    for (number, start, stop), a_TBK in operands.items():
        dw_KN = weight_gradient(a_TBK, dresults[number, start, stop], dtype, matrices[number].dtype)
        dmatrices[number] = dmatrices[number].at[:, start:stop].add(dw_KN)
    return dmatrices, dvectors, None, dstate, dinputs


_recurrence.defvjp(_forward, _backward)
