"""The sentiment neuron on a small scale: a unit that knows the mood of a text, and what holding it does."""

import numpy as np
import pytest

import charlstm as cl
from charlstm import config as config_lib
from charlstm.api import Model
from tests.inspect.conftest import PLANTED, planted, text_of

NOUNS = ["tea", "bed", "bar", "sea"]
MOODS = {True: ["good", "warm", "kind", "fine"], False: ["poor", "cold", "rude", "dull"]}


def review(random: np.random.Generator, is_content: bool, things: int) -> str:
    """Things and what is said of them, in one of two moods."""
    return ", ".join(f"{random.choice(MOODS[is_content])} {random.choice(NOUNS)}" for _ in range(things))


def content_share(text: str) -> float:
    """The part of the words of a mood that are content."""
    content, other = (sum(map(text.count, MOODS[mood])) for mood in (True, False))
    return content / max(1, content + other)


def test_labeled_texts_have_a_probe_and_each_class_its_part_in_all_thirds():
    pytest.importorskip("sklearn", reason="extra inspect is not installed")
    texts = [text_of(9, seed) + "“ab”"[: 2 + seed % 3] for seed in range(45)]  # a third of them ends after the quotes
    labels = [not text.endswith("”") for text in texts]
    found = cl.inspect.probe_texts(planted(), texts, labels)
    assert found.accuracy == found.auc == 1 and found.weights[0][0] == (1, "c", PLANTED)
    assert [str(unit) for unit, weight in found.weights if weight > 0][:1] == [f"1.c:{PLANTED}"]
    for names in ((-1, 1), (1, 2), ("neg", "pos")):
        assert cl.inspect.probe_texts(planted(), texts, [names[is_on] for is_on in labels]) == found
    for bad, of, sentence in (
        (["ab", ""], [True, False], "is empty"),
        (["ab", "cd"], [True, False], "three texts of each label, and False has 1: give more texts"),
        (texts, labels[:40], "45 texts and 40 labels"),
        (texts, [0, 1, 2] * 15, "3 different values: give two"),
        (texts, [True] * 45, "1 different values: give two"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cl.inspect.probe_texts(planted(), bad, of)


def test_the_state_of_a_text_is_that_after_its_last_symbol_in_the_order_of_reading():
    pytest.importorskip("sklearn", reason="extra inspect is not installed")
    forward = planted()
    backward = Model(config_lib.replace(forward.config, reverse=True), forward.vocabulary, forward.params, 7)
    texts = ["“”ab"[seed % 2 :: 2] + text_of(9, seed) for seed in range(45)]  # a quote opens or closes before words
    labels = [text.startswith("“") for text in texts]
    assert cl.inspect.probe_texts(backward, texts, labels).accuracy == 1


@pytest.mark.long
def test_the_unit_that_a_probe_finds_decides_in_which_mood_a_text_goes_on(tmp_path):
    pytest.importorskip("sklearn", reason="extra inspect is not installed")
    random = np.random.default_rng(0)
    text = "".join(review(random, random.random() < 0.5, 6) + ".\n" for _ in range(3000))
    corpus = cl.load_corpus(
        text,
        vocabulary="characters",
        document_separator=r"\n",
        valid_fraction=0.02,
        test_fraction=0,
        cache_dir=tmp_path,
    )
    config = cl.Config(
        hidden_size=32, num_layers=1, batch_size=16, window=48, optimizer="adam", learning_rate=1e-2, schedule="cosine",
        warmup_steps=20, clip_norm=1.0, num_steps=1000, evaluate_every=0, checkpoint_every=0, sample_every=0,
    )  # fmt: skip
    model = cl.train(config, corpus, tmp_path / "run")

    labels = np.arange(120) % 2 == 0
    texts = [review(random, is_content, 3) + ", " for is_content in labels.tolist()]
    found = cl.inspect.probe_texts(model, texts, labels)
    assert found.accuracy > 0.95 and found.auc > 0.98

    # Held twice as far from the middle as it is after texts of a class, with the same noise for each of the samples.
    unit = found.weights[0][0]
    states = np.array([model.trace(text, [unit.name])[unit.name][-1, unit.number] for text in texts])
    content, other = states[labels].mean(), states[~labels].mean()
    how = {"length": 80, "num_samples": 40, "seed": 0, "temperature": 0.8}
    free = [content_share(text) for text in model.sample("", **how)]
    held = [
        [content_share(text) for text in model.sample("", **how, clamp={unit: value})]
        for value in (2 * content - other, 2 * other - content)
    ]
    assert 0.2 < np.mean(np.array(free) > 0.5) < 0.8
    assert np.mean(np.array(held[0]) > 0.5) > 0.9 and np.mean(np.array(held[1]) < 0.5) > 0.9
