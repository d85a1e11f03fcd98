"""A text read and written in turns beside the same text in one go."""

import jax
import numpy as np
import pytest

from charlstm.inference.continuation import SYMBOLS, Continuation, distributions
from charlstm.inference.generate import Beginning, generate, reading
from charlstm.inference.sampling import Sampling
from tests.inference.test_generate import CONFIG, PROMPT, full_pass, make_params

HOW = Sampling(0.9, 6, 0.95)


def in_one_go(prompt, length, seed=7, separator=()):
    made = list(generate(CONFIG, make_params(), prompt, HOW, rows=1, length=length, seed=seed, separator=separator))
    return [np.concatenate([chunk[i] for chunk in made], axis=1)[0].tolist() for i in (0, 1)]


def written(text, *turns):
    made = [text.write(HOW, most) for most in turns]
    return [np.concatenate([chunk[i] for chunk in made], axis=1)[0].tolist() for i in (0, 1)]


@pytest.mark.parametrize("separator", [pytest.param((), marks=pytest.mark.long), (3, 5)], ids=str)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:0], PROMPT[:1]], ids=len)
def test_turns_of_any_length_make_the_text_of_one_go(prompt, separator):
    text = Continuation(CONFIG, make_params(), separator=separator)
    text.reset(7)
    text.read(prompt)
    assert written(text, 16, 1, 15, 16, 7, 2, 13) == in_one_go(prompt, 70, separator=separator)


def test_a_new_seed_draws_anew_and_a_reset_forgets():
    text = Continuation(CONFIG, make_params())
    text.read(PROMPT)
    written(text, SYMBOLS)
    text.reset(8)
    text.read(PROMPT)
    assert written(text, 16, 16) == in_one_go(PROMPT, 32, seed=8)
    text.reset(0)
    text.read(PROMPT)
    text.reseed(8)
    assert written(text, 16) == in_one_go(PROMPT, 16, seed=8)


@pytest.mark.parametrize("separator", [(), (9, 2)], ids=str)
def test_what_is_read_in_parts_is_what_is_read_at_once(separator):
    text = Continuation(CONFIG, make_params(), separator=separator)
    for part in (PROMPT[:4], PROMPT[4:5], PROMPT[5:5], PROMPT[5:]):
        text.read(part)
    expected = full_pass(PROMPT[None], separator=separator)[0]
    np.testing.assert_allclose(text.next_log_probabilities(), expected[-1], rtol=1e-4, atol=1e-5)
    found = np.concatenate(list(distributions(CONFIG, make_params(), PROMPT, separator, window=4)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    *_, after = reading(CONFIG, make_params(), PROMPT[:6], separator)
    found = np.concatenate(list(distributions(CONFIG, make_params(), PROMPT[6:], separator, after, window=4)))
    np.testing.assert_allclose(found, expected[5:], rtol=1e-4, atol=1e-5)


def test_reading_from_a_state_does_not_depend_on_the_window():
    *_, after = reading(CONFIG, make_params(), PROMPT[:6], (9, 2))
    *_, whole = reading(CONFIG, make_params(), PROMPT, (9, 2))
    for window in (1, 4, 128):
        *_, found = reading(CONFIG, make_params(), PROMPT[6:], (9, 2), Beginning(*after), window)
        np.testing.assert_array_equal(found.last_K, whole.last_K)
        for got, expected in zip(jax.tree.leaves(found.state), jax.tree.leaves(whole.state), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
