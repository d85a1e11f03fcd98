"""What a loop over bfloat16 costs on a CPU, seen in the compiled program."""

import re

import jax
import jax.numpy as jnp
import pytest

from charlstm.model.cells import rnn
from charlstm.model.ops.scan import recurrence
from tests.model.cells.test_cells import CELLS

pytestmark = pytest.mark.optimized

T, B, D, H = 12, 2, 3, 8


@CELLS
def test_one_symbol_is_written_without_converting_the_whole_window(cell):
    params = cell.init(jax.random.key(0), D, H, "pytorch", 0.1, 1.0)
    state, z_TBG = cell.zero_state(B, H), jnp.zeros((T, B, params.w_x.shape[1]), jnp.bfloat16)
    variant = "tanh" if cell is rnn else "plain"

    def total(w_h, z_TBG):
        resets_TB = jnp.zeros((T, B), bool)
        state_, h_TBH = recurrence(cell, w_h, cell.vectors(params), state, z_TBG, resets_TB, jnp.bfloat16, variant)
        return h_TBH.astype(jnp.float32).sum() + state_.h.sum()

    program = jax.jit(jax.grad(total, (0, 1))).lower(params.w_h, z_TBG).compile().as_text()
    assert "dynamic-update-slice" in program
    assert not re.search(r"bf16\[\d+,\d+,\d+\]\S* convert\(%dynamic.update.slice", program)
