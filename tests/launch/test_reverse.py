"""A backward run is the forward run of the flipped text, in training, scoring and sampling, and is told apart."""

import json
from pathlib import Path

import numpy as np
import pytest

import charlstm as cl
from charlstm.inspect import inspection, units
from launch import evaluate, inspect, sample, train
from launch.support import cli
from tests.launch.conftest import SMALL, TINY, refusal

SPLITS = ("train", "valid", "test")
LONG = (
    *("--vocabulary=characters", "--reset_state=document", "--num_steps=20", "--evaluate_every=10"),
    *("--sample_every=10", "--sample_length=30"),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Three texts of documents that end with "<>", and the same from their ends, whose documents end with "><"."""
    path, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, documents in zip(SPLITS, (150, 40, 40), strict=True):
        words = ["".join(random.choice(list("abcdefgh "), random.integers(5, 60))) for _ in range(documents)]
        text = "".join(word + "<>" for word in words)
        (path / f"{name}.txt").write_text(text)
        (path / f"{name}.flipped").write_text(text[::-1])
    return path


@pytest.fixture(scope="module")
def ran(texts):
    """Trains on the texts with an ending; gives the run's directory."""

    def run(name: str, ending: str, *flags: str) -> Path:
        where = [f"--{split}={texts / f'{split}.{ending}'}" for split in SPLITS]
        common = (TINY, *SMALL, *LONG, "--corpus=", f"--cache_dir={texts / 'cache'}", f"--run_dir={texts / name}")
        assert train.main(["train", *common, *where, *flags]) == cli.DONE
        return texts / name

    return run


@pytest.fixture(scope="module")
def runs(ran) -> tuple[Path, Path]:
    return (
        ran("backward", "txt", "--reverse", "--document_separator=<>", "--sample_prompt=he"),
        ran("forward", "flipped", "--document_separator=><", "--sample_prompt=eh"),
    )


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def printed(main, capsys, *flags: str) -> str:
    assert main(["program", *flags]) == cli.DONE
    return capsys.readouterr().out


def test_training_and_validation_have_the_bits_of_the_flipped_text(runs):
    (backward, forward) = map(records, runs)
    assert backward[-1]["state_digest"] == forward[-1]["state_digest"]
    for one, other in zip(backward, forward, strict=True):
        assert one.get("bits_per_symbol") == other.get("bits_per_symbol")
    samples = [records(run, "samples.jsonl") for run in runs]
    for one, other in zip(*samples, strict=True):
        assert one["prompt"] == "" and one["text"] == (other["prompt"] + other["text"])[::-1]
        assert one["text"].endswith("he") and one["bits_per_symbol"] == other["bits_per_symbol"]
    assert "the text is read backward" in (runs[0] / "log.txt").read_text()
    assert "does not occur" not in (runs[0] / "log.txt").read_text()


@pytest.mark.long
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped_and_never_turns_around(ran, runs):
    flags = "--reverse", "--document_separator=<>", "--sample_prompt=he"
    for steps in (10, 20):
        cut = ran("cut", "txt", *flags, f"--num_steps={steps}")
    assert records(cut)[-1]["state_digest"] == records(runs[0])[-1]["state_digest"]
    with pytest.raises(ValueError, match=r"was started with other settings \(reverse: True -> False\): give its own"):
        ran("cut", "txt", "--noreverse", "--document_separator=<>", "--sample_prompt=he")


def test_a_run_that_starts_from_the_parameters_of_the_other_direction_says_so(ran, runs):
    run = ran("taken", "txt", "--document_separator=<>", f"--initial_checkpoint={runs[0]}", "--num_steps=1")
    assert f"{runs[0]} reads the text backward, this run does not" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    "flags", [("--format=json",), pytest.param(("--format=json", "--dynamic"), marks=pytest.mark.long)]
)
def test_the_scores_are_those_of_the_flipped_text(runs, capsys, flags):
    one, other = (json.loads(printed(evaluate.main, capsys, f"--run_dir={run}", *flags)) for run in runs)
    assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_sample_is_printed_from_left_to_right_and_ends_with_the_prompt(runs, capsys):
    flags = "--length=50", "--num_samples=2", "--seed=3"
    one = printed(sample.main, capsys, f"--run_dir={runs[0]}", "--prompt=abcd", "--stop=gg", *flags)
    other = printed(sample.main, capsys, f"--run_dir={runs[1]}", "--prompt=dcba", "--stop=gg", *flags)
    mark = "\n\n--- sample 2 of 2 ---\n"
    assert [text.rstrip("\n")[::-1] for text in one.split(mark)] == other.rstrip("\n").split(mark)
    assert all(text.rstrip("\n").endswith("abcd") and len(text) > 5 for text in one.split(mark))
    objects = [
        json.loads(printed(sample.main, capsys, f"--run_dir={run}", f"--prompt={prompt}", "--format=json"))
        for run, prompt in zip(runs, ("abcd", "dcba"), strict=True)
    ]
    assert objects[0]["text"] == objects[1]["text"][::-1] and objects[0]["prompt"] == "abcd"
    assert objects[0]["symbols"] == objects[1]["symbols"][::-1] and objects[0]["logprob"] == objects[1]["logprob"]
    assert "".join(one["symbol"] for one in objects[0]["symbols"]) == objects[0]["text"]


def test_the_library_takes_and_gives_all_in_the_order_of_the_text(runs, texts):
    backward, forward = map(cl.load, runs)
    text = "a cab<>he fed a bag<>a"
    np.testing.assert_array_equal(backward.bits(text), forward.bits(text[::-1])[::-1])
    assert backward.bits(text)[-1] == np.float32(np.log2(backward.vocabulary.size)) != backward.bits(text)[0]
    for ours, theirs in zip(backward.states(text)[0], forward.states(text[::-1])[0], strict=True):
        np.testing.assert_array_equal(ours, theirs[::-1])
    unit = units.parse("1:3", backward.config.model)
    shown = [inspection.values(model, of, unit) for model, of in ((backward, text), (forward, text[::-1]))]
    np.testing.assert_array_equal(shown[0], shown[1][::-1])
    assert backward.evaluate(text) == forward.evaluate(text[::-1])
    corpus = cl.load_corpus(texts / "train.txt", cache_dir=str(texts / "cache"), vocabulary="characters")
    split = corpus.vocabulary.decode(corpus.test.read(0, len(corpus.test)))
    assert backward.evaluate(corpus.test) == forward.evaluate(split[::-1])
    assert backward.sample("abc", 20) == forward.sample("cba", 20)[::-1]
    assert "".join(backward.stream("abc", 20)) == backward.sample("abc", 20)
    assert backward.sample("abc", 30, stop="fe") == forward.sample("cba", 30, stop="ef")[::-1]


def test_a_text_of_ones_own_is_scored_and_printed_in_its_order(runs, tmp_path, capsys):
    lines = []
    for run, text in zip(runs, ("a cab<>he fed", "def eh><bac a"), strict=True):
        (tmp_path / "text.txt").write_text(text)
        flags = f"--run_dir={run}", f"--text={tmp_path / 'text.txt'}"
        lines.append(printed(evaluate.main, capsys, *flags, "--format=jsonl").splitlines())
        lines.append(json.loads(printed(evaluate.main, capsys, *flags, "--format=json"))["bits_per_symbol"])
    assert lines[0] == lines[2][::-1] and lines[1] == lines[3]
    assert "".join(json.loads(line)["symbol"] for line in lines[0]) == "a cab<>he fed"


def test_what_is_only_shown_of_forward_models_is_refused(runs, texts):
    for flags in (f"--output={texts / 'page.html'}", "--find=[a-c]+"):
        assert "reads backward" in refusal(inspect.main, f"--run_dir={runs[0]}", flags)
