"""The slow twin of every cell: its step, one symbol after the other, differentiated by JAX.

What `ops.scan.recurrence` must equal, in value and in every gradient.
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from charlstm.types import CellParams, CellState


def unroll(
    cell: ModuleType, params: CellParams, state: CellState, x_TBD: jax.Array, reset_TB: jax.Array
) -> tuple[CellState, jax.Array]:
    """A window of every stream: (the state after it, h_TBH).

    Args:
      cell: one of the modules of `charlstm.model.cells`.
      state: before the window.
      reset_TB: bool; where True, the stream's state is zero before the symbol is read.
    """

    def read(state, symbol):
        x_BD, reset_B = symbol
        state = jax.tree.map(lambda s_BH: jnp.where(reset_B[:, None], 0, s_BH), state)
        state, _ = cell.step_projected(params, state, x_BD @ params.w_x)
        return state, state.h

    return jax.lax.scan(read, state, (x_TBD, reset_TB))
