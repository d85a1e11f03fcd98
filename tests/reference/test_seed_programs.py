"""The two seed programs: gradients by hand against differences and autodiff, and what they do when run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.reference import min_char_rnn, numpy_lstm

FOLDER = Path(min_char_rnn.__file__).parent
PROGRAMS = ("min_char_rnn", "numpy_lstm")
V, H, B, T = 6, 5, 3, 7


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{program}.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        timeout=300,
    )


def losses(output: str) -> list[float]:
    return [float(bits) for bits in re.findall(r"^step \d+  (\S+) bits per character$", output, re.MULTILINE)]


def assert_gradients_match_differences(loss, params: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
    assert gradients.keys() == params.keys()
    for name, p in params.items():
        differences = np.zeros_like(p)
        for index in np.ndindex(p.shape):
            kept = p[index]
            ends = []
            for offset in (-1e-5, 1e-5):
                p[index] = kept + offset
                ends.append(loss())
            p[index] = kept
            differences[index] = (ends[1] - ends[0]) / 2e-5
        np.testing.assert_allclose(gradients[name], differences, rtol=1e-6, atol=1e-8, err_msg=name)
        assert np.abs(differences).max() > 1e-4, f"{name} has no gradient to compare"


def test_gradients_of_the_plain_network_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    params = {name: p + rng.normal(size=p.shape) for name, p in min_char_rnn.initialize(rng, V, H).items()}
    x_T, y_T = np.array([0, 1, 1, 5, 2, 1]), np.array([1, 1, 5, 2, 1, 0])
    h_H = rng.normal(size=H)
    _, gradients, _ = min_char_rnn.loss_and_gradients(params, x_T, y_T, h_H)
    assert_gradients_match_differences(
        lambda: min_char_rnn.loss_and_gradients(params, x_T, y_T, h_H)[0], params, gradients
    )


def lstm_problem():
    rng = np.random.default_rng(1)
    lstm = numpy_lstm.Lstm(rng, V, H)
    for weight in lstm.weights.values():
        weight += 0.5 * rng.normal(size=weight.shape)
    x_TB, y_TB = rng.integers(V, size=(2, T, B))
    return lstm, x_TB, y_TB, (rng.normal(size=(B, H)), rng.normal(size=(B, H)))


def test_gradients_of_the_lstm_are_those_of_finite_differences():
    lstm, x_TB, y_TB, state = lstm_problem()
    gradients = lstm.backward(y_TB, lstm.forward(x_TB, state)[2])
    assert_gradients_match_differences(
        lambda: numpy_lstm.mean_loss(lstm.forward(x_TB, state)[0], y_TB), lstm.weights, gradients
    )


def textbook_loss(w, x_TB, y_TB, state):
    """The LSTM again, one symbol and one gate at a time, for autodiff."""
    (h, c), total = state, 0.0
    for x_B, y_B in zip(x_TB, y_TB, strict=True):
        a = jax.nn.one_hot(x_B, V, dtype=jnp.float64) @ w["w_x"] + h @ w["w_h"] + w["b"][None]
        a_i, a_f, a_g, a_o = jnp.split(a, 4, axis=1)
        c = jax.nn.sigmoid(a_f) * c + jax.nn.sigmoid(a_i) * jnp.tanh(a_g)
        h = jax.nn.sigmoid(a_o) * jnp.tanh(c)
        log_p = jax.nn.log_softmax(h @ w["w_out"] + w["b_out"][None])
        total -= jnp.take_along_axis(log_p, y_B[:, None], axis=1).sum()
    return total / y_TB.size, (h, c)


def test_the_lstm_and_its_gradients_equal_autodiff_of_the_textbook_equations():
    lstm, x_TB, y_TB, state = lstm_problem()
    p_TBV, next_state, tape = lstm.forward(x_TB, state)
    gradients = lstm.backward(y_TB, tape)
    with jax.enable_x64(True):
        (expected_loss, expected_state), expected = jax.jit(jax.value_and_grad(textbook_loss, has_aux=True))(
            jax.tree.map(jnp.asarray, lstm.weights), x_TB, y_TB, jax.tree.map(jnp.asarray, state)
        )
    np.testing.assert_allclose(numpy_lstm.mean_loss(p_TBV, y_TB), expected_loss, rtol=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-10, atol=1e-13, err_msg=name)
    for ours, theirs in zip(next_state, expected_state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_long_window_of_the_lstm_equals_short_ones_with_carried_state():
    lstm, x_TB, _, state = lstm_problem()
    whole_TBV, last, _ = lstm.forward(x_TB, state)
    first_TBV, middle, _ = lstm.forward(x_TB[:3], state)
    second_TBV, end, _ = lstm.forward(x_TB[3:], middle)
    np.testing.assert_allclose(whole_TBV, np.concatenate([first_TBV, second_TBV]), rtol=1e-12)
    for a, b in zip(last, end, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize(
    "program, options",
    [
        ("min_char_rnn", ["--num_steps=800", "--hidden_size=32"]),
        ("numpy_lstm", ["--num_steps=300", "--hidden_size=24", "--batch_size=4", "--window=20"]),
    ],
)
def test_the_loss_of_a_periodic_text_falls_to_nothing_and_the_sample_repeats_it(program, options, tmp_path):
    text = tmp_path / "periodic.txt"
    text.write_text("the cat sat. " * 300, encoding="utf-8")
    first, again, other = (run(program, f"--corpus={text}", f"--seed={seed}", *options) for seed in (0, 0, 1))
    assert first.returncode == 0, first.stderr
    bits = losses(first.stdout)
    assert len(bits) == 10
    assert bits[0] > 0.3 and bits[-1] < 0.05, bits
    assert "the cat sat. the cat sat." in first.stdout
    assert first.stdout == again.stdout, "the same seed is the same run"
    assert losses(other.stdout) != bits, "the seed has no effect"


@pytest.mark.parametrize("program, steps", [("min_char_rnn", 1500), ("numpy_lstm", 150)])
def test_without_a_corpus_a_program_learns_its_own_text(program, steps):
    done = run(program, f"--num_steps={steps}")
    assert done.returncode == 0, done.stderr
    bits = losses(done.stdout)
    assert len(bits) == 10 and bits[-1] < bits[0] - 0.5, bits


def test_check_compares_gradients_and_says_how_well():
    done = run("numpy_lstm", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"worst error of a gradient: (\S+)", done.stdout)[1]) < 1e-7


def test_check_fails_on_a_wrong_gradient(monkeypatch, capsys):
    right = numpy_lstm.Lstm.backward

    def wrong(self, y_TB, tape):
        gradients = right(self, y_TB, tape)
        return gradients | {"w_h": gradients["w_h"] * 1.001}

    monkeypatch.setattr(numpy_lstm.Lstm, "backward", wrong)
    assert numpy_lstm.main(["--check"]) == 1
    assert "worst error of a gradient" in capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistake_is_told_without_a_traceback(program, tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("abc", encoding="utf-8")
    binary.write_bytes(b"\xff" * 1000)
    for arguments, complaint in (
        (["--corpus=no_such_file.txt"], "no_such_file.txt"),
        ([f"--corpus={short}"], "has 3 characters"),
        ([f"--corpus={binary}"], "can't decode byte 0xff"),
        (["--hidden_size=0"], "must be 1 or more"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr
