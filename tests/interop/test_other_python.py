"""The environment of `make interop` is one of others: none of what this project brings is in it."""

import pytest

from tests.interop.conftest import run

pytestmark = pytest.mark.interop


def test_the_other_interpreter_has_pytorch_and_neither_jax_nor_this_project(other_python, tmp_path):
    found = "import importlib.util as u; print(*(u.find_spec(name) is not None for name in %r))"
    assert run(other_python, "-c", found % ["torch", "safetensors", "jax", "charlstm"], cwd=tmp_path).split() == [
        *("True", "True", "False", "False"),
    ]
