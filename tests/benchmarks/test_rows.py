"""What a benchmark makes of its measurements."""

import json

import jax
import pytest

from benchmarks import rows
from benchmarks.peers.ours import config_of
from benchmarks.shapes import SHAPES, Shape
from charlstm.training import train_state


def test_contestants_take_turns_within_a_round():
    turns = []
    timed = {name: lambda name=name: turns.append(name) or len(turns) for name in "AB"}
    assert rows.alternate(timed, 3) == {"A": [1, 3, 5], "B": [2, 4, 6]}
    assert "".join(turns) == "ABABAB"


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians():
    # The machine was slower in every second round, for both of them.
    ours, theirs = [1.0, 10.0, 1.0, 10.0, 1.0], [2.0, 20.0, 2.0, 30.0, 4.0]
    assert rows.ratios(ours, theirs) == (2.0, (2.0, 3.0))


def test_rows_with_the_same_fields_share_a_table(capsys):
    table = rows.Rows("any")
    table.add(size=1, speed=1234.5)
    table.add(size=2, speed=None)
    table.add(other=[1.5, 2.5], bits=1.8141)
    assert [json.loads(line)["benchmark"] for line in capsys.readouterr().out.splitlines()] == ["any"] * 3
    table.tables()
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first.splitlines()[0] == "| size | speed | load |"
    assert first.splitlines()[2].startswith("| 1 | 1,234 |") and first.splitlines()[3].startswith("| 2 |  |")
    assert "| 1.5 to 2.5 | 1.814 |" in second


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_shape_knows_its_parameters(cell):
    shape = Shape(11, 3, 5, 3, 2, 4, cell=cell)
    params = jax.eval_shape(lambda: train_state.init(config_of(shape), shape.V)).params
    assert shape.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_products_of_a_step_are_counted():
    # Of one layer of one unit: 4 gates from 1 input and 1 hidden unit, and 1 logit; times 2 for multiply and add, times
    # 3 for forward, reverse to the input and reverse to the weights.
    assert Shape(1, 1, 1, 1, 1, 1).flops == 6 * (4 * 2 + 1)
    assert SHAPES[1].flops == 3 * 2 * 64 * 128 * (4 * 512 * (128 + 512) + 4 * 512 * 1024 + 512 * 256)
