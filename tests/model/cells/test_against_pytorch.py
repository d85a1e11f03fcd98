"""The cells against PyTorch's own layers, weights copied.  Skipped where PyTorch is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.model.cells import gru, lstm, rnn
from charlstm.model.ops.scan import recurrence
from charlstm.types import CellParams, CellState

torch = pytest.importorskip("torch")

T, B, D, H, L = 6, 3, 4, 5, 3


def copied(array) -> jax.Array:
    return jnp.asarray(array.detach().numpy())


def parameters(read) -> tuple[CellParams, ...]:
    """Ours from PyTorch's: `read` takes PyTorch's name; its matrices are `[gates, inputs]`, ours the transposes."""
    return tuple(
        CellParams(read(f"weight_ih_l{n}").T, read(f"weight_hh_l{n}").T, read(f"bias_ih_l{n}"), read(f"bias_hh_l{n}"))
        for n in range(L)
    )


@pytest.mark.parametrize(
    ("cell", "name", "options"),
    [(lstm, "LSTM", {}), (gru, "GRU", {}), (rnn, "RNN", {}), (rnn, "RNN", {"nonlinearity": "relu"})],
    ids=["lstm", "gru", "rnn", "rnn relu"],
)
def test_a_deep_network_equals_pytorchs_in_value_and_every_gradient(cell, name, options):
    torch.manual_seed(0)
    net = getattr(torch.nn, name)(D, H, num_layers=L, **options).double()
    variant = [options["nonlinearity"]] if options else []
    x = torch.randn(T, B, D, dtype=torch.float64, requires_grad=True)
    first = [torch.randn(L, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2 if cell is lstm else 1)]
    h, last = net(x, tuple(first) if cell is lstm else first[0])
    outputs = [h, *(last if cell is lstm else [last])]
    cotangents = [torch.randn_like(o) for o in outputs]
    torch.autograd.backward(outputs, cotangents)

    def run(params, states, x_TBD):
        finals, reset_TB = [], jnp.zeros((T, B), bool)
        for layer, state in zip(params, states, strict=True):
            z_TBG, b = jnp.einsum("tbd,dg->tbg", x_TBD, layer.w_x), cell.vectors(layer)
            final, x_TBD = recurrence(cell, layer.w_h, b, state, z_TBG, reset_TB, z_TBG.dtype, *variant)
            finals.append(final)
        return x_TBD, tuple(finals)

    def states(tensors):
        return tuple(CellState(*(copied(s[n]) for s in tensors), *([] if cell is lstm else [None])) for n in range(L))

    with jax.enable_x64(True):
        params = parameters(lambda name: copied(getattr(net, name)))
        got, pull = jax.vjp(run, params, states(first), copied(x))
        got_gradients = pull((copied(cotangents[0]), states(cotangents[1:])))
        expected = (copied(h), states(outputs[1:]))
        expected_gradients = (
            parameters(lambda name: copied(getattr(net, name).grad)),
            states([s.grad for s in first]),
            copied(x.grad),
        )
        for a, b in zip(
            jax.tree.leaves((got, got_gradients)), jax.tree.leaves((expected, expected_gradients)), strict=True
        ):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
